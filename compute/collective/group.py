"""Membership of a group without a master: epochs that all members agree on, and operations that end on all
of them alike. Synchronous: what happens and the time go in, `take` gives what is to be done.

**What holds**, whatever messages are lost, doubled or overtaken and whoever dies:

1. *One successor.* Under `quorum="majority"` an epoch has at most one successor: Paxos, with the epoch's
   members as acceptors, keyed by the epoch's lineage (the hash over its whole history). So there is one line
   of epochs, and a part of the members that is not the majority cannot go on.
2. *Voices are not forgotten.* A member is a peer in one of its lives. A process that starts again, and a node
   that was left out, draws another life, is in no epoch, and answers for none.
3. *Kept means held by all who go on.* A vote to keep an operation is cast only once its result, of which
   every member's input is a part, is held; it is never changed; and without every member's vote an
   operation is kept only by the epoch's successor, where all who are in both epochs have cast it.
4. *What ended stays ended.* Whoever promises its voice for a successor votes on no more operations, and
   reports its votes with the promise. If an operation ended anywhere, all members had voted alike, so all
   who report say so, and the successor says so too; if one who reports has not voted, it ended nowhere and
   never will. Only those who reported stay in: every member of the successor that was in the epoch before
   holds what the successor declares kept.
5. *The same number means the same call.* Operations of a tag are numbered from 0 in each epoch by what is
   settled. Whoever enters an epoch knows how all operations of the one before ended, and calls those
   again that did not.

Under `quorum="any"` a successor needs the voices of those who stay in it only. Two parts that do not hear
each other both go on; 2 to 5 hold within each lineage, and of two that meet again the longer goes on
(`Place`'s order: epochs, then members, then hash) while the members of the other come in as newcomers.

**Who does what.** Any member may propose; to keep out of each other's way they begin one after the other,
in the epoch's order. A proposer that dies costs the next one's wait. Nobody is asked whether a peer is dead:
a member that does not promise within its time is left out, and finds out when it speaks again, because
messages name their epoch, and those who are ahead answer with what has been settled since.

`Ledger` keeps the operations of an epoch, `Succession` makes the next one, `Door` looks after those outside;
this file puts them together.

**What is trusted.** Members follow the protocol. Peers outside can knock, and nothing else: they cannot vote,
and by majority no epoch is taken from a peer that is not in the one before. A member that is stuck believes
anybody of a later epoch that it is out, since then it only comes in anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from mycel.compute.collective.attempt import Attempt
from mycel.compute.collective.door import Door
from mycel.compute.collective.epoch import (
    Arrive,
    Epoch,
    Hello,
    Member,
    Message,
    News,
    Place,
    Suspect,
    Terms,
    Vote,
    place_of,
)
from mycel.compute.collective.history import Early, History
from mycel.compute.collective.ledger import Action, Entered, Ledger, Left, LocalCall, Send, clipped
from mycel.compute.collective.policy import Policy
from mycel.compute.collective.succession import Succession
from mycel.compute.collective.successor import is_next
from mycel.protocol.limits_group import DEFAULT_GROUP_LIMITS, GroupLimits
from mycel.protocol.mesh import PeerId

_LEFT_OUT = "the group went on without this node; take over its state and call again"


@dataclass(frozen=True, slots=True)
class _Inside:
    """What a member has of its epoch; replaced as a whole by the next one's."""

    epoch: Epoch
    place: Place
    ledger: Ledger
    succession: Succession


