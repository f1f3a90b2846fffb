"""How the next epoch is chosen: who votes, what may be proposed, and what that does to open operations.

Between an epoch and its successor lies one round of Paxos among the epoch's members. `Acceptor` is a member's
voice in it; `Proposal` is what a coordinator has collected; `next_epoch` is the value that it must, or may,
propose. All pure, and without time.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from mycel.compute.collective.epoch import Ballot, Epoch, Member, Promise, Report, Verdict
from mycel.compute.collective.policy import Quorum
from mycel.protocol.mesh import PeerId

NO_BALLOT: Ballot = (0, PeerId(""))


@dataclass(slots=True)
class Acceptor:
    """What this member promised and accepted about the successor of its epoch."""

    promised: Ballot = NO_BALLOT
    accepted: tuple[Ballot, Epoch] | None = None

    def promise(self, ballot: Ballot) -> bool:
        """Whether `ballot` gets this member's promise. A repeated question gets the same answer."""
        if ballot < self.promised:
            return False
        self.promised = ballot
        return True

    def accept(self, ballot: Ballot, epoch: Epoch) -> bool:
        """Whether `epoch`, proposed under `ballot`, gets this member's voice."""
        if ballot < self.promised:
            return False
        self.promised = ballot
        self.accepted = (ballot, epoch)
        return True


@dataclass(slots=True)
class Proposal:
    """A ballot of this node: phase one until `value` is chosen, phase two from then on."""

    ballot: Ballot
    since: float
    admits: bool
    """Whether newcomers may be let in by it."""
    promises: dict[PeerId, Promise] = field(default_factory=dict)
    asked_again: bool = False
    """Whether those who missed each other were given time, and asked once more."""
    value: Epoch | None = None
    accepted: dict[PeerId, None] = field(default_factory=dict)

    def has_quorum(self, current: Epoch, quorum: Quorum) -> bool:
        """Whether enough members promised to go on, or accepted to have it settled."""
        voices = self.promises if self.value is None else self.accepted
        if quorum == "majority":
            return 2 * len(voices) > len(current.members)
        if self.value is None:
            return bool(voices)
        return all(peer in voices for peer in self.voters(current, quorum))

    @property
    def estranged(self) -> list[PeerId]:
        """Who promised, and misses somebody else who did."""
        return [
            peer
            for peer, promise in self.promises.items()
            if any(other in self.promises and other != peer for other in promise.unreachable)
        ]

    def voters(self, current: Epoch, quorum: Quorum) -> list[PeerId]:
        """Who is asked to accept: under "any" only those who will go on together."""
        if quorum == "majority" or self.value is None:
            return list(current.peers)
        staying = dict.fromkeys(self.value.members)
        return [member.peer for member in current.members if member in staying]


def next_epoch(
    current: Epoch, lineage: bytes, proposal: Proposal, joiners: list[Member], quorum: Quorum
) -> Epoch:
    """What `proposal` must propose where something may have been settled already, else what is best.

    Only members that promised stay: all others may have voted, and hold results, that nobody reported.
    """
    promises = proposal.promises
    earlier = [promise.accepted for promise in promises.values() if promise.accepted is not None]
    if earlier:
        _, value = max(earlier, key=lambda item: item[0])
        if quorum == "majority":
            return value
        old = dict.fromkeys(current.members)
        here = tuple(member for member in value.members if member not in old or member.peer in promises)
        if here == value.members:
            return value
        if any(member in old for member in here):
            return msgspec.structs.replace(value, members=here)
    members = [member for member in current.members if member.peer in promises]
    members = _connected(members, promises)
    if proposal.admits:
        known = {member.peer: None for member in members}
        fresh = [member for member in joiners if member.peer not in known and member not in current.members]
        members += sorted(fresh, key=lambda member: (member.peer, member.life))
    verdicts = verdicts_of([promises[peer].reports for peer in current.peers if peer in promises])
    return Epoch(current.number + 1, lineage, tuple(members), verdicts)


def _connected(members: list[Member], promises: dict[PeerId, Promise]) -> list[Member]:
    """`members` less those who cannot all reach each other: whoever has most broken ties goes first.

    Of two that cannot reach one another the younger goes.
    """
    staying = list(members)
    while True:
        here = {member.peer: 0 for member in staying}
        for member in staying:
            for other in promises[member.peer].unreachable:
                if other in here and other != member.peer:
                    here[member.peer] += 1
                    here[other] += 1
        worst = max(reversed(staying), key=lambda member: here[member.peer])
        if not here[worst.peer]:
            return staying
        staying.remove(worst)


def verdicts_of(reports: list[tuple[Report, ...]]) -> tuple[Verdict, ...]:
    """How the operations end whose end not all who report know; those left out never ended and are retried.

    An operation that somebody knows the end of ended so. One on which all who report voted alike may have
    ended so at a member that does not report; so it does. Where votes differ nobody can have ended it, and
    somebody will not have it: it is refused. Where a vote is missing, no one can have ended it, and none ever
    will, because whoever reports votes no more.
    """
    tags: dict[str, list[Report]] = {}
    for report in (report for told in reports for report in told):
        tags.setdefault(report.tag, []).append(report)
    verdicts: list[Verdict] = []
    for tag in sorted(tags):
        told = tags[tag]
        done = max(report.done for report in told)
        known = next(report.last for report in told if report.done == done)
        if done and known is not None and (len(told) < len(reports) or any(r.done < done for r in told)):
            verdicts.append(known)
        votes = [report.vote for report in told if report.done == done and report.vote is not None]
        if len(votes) == len(reports):
            refused = [vote for vote in votes if vote.ending == "refused"]
            verdicts.append((refused or votes)[0])
    return tuple(verdicts)


def is_next(current: Epoch, lineage: bytes, epoch: Epoch) -> bool:
    """Whether `epoch` can be the successor of `current`: what a peer says is checked before it counts."""
    peers = epoch.peers
    return (
        epoch.number == current.number + 1
        and epoch.parent == lineage
        and len(dict.fromkeys(peers)) == len(peers)
    )
