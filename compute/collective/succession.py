"""One epoch's succession at one member: who is missed, who proposes and when, what is promised and accepted.

What may be proposed, and what counts as settled, is `mycel.compute.collective.successor`'s; here is the
course of it: whoever misses a member, or hears that an attempt broke, wants the next epoch. The members
propose one after the other in the epoch's order, each waiting for the ones before it. A proposer waits for
promises: of members that are connected for `patience_s`, of suspected ones for `doubt_s`, of those that are
lost for `grace_s` (`silent_s` where they fell silent), in which they may be back. Messages that are lost are
said again with every `press`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from mycel.compute.collective.epoch import (
    Accept,
    Accepted,
    Ballot,
    Epoch,
    Member,
    Message,
    Outbid,
    Prepare,
    Promise,
    Suspect,
    place_of,
)
from mycel.compute.collective.ledger import Action, Ledger, Send
from mycel.compute.collective.policy import Quorum
from mycel.compute.collective.successor import Acceptor, Proposal, is_next, next_epoch
from mycel.protocol.limits_group import GroupLimits
from mycel.protocol.mesh import PeerId

Newcomers = Callable[[float, list[PeerId]], list[Member]]


class Succession:
    """See the top of the file. `settled` is the next epoch, once this node has made it."""

    def __init__(self, epoch: Epoch, me: PeerId, ledger: Ledger, quorum: Quorum, limits: GroupLimits) -> None:
        self.settled: Epoch | None = None
        self._epoch = epoch
        self._place = place_of(epoch)
        self._me = me
        self._ledger = ledger
        self._quorum: Quorum = quorum
        self._limits = limits
        self._out: list[Action] = []
        self._acceptor = Acceptor()
        self._proposal: Proposal | None = None
        self._round = 0
        self._wanted = ""
        self._begin_at = math.inf
        self._wake_at = math.inf
        self._lost: dict[PeerId, float] = {}
        """Members that are missed, and until when they are waited for."""
        self._suspects: dict[PeerId, str] = {}

    def take(self) -> list[Action]:
        """What is to be sent since the last time."""
        out, self._out = self._out, []
        return out

    @property
    def is_calm(self) -> bool:
        """Whether nobody, as far as this node knows, wants another epoch."""
        return not self._wanted and self._proposal is None

    @property
    def next_at(self) -> float:
        """When `go_on` must be called next."""
        return self._wake_at if self._proposal is not None else self._begin_at

    @property
    def here(self) -> list[PeerId]:
        """Members that are not missed, in order."""
        return [peer for peer in self._epoch.peers if peer not in self._lost]

    def rank(self) -> int:
        """How many members come before this one, of those that are there."""
        there = [peer for peer in self.here if peer not in self._suspects]
        return there.index(self._me) if self._me in there else len(there)

    @property
    def waits_for(self) -> str:
        """What the next epoch waits for, "" where none is wanted."""
        proposal = self._proposal
        if proposal is None:
            return self._wanted
        voices = len(proposal.promises if proposal.value is None else proposal.accepted)
        return f"{voices} of {len(self._epoch.members)} members answer; {self._quorum} is needed"

    def lose(self, now: float, peer: PeerId, *, was_silent: bool = False) -> None:
        """A member's connection is lost."""
        if peer not in self._lost:
            self._lost[peer] = now + (self._limits.silent_s if was_silent else self._limits.grace_s)
            why = f"{peer} is not connected to {self._me}"
            self._tell(self.here, Suspect(self._place, peer, why))  # who comes first may not have noticed
            if self._proposal is not None and self._proposal.value is None:
                self._proposal.promises.pop(peer, None)  # else it would be in the next epoch
            self.want(now, why)
            if self._acceptor.promised[1] == peer:  # nothing comes of what it proposed
                self._begin_at = min(self._begin_at, now + self._limits.stagger_s * self.rank())

    def find(self, peer: PeerId) -> None:
        """It is back; what was said meanwhile may be lost, so the next epoch is wanted all the same."""
        if self._lost.get(peer, -math.inf) > -math.inf:
            del self._lost[peer]
            if self._proposal is not None and self._proposal.value is None:
                self._proposal.promises[self._me] = self._promise(self._proposal.ballot)
            self.press()

    def miss(self, now: float, peer: PeerId) -> None:
        """A lost member was dialled in vain: nobody needs to wait for it any longer."""
        if peer in self._lost:
            self._lost[peer] = min(self._lost[peer], now)

    def bury(self, now: float, peer: PeerId) -> None:
        """That member is another life of its peer now, and will never answer."""
        self._lost[peer] = -math.inf
        self.want(now, f"{peer} has begun another life")

    def suspect(self, now: float, peer: PeerId, why: str) -> None:
        """An attempt broke at `peer`, as it seems."""
        self._suspects.setdefault(peer, why)
        self.want(now, why)

    def want(self, now: float, why: str) -> None:
        """There is reason for another epoch."""
        if not self._wanted:
            self._wanted = why
            self._begin_at = min(self._begin_at, now + self._limits.stagger_s * self.rank())

    def propose(self, now: float, *, admits: bool) -> None:
        """Ask the members for their promises; `admits`: newcomers may come in."""
        ballot = (max(self._round, self._acceptor.promised[0]) + 1, self._me)
        self._round = ballot[0]
        self._acceptor.promise(ballot)
        self._ledger.freeze()
        self._proposal = Proposal(ballot, now, admits)
        self._proposal.promises[self._me] = self._promise(ballot)
        self.press()

    def press(self) -> None:
        """Ask those who have not answered, for the first time or again."""
        proposal = self._proposal
        if proposal is None:
            return
        if proposal.value is None:
            asked = [peer for peer in self._epoch.peers if peer not in proposal.promises]
            self._tell(asked, Prepare(self._place, proposal.ballot))
        else:
            voters = proposal.voters(self._epoch, self._quorum)
            asked = [peer for peer in voters if peer not in proposal.accepted]
            self._tell(asked, Accept(self._place, proposal.ballot, proposal.value))

    def receive(
        self, now: float, peer: PeerId, message: Suspect | Prepare | Promise | Outbid | Accept | Accepted
    ) -> None:
        """A member says something about it."""
        proposal = self._proposal
        match message:
            case Suspect():
                self.suspect(now, message.peer, message.why)
            case Prepare(ballot=ballot):
                self._on_prepare(now, peer, ballot)
            case Promise():
                if proposal is not None and proposal.ballot == message.ballot and proposal.value is None:
                    proposal.promises[peer] = message
            case Outbid(ballot=ballot):
                if proposal is not None and proposal.ballot < ballot:
                    self._follow(now, ballot)
            case Accept():
                self._on_accept(now, peer, message)
            case Accepted(ballot=ballot):
                if proposal is not None and proposal.ballot == ballot and proposal.value is not None:
                    proposal.accepted[peer] = None

    def go_on(self, now: float, newcomers: Newcomers, *, admits: bool) -> None:
        """Begin, or take the proposal under way a step further, where it is time."""
        if self._proposal is None and self._wanted and now >= self._begin_at:
            self.propose(now, admits=admits)
        proposal = self._proposal
        if proposal is None:
            return
        self._wake_at = math.inf
        if proposal.value is None:
            if not proposal.has_quorum(self._epoch, self._quorum):
                return
            until = max(self._until(proposal, peer) for peer in self._epoch.peers)
            if now < until:
                self._wake_at = until
                return
            if proposal.estranged and not proposal.asked_again:
                self._ask_again(now, proposal)
                return
            coming = newcomers(now, [peer for peer in self._epoch.peers if peer in proposal.promises])
            proposal.value = next_epoch(self._epoch, self._place.lineage, proposal, coming, self._quorum)
            proposal.since = now
            self._acceptor.accept(proposal.ballot, proposal.value)
            proposal.accepted[self._me] = None
            self.press()
        if proposal.has_quorum(self._epoch, self._quorum):
            self.settled = proposal.value
            return
        again_at = proposal.since + self._limits.change_s
        if self._quorum == "any":  # everybody who was to accept must, or there is another value to propose
            missing = [p for p in proposal.voters(self._epoch, "any") if p not in proposal.accepted]
            again_at = min(again_at, *(self._until(proposal, peer) for peer in missing))
        if now >= again_at:
            self.propose(now, admits=proposal.admits)
        else:
            self._wake_at = again_at

    def _ask_again(self, now: float, proposal: Proposal) -> None:
        """Members that answer miss each other: give them time to connect, and hear how it is then."""
        if now < proposal.since + self._limits.grace_s:
            self._wake_at = proposal.since + self._limits.grace_s
            return
        proposal.asked_again = True
        for peer in proposal.estranged:
            del proposal.promises[peer]
        proposal.promises[self._me] = self._promise(proposal.ballot)
        self.press()

    def _until(self, proposal: Proposal, peer: PeerId) -> float:
        """How long `peer` is waited for."""
        if peer in proposal.promises and proposal.value is None:
            return -math.inf
        if peer in self._lost:
            return self._lost[peer]
        is_suspect = peer in self._suspects
        return proposal.since + (self._limits.doubt_s if is_suspect else self._limits.patience_s)

    def _on_prepare(self, now: float, peer: PeerId, ballot: Ballot) -> None:
        if ballot[1] != peer or not self._acceptor.promise(ballot):
            self._tell([peer], Outbid(self._place, self._acceptor.promised))
            return
        self._follow(now, ballot)
        self._ledger.freeze()
        self._tell([peer], self._promise(ballot))

    def _on_accept(self, now: float, peer: PeerId, message: Accept) -> None:
        if message.ballot[1] != peer or not is_next(self._epoch, self._place.lineage, message.epoch):
            return
        if self._acceptor.accept(message.ballot, message.epoch):
            self._follow(now, message.ballot)
            self._ledger.freeze()
            self._tell([peer], Accepted(self._place, message.ballot))
        else:
            self._tell([peer], Outbid(self._place, self._acceptor.promised))

    def _follow(self, now: float, ballot: Ballot) -> None:
        """Somebody's ballot is under way: come after it, where nothing comes of it."""
        self._round = max(self._round, ballot[0])
        if self._proposal is not None and self._proposal.ballot < ballot:
            self._proposal = None
        if self._proposal is None:
            self._wanted = self._wanted or f"{ballot[1]} proposes"
            wait = self._limits.change_s + self._limits.stagger_s * self.rank()
            self._begin_at = now + wait * min(self._round, 8)  # slower and slower, where messages are slow

    def _promise(self, ballot: Ballot) -> Promise:
        reports = self._ledger.reports()
        return Promise(self._place, ballot, self._acceptor.accepted, reports, tuple(self._lost))

    def _tell(self, peers: list[PeerId], message: Message) -> None:
        self._out.extend(Send(peer, message) for peer in peers if peer != self._me)