class Membership:
    """One node's part in a group. See the top of the file.

    After whatever happened, `take` gives what is to be done, and `next_at` says when `tick` is due.
    """

    def __init__(
        self,
        group: str,
        me: PeerId,
        entropy: Callable[[int], bytes],
        policy: Policy,
        limits: GroupLimits = DEFAULT_GROUP_LIMITS,
    ) -> None:
        self._group = group
        self._me = me
        self._entropy = entropy
        self._policy = policy
        self._limits = limits
        self._life = self._draw_life()
        self._calls: dict[str, LocalCall] = {}
        self._out: list[Action] = []
        self._connected: dict[PeerId, None] = {}
        self._door = Door(me, limits)
        self._may_found = policy.founds
        self._inside: _Inside | None = None
        self._history = History(limits.history)
        self._early = Early(limits.history, limits.early)
        self._remind_at = math.inf
        self._greeted = 0
        self._met: dict[PeerId, None] = {}
        """Whoever was in an epoch with this node."""
        self._look_at = math.inf
        """When somebody who knocked will have waited for long enough."""
        self._has_begun = False
        """Whether there were enough members once: before that nobody has got anywhere."""

    @property
    def epoch(self) -> Epoch | None:
        """The epoch that this node is in, None while it is outside."""
        return None if self._inside is None else self._inside.epoch

    @property
    def member(self) -> Member:
        """This node, in its life of now."""
        return Member(self._me, self._life)

    @property
    def waits_for(self) -> str:
        """What keeps the group from going on, "" where nothing does."""
        return "to be let in" if self._inside is None else self._inside.succession.waits_for

    # What the node does

    def join(self, now: float) -> None:
        """Want in, also again whenever this node is left out."""
        if self._inside is None:
            self._door.wait(now)
            self.tick(now)

    def leave(self) -> None:
        """Go, in order: the others need not wait for anything."""
        if self._inside is not None:
            self._life = self._draw_life()
            farewell = Hello(self._life, None, False, False, False, ())
            self._tell(self._inside.epoch.peers, farewell)
        self._fall_out("this node left the group")
        self._door.end()

    def call(self, now: float, tag: str, terms: Terms) -> None:
        """This node calls an operation. One per tag at a time: see `is_open`."""
        self._calls[tag] = LocalCall(terms)
        if self._inside is not None:
            self._inside.ledger.call(tag)
        self._after(now)

    def is_open(self, tag: str) -> bool:
        """Whether a call of this tag has not ended, withdrawn or not."""
        return tag in self._calls

    def is_awaited(self, tag: str) -> bool:
        """Whether another member waits for this one to call an operation of `tag`."""
        return self._inside is not None and self._inside.ledger.is_awaited(tag)

    def withdraw(self, now: float, tag: str, why: str) -> None:
        """This node will not have its call: it fails on all members, unless it is too late for that."""
        if tag in self._calls:
            if self._inside is None:
                del self._calls[tag]  # nobody has heard of it
            else:
                self._inside.ledger.refuse(tag, clipped(why, self._limits))
            self._after(now)

    def staged(self, now: float, attempt: Attempt) -> bool:
        """The attempt's result is held here. False where it will never be kept: drop it."""
        is_held = self._inside is not None and self._inside.ledger.staged(attempt)
        self._after(now)
        return is_held

    def failed(self, now: float, attempt: Attempt, peer: PeerId | None, why: str) -> None:
        """The attempt broke here, as it seems at `peer`."""
        why = clipped(why, self._limits)
        if self._inside is not None and self._inside.ledger.failed(attempt, why):
            self._tell(self._inside.epoch.peers, Suspect(self._inside.place, peer or PeerId(""), why))
            self._inside.succession.suspect(now, peer or PeerId(""), why)
        self._after(now)

    # What the network does

    def up(self, now: float, peer: PeerId) -> None:
        """A peer is connected."""
        self._connected[peer] = None
        if self._inside is None:
            if self._door.knock_at < math.inf:
                self._door.knock_at = now
                self.tick(now)
        elif peer in self._inside.epoch.peers:
            self._inside.succession.find(peer)
        else:
            self._tell([peer], self._hello(asks=True))
        self._after(now)

    def down(self, now: float, peer: PeerId, *, was_silent: bool = False) -> None:
        """A peer's connection is lost; `was_silent`: after nothing had come over it for a while."""
        self._connected.pop(peer, None)
        self._door.forget(peer)
        if self._inside is not None and peer in self._inside.epoch.peers:
            self._inside.succession.lose(now, peer, was_silent=was_silent)
        self._after(now)

    def miss(self, now: float, peer: PeerId) -> None:
        """A peer whose connection was lost was dialled in vain."""
        if self._inside is not None:
            self._inside.succession.miss(now, peer)
        self._after(now)

    def receive(self, now: float, peer: PeerId, message: Message) -> None:
        """A peer says something."""
        if isinstance(message, Hello):
            self._on_hello(now, peer, message)
        elif isinstance(message, News):
            self._on_news(now, peer, message)
        elif self._inside is None or message.at.number > self._inside.place.number:
            self._early.keep(peer, message)
            self._tell([peer], self._hello())  # this asks for the news
        elif message.at != self._inside.place:
            self._tell([peer], self._history.since(message.at))
        elif peer in self._inside.epoch.peers:
            match message:
                case Arrive():
                    self._inside.ledger.on_arrive(peer, message)
                case Vote():
                    self._inside.ledger.on_vote(peer, message)
                case _:
                    self._inside.succession.receive(now, peer, message)
        self._after(now)

    def tick(self, now: float) -> None:
        """Time has passed."""
        if self._inside is None:
            if self._door.knocks(now):
                self._tell(self._connected, self._hello(asks=True))
            if self._may_found and self._door.may_found(now):
                self._enter(now, Epoch(1, self._entropy(8), (self.member,)))
        if now >= self._look_at:
            self._look_at = math.inf
        if self._inside is not None and now >= self._remind_at:
            self._remind_at = now + self._limits.remind_s
            self._inside.ledger.remind()
            self._inside.succession.press()
            met = [peer for peer in dict.fromkeys([*self._met, *self._door.heard]) if peer in self._connected]
            self._greeted += 1  # one after the other hears where this node stands: somebody may be elsewhere
            self._tell(met[self._greeted % len(met) :][:1] if met else (), self._hello())
        self._after(now)

    @property
    def next_at(self) -> float:
        """When `tick` must be called next, at the latest."""
        if self._inside is None:
            return self._door.knock_at  # it looks who may begin the group whenever it knocks
        return min(self._remind_at, self._inside.succession.next_at, self._look_at)

    def take(self) -> list[Action]:
        """What is to be done since the last time, in order."""
        out, self._out = self._out, []
        return out

    # Coming in and falling out

    def _on_hello(self, now: float, peer: PeerId, hello: Hello) -> None:
        self._door.hear(now, peer, hello)
        if hello.place is None and hello.wants_in:
            self._look_at = min(self._look_at, now + self._limits.admit_s)
        inside = self._inside
        if inside is None or (hello.place is not None and hello.place > inside.place):
            if hello.asks:
                self._tell([peer], self._hello())
        elif hello.place is not None:
            if hello.place < inside.place:
                self._tell([peer], self._history.since(hello.place))
        elif Member(peer, hello.life) in inside.epoch.members:
            self._tell([peer], News((inside.epoch,)))
        else:
            if peer in inside.epoch.peers:
                inside.succession.bury(now, peer)
            if hello.asks:
                self._tell([peer], self._hello())

    def _on_news(self, now: float, peer: PeerId, news: News) -> None:
        last = news.epochs[-1]
        is_any = self._policy.quorum == "any"
        for epoch in news.epochs:
            inside = self._inside
            if inside is None or not is_next(inside.epoch, inside.place.lineage, epoch):
                continue
            if peer in inside.epoch.peers or (is_any and peer in last.peers):
                self._enter(now, epoch)
        inside = self._inside
        if peer not in last.peers:
            return
        if self.member in last.members:  # inside, it hears so of one of its own epoch
            if inside is None:
                self._enter(now, last)
        elif inside and place_of(last) > inside.place and (is_any or self._is_lost(peer, inside)):
            self._fall_out(_LEFT_OUT)
            self._door.wait(now)

    def _is_lost(self, peer: PeerId, inside: _Inside) -> bool:
        """Whether `peer` is believed that the epoch is over: one of it, or anybody where it may be so."""
        return peer in inside.epoch.peers or bool(inside.succession.waits_for)

    def _enter(self, now: float, epoch: Epoch) -> None:
        if self._inside is not None:
            self._inside.ledger.close(epoch.verdicts)
            self._collect()
        if self.member not in epoch.members:
            self._fall_out(_LEFT_OUT)
            self._door.wait(now)
            return
        self._door.end()
        self._may_found = self._policy.founds and self._policy.quorum == "any"
        place = place_of(epoch)
        ledger = Ledger(self._group, epoch, self._me, self._calls, self._limits)
        ledger.is_short = len(epoch.members) < self._policy.least
        self._has_begun |= not ledger.is_short
        succession = Succession(epoch, self._me, ledger, self._policy.quorum, self._limits)
        self._inside = _Inside(epoch, place, ledger, succession)
        self._history.add(place, epoch)
        self._remind_at = now + self._limits.remind_s
        self._met.update(dict.fromkeys(epoch.peers))
        self._out.append(Entered(epoch))
        ledger.call_all()
        for peer in epoch.peers:
            if peer != self._me and peer not in self._connected:
                succession.lose(now, peer)
        for peer, message in self._early.pop(place.lineage):
            self.receive(now, peer, message)

    def _fall_out(self, why: str) -> None:
        """Be outside, with nothing under way."""
        if self._inside is not None:
            self._life = self._draw_life()
            self._inside.ledger.close(())
            self._collect()
        self._inside = None
        self._history.clear()
        self._calls.clear()
        self._out.append(Left(why))

    def _admit(self, now: float, inside: _Inside) -> None:
        """Let newcomers in, where this node comes first and the moment is right."""
        wants = inside.succession.rank() == 0 and bool(self._door.newcomers(now, inside.succession.here))
        if inside.ledger.stops != wants:
            inside.ledger.stops = wants
            inside.ledger.holds = wants and (self._policy.admits == "whenever" or not self._has_begun)
            inside.ledger.call_all()
        is_time = inside.ledger.is_quiet if inside.ledger.holds else inside.ledger.at_border
        if wants and is_time:
            inside.succession.propose(now, admits=True)

    def _after(self, now: float) -> None:
        """What follows from whatever just happened."""
        inside = self._inside
        if inside is None:
            return
        if inside.ledger.needs_epoch:
            inside.succession.want(now, "the members' votes differ")
        if inside.succession.is_calm:
            self._admit(now, inside)
        inside.succession.go_on(now, self._door.newcomers, admits=self._policy.admits == "whenever")
        self._collect()
        settled = inside.succession.settled
        if settled is not None and self._inside is inside:
            self._tell(dict.fromkeys([*inside.epoch.peers, *settled.peers]), News((settled,)))
            self._enter(now, settled)
            self._collect()

    def _collect(self) -> None:
        if self._inside is not None:
            self._out += self._inside.ledger.take() + self._inside.succession.take()

    # What is said

    def _tell(self, peers: Iterable[PeerId], message: Message) -> None:
        self._out.extend(Send(peer, message) for peer in peers if peer != self._me)

    def _hello(self, *, asks: bool = False) -> Hello:
        if self._inside is not None:
            peers = self._inside.epoch.peers
            return Hello(self._life, self._inside.place, True, self._may_found, asks, peers)
        waits = self._door.knock_at < math.inf
        near = tuple(self._connected)[: 4 * self._limits.members]
        return Hello(self._life, None, waits, self._may_found, asks, near)

    def _draw_life(self) -> int:
        return int.from_bytes(self._entropy(7), "big")
