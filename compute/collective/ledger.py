"""The operations of one epoch at one member: who has arrived, who has voted what, and what that settles.

An operation is (tag, number). Every member that calls it *arrives*, telling everybody what it wants done;
when all have arrived, bytes move; when they have moved, the member *votes*, telling everybody; when all
have voted alike, the operation is *settled*, and nobody has to say so. Nobody coordinates.

    kept     every member holds the result. One vote to keep it is one member's word that it will if all do.
    refused  some member will not have it: the descriptions differ, an input cannot be used, a caller gave up.
             Whoever hears of it, and has not voted, joins in.

A vote is never changed. Where votes differ nothing settles it but the epoch's successor, and so does where
somebody dies: members that promised their voice to a successor are *frozen* and vote no more, so that what
they report stays true (`mycel.compute.collective.successor.verdicts_of`).

Numbers count the settled operations of a tag in this epoch. A member is never more than one ahead of
another, because to settle an operation it needs everybody's vote on it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from mycel.compute.collective.attempt import Attempt
from mycel.compute.collective.epoch import (
    Arrive,
    Ending,
    Epoch,
    Message,
    Place,
    Report,
    Terms,
    Verdict,
    Vote,
    place_of,
)
from mycel.protocol.limits_group import GroupLimits
from mycel.protocol.mesh import PeerId


@dataclass(frozen=True, slots=True)
class Send:
    """Tell `peer`."""

    peer: PeerId
    message: Message


@dataclass(frozen=True, slots=True)
class Begin:
    """Everybody is there: let the mover work."""

    attempt: Attempt
    terms: Terms


@dataclass(frozen=True, slots=True)
class Abandon:
    """Stop this attempt, or drop its staged result; it will never be kept."""

    attempt: Attempt


@dataclass(frozen=True, slots=True)
class Settled:
    """This node's call of `tag` ended. `attempt` is the one whose result is kept or dropped."""

    tag: str
    ending: Ending
    why: str
    attempt: Attempt
    attempts: int


@dataclass(frozen=True, slots=True)
class Entered:
    """This node is a member of a new epoch."""

    epoch: Epoch


@dataclass(frozen=True, slots=True)
class Left:
    """This node is outside; its calls failed, their inputs are as they were."""

    why: str


Action = Send | Begin | Abandon | Settled | Entered | Left


@dataclass(slots=True)
class LocalCall:
    """A call of this node that has not ended. It outlives epochs; its number does not."""

    terms: Terms
    attempts: int = 0
    broke: str = ""
    """Why the last attempt failed at this node."""
    withdrawn: str = ""
    """Why this node will not have it any more, "" while it will."""


@dataclass(slots=True)
class TagState:
    """One tag in one epoch; arrivals and votes are by number."""

    done: int = 0
    last: Verdict | None = None
    arrivals: dict[int, dict[PeerId, Terms]] = field(default_factory=dict)
    votes: dict[int, dict[PeerId, Verdict]] = field(default_factory=dict)
    attempt: Attempt | None = None
    """Begun at this node, for number `done`."""
    broken: bool = False
    """It failed here; only another epoch can try again."""

    def arrived(self) -> dict[PeerId, Terms]:
        """Who has arrived for the operation that is next to settle."""
        return self.arrivals.setdefault(self.done, {})

    def voted(self) -> dict[PeerId, Verdict]:
        """Who has voted on it."""
        return self.votes.setdefault(self.done, {})


class Ledger:
    """See the top of the file. `calls` are this node's, by tag; `take` gives what is to be done."""

    def __init__(
        self, group: str, epoch: Epoch, me: PeerId, calls: dict[str, LocalCall], limits: GroupLimits
    ) -> None:
        self.place: Place = place_of(epoch)
        self.needs_epoch = False
        """Votes differ: only a successor can settle that."""
        self.frozen = False
        self.holds = False
        """No new arrivals: newcomers are to come in as soon as nothing moves..."""
        self.stops = False
        """...or, where they come in at borders, no votes on those."""
        self.is_short = False
        """Too few members: nobody begins anything, or passes a border; but they wait there for more."""
        self._group = group
        self._epoch = epoch
        self._order = epoch.peers
        self._others = [peer for peer in epoch.peers if peer != me]
        self._me = me
        self._calls = calls
        self._limits = limits
        self._out: list[Action] = []
        self._tags: dict[str, TagState] = {}

    def is_awaited(self, tag: str) -> bool:
        """Whether another member has arrived for an operation that this node has not called."""
        state = self._tags.get(tag)
        return state is not None and bool(state.arrived()) and self._me not in state.arrived()

    def take(self) -> list[Action]:
        """What is to be done since the last time, in order."""
        out, self._out = self._out, []
        return out

    @property
    def is_quiet(self) -> bool:
        """Whether nothing moves that another epoch would have to move again."""
        return all(state.attempt is None for state in self._tags.values())

    @property
    def at_border(self) -> bool:
        """Whether everybody waits at a border, and this node does not let it pass."""
        return self.stops and any(
            call.terms.kind == "border"
            and tag in self._tags
            and len(self._tags[tag].arrived()) == len(self._order)
            for tag, call in self._calls.items()
        )

    def call(self, tag: str) -> None:
        """Arrive for this node's call of `tag`, or go on with it."""
        call = self._calls.get(tag)
        if call is None:
            return
        state = self._state(tag)
        if state is None:
            call.withdrawn = f"more than {self._limits.tags} tags in one epoch; use the same ones again"
            self._calls.pop(tag)
            attempt = Attempt(self._group, self._epoch.number, self.place.lineage, tag, 0, self._order)
            self._out.append(Settled(tag, "refused", call.withdrawn, attempt, 0))
            return
        if self._me not in state.arrived():
            waits = self.holds or (self.is_short and call.terms.kind != "border")
            if self.frozen or (waits and not call.withdrawn):
                return
            state.arrived()[self._me] = call.terms
            self._tell(Arrive(self.place, tag, state.done, call.terms))
        self._go_on(tag, state, call)

    def call_all(self) -> None:
        """Arrive for all calls of this node that wait."""
        for tag in list(self._calls):
            self.call(tag)

    def on_arrive(self, peer: PeerId, message: Arrive) -> None:
        """A member arrived."""
        state = self._state(message.tag)
        if state is not None and state.done <= message.number <= state.done + 1:
            state.arrivals.setdefault(message.number, {}).setdefault(peer, message.terms)
            self.call(message.tag)

    def on_vote(self, peer: PeerId, message: Vote) -> None:
        """A member voted."""
        verdict = message.verdict
        state = self._state(verdict.tag)
        if state is not None and state.done <= verdict.number <= state.done + 1:
            state.votes.setdefault(verdict.number, {}).setdefault(peer, verdict)
            self._tally(verdict.tag, state)
            self.call(verdict.tag)

    def staged(self, attempt: Attempt) -> bool:
        """This node holds the attempt's result. False when nobody waits for it any more: drop it."""
        state = self._tags.get(attempt.tag)
        if state is None or state.attempt != attempt or self.frozen or self._me in state.voted():
            return False
        self._vote(attempt.tag, state, "kept", "")
        return True

    def failed(self, attempt: Attempt, why: str) -> bool:
        """An attempt broke here. False where that is no news."""
        state = self._tags.get(attempt.tag)
        if state is None or state.attempt != attempt or self._me in state.voted():
            return False
        self._calls[attempt.tag].broke = why
        state.attempt = None
        state.broken = True
        return True

    def refuse(self, tag: str, why: str) -> None:
        """This node will not have its call of `tag` any more."""
        call = self._calls[tag]
        call.withdrawn = call.withdrawn or why
        self.call(tag)

    def freeze(self) -> None:
        """Vote no more: what `reports` says from now on stays true."""
        self.frozen = True
        for state in self._tags.values():
            if state.attempt is not None and self._me not in state.voted():
                self._out.append(Abandon(state.attempt))
                state.attempt = None

    def reports(self) -> tuple[Report, ...]:
        """What this member knows of every tag."""
        return tuple(
            Report(tag, state.done, state.last, state.voted().get(self._me))
            for tag, state in sorted(self._tags.items())
            if state.done or self._me in state.voted()
        )

    def close(self, verdicts: tuple[Verdict, ...]) -> None:
        """The successor is settled, and these operations with it; what is open besides never was."""
        for verdict in verdicts:
            state = self._tags.get(verdict.tag)
            mine = None if state is None else state.voted().get(self._me)
            if state is None or state.done != verdict.number or verdict.tag not in self._calls:
                continue
            if verdict.ending == "refused" or (mine is not None and mine.ending == "kept"):
                self._settle(verdict.tag, state, verdict)
        for state in self._tags.values():
            if state.attempt is not None:
                self._out.append(Abandon(state.attempt))
                state.attempt = None

    def remind(self) -> None:
        """Say again what has not been settled."""
        for tag, state in self._tags.items():
            if self._me in state.arrived():
                self._tell(Arrive(self.place, tag, state.done, state.arrived()[self._me]))
            if self._me in state.voted():
                self._tell(Vote(self.place, state.voted()[self._me]))
            if state.last is not None:  # whoever is one behind lacks this node's vote on the last one
                self._tell(Vote(self.place, state.last))

    def _state(self, tag: str) -> TagState | None:
        """The tag's state, None where there are too many."""
        if tag not in self._tags and len(self._tags) >= self._limits.tags:
            return None
        return self._tags.setdefault(tag, TagState())

    def _go_on(self, tag: str, state: TagState, call: LocalCall) -> None:
        """Vote or begin, where it is time."""
        if self.frozen or self._me in state.voted():
            return
        refused = [verdict for verdict in state.voted().values() if verdict.ending == "refused"]
        if call.withdrawn or refused:
            self._vote(tag, state, "refused", call.withdrawn or refused[0].why)
            return
        if state.attempt is not None or state.broken or len(state.arrived()) < len(self._order):
            return
        differing = self._difference(state)
        if differing:
            self._vote(tag, state, "refused", differing)
        elif call.terms.kind == "border" and (self.stops or self.is_short):
            return
        elif call.terms.kind in ("barrier", "border"):
            call.attempts += 1
            self._vote(tag, state, "kept", "")
        else:
            if call.attempts >= self._limits.attempts:
                self._vote(tag, state, "refused", f"{call.attempts} attempts failed, the last: {call.broke}")
                return
            call.attempts += 1
            state.attempt = self._attempt(tag, state)
            self._out.append(Begin(state.attempt, call.terms))

    def _attempt(self, tag: str, state: TagState) -> Attempt:
        return Attempt(self._group, self._epoch.number, self.place.lineage, tag, state.done, self._order)

    def _difference(self, state: TagState) -> str:
        """Why the members' descriptions do not fit together, "" where they do. The same text on all."""
        arrived = state.arrived()
        first = arrived[self._order[0]]
        for peer in self._order:
            if arrived[peer] != first:
                return (
                    f"{self._order[0]} called {first}, {peer} called {arrived[peer]}; "
                    "give different operations different tags"
                )
        if first.root and first.root not in self._order:
            return f"{first.root}, whose array was to be sent, is no member any more"
        return ""

    def _vote(self, tag: str, state: TagState, ending: Ending, why: str) -> None:
        if ending == "refused" and state.attempt is not None:
            self._out.append(Abandon(state.attempt))
            state.attempt = None
        verdict = Verdict(tag, state.done, ending, why)
        state.voted()[self._me] = verdict
        self._tell(Vote(self.place, verdict))
        self._tally(tag, state)

    def _tally(self, tag: str, state: TagState) -> None:
        votes = state.voted()
        if len(votes) < len(self._order) or tag not in self._calls:
            return
        refused = [votes[peer] for peer in self._order if votes[peer].ending == "refused"]
        if refused and len(refused) < len(votes):
            self.needs_epoch = True
            return
        verdict = refused[0] if refused else votes[self._me]
        self._settle(tag, state, verdict)

    def _settle(self, tag: str, state: TagState, verdict: Verdict) -> None:
        attempt = state.attempt or self._attempt(tag, state)
        call = self._calls.pop(tag)
        state.arrivals.pop(state.done, None)
        state.votes.pop(state.done, None)
        state.done += 1
        state.last = Verdict(tag, verdict.number, verdict.ending, verdict.why)
        state.attempt = None
        state.broken = False
        self._out.append(Settled(tag, verdict.ending, verdict.why, attempt, call.attempts))
        if verdict.ending == "refused":
            self._out.append(Abandon(attempt))

    def _tell(self, message: Message) -> None:
        self._out.extend(Send(peer, message) for peer in self._others)


def clipped(why: str, limits: GroupLimits) -> str:
    """A reason, short enough to travel."""
    return why if len(why) <= limits.why_chars else why[: limits.why_chars - 3] + "..."
