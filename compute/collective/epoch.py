"""Epochs of a group, and what its members say to each other about them and about operations.

An **epoch** is one agreed membership. It names its parent by hash, so an epoch's own hash, its *lineage*,
stands for the whole history; of two epochs with equal numbers and different lineages at most one is this
group's, or the group had split. An epoch also says how the operations of its parent ended that some member
may not know the end of.

A **member** is a peer in one of its *lives*: the number is drawn whenever a process starts, and whenever it
leaves or is left out. A peer that comes back remembers nothing of what it promised, so it must not be taken
for the one that did.

Messages are one union, sent in bundles by one call; none expects an answer, all may be lost, doubled and
overtaken (`mycel.compute.collective.group` says why that does no harm).
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Literal

import msgspec

from mycel.protocol.limits_group import DEFAULT_GROUP_LIMITS
from mycel.protocol.mesh import PeerId

_MOST = DEFAULT_GROUP_LIMITS

Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]
Lineage = Annotated[bytes, msgspec.Meta(min_length=8, max_length=8)]
Tag = Annotated[str, msgspec.Meta(max_length=_MOST.tag_chars)]
Why = Annotated[str, msgspec.Meta(max_length=_MOST.why_chars)]
Ending = Literal["kept", "refused"]
"""How an operation ended on all its members: with its result, or with an error and their inputs as before."""

Kind = Literal["all_reduce", "reduce_scatter", "all_gather", "broadcast", "barrier", "border"]


class Member(msgspec.Struct, frozen=True, array_like=True):
    """A peer in one of its lives."""

    peer: PeerId
    life: Count


class Verdict(msgspec.Struct, frozen=True, array_like=True):
    """How operation `number` of `tag` ended."""

    tag: Tag
    number: Count
    ending: Ending
    why: Why = ""


class Epoch(msgspec.Struct, frozen=True, array_like=True):
    """One membership: its number, whose successor it is, who is in it in order, and what it settles."""

    number: Count
    parent: Lineage
    members: Annotated[tuple[Member, ...], msgspec.Meta(min_length=1, max_length=_MOST.members)]
    verdicts: Annotated[tuple[Verdict, ...], msgspec.Meta(max_length=2 * _MOST.tags)] = ()

    @property
    def peers(self) -> tuple[PeerId, ...]:
        """Its members' peer ids, in order."""
        return tuple(member.peer for member in self.members)


class Place(msgspec.Struct, frozen=True, array_like=True, order=True):
    """Where a member stands: of two places the greater is that of the longer lineage."""

    number: Count
    size: Count
    lineage: Lineage


def place_of(epoch: Epoch) -> Place:
    """The epoch's number, its size, and the hash over all of it, its parent's included."""
    digest = hashlib.blake2b(msgspec.msgpack.encode(epoch), digest_size=8, person=b"mycel epoch").digest()
    return Place(epoch.number, len(epoch.members), digest)


class Terms(msgspec.Struct, frozen=True, array_like=True):
    """What the members of an operation must say alike before anything moves."""

    kind: Kind
    dtype: Annotated[str, msgspec.Meta(max_length=16)] = ""
    items: Count = 0
    op: Annotated[str, msgspec.Meta(max_length=8)] = ""
    codec: Annotated[str, msgspec.Meta(max_length=16)] = ""
    root: PeerId = PeerId("")
    feedback: bool = False

    def __str__(self) -> str:
        words = [self.kind, self.op, f"{self.dtype}[{self.items}]" if self.dtype else "", self.codec]
        return " ".join(word for word in words if word) + (f" of {self.root}" if self.root else "")


Ballot = tuple[Count, PeerId]
"""A try to settle the next epoch: a round, and who proposes."""


class Report(msgspec.Struct, frozen=True, array_like=True):
    """What a member knows of a tag: `done` operations ended, the last one so, and its vote on the next."""

    tag: Tag
    done: Count
    last: Verdict | None
    vote: Verdict | None


class Arrive(msgspec.Struct, frozen=True, array_like=True, tag="a"):
    """I am here for operation `number` of `tag`."""

    at: Place
    tag: Tag
    number: Count
    terms: Terms


class Vote(msgspec.Struct, frozen=True, array_like=True, tag="v"):
    """I hold the result of this operation and will keep it if all do; or I will not have it."""

    at: Place
    verdict: Verdict


class Suspect(msgspec.Struct, frozen=True, array_like=True, tag="s"):
    """An attempt broke, at `peer` as it seems ("" where it cannot be told): let us agree anew."""

    at: Place
    peer: PeerId
    why: Why


class Prepare(msgspec.Struct, frozen=True, array_like=True, tag="p"):
    """I want to propose the next epoch: promise me your voice, and say what you know."""

    at: Place
    ballot: Ballot


class Promise(msgspec.Struct, frozen=True, array_like=True, tag="q"):
    """I follow no lower ballot and vote on no more operations of this epoch."""

    at: Place
    ballot: Ballot
    accepted: tuple[Ballot, Epoch] | None
    reports: Annotated[tuple[Report, ...], msgspec.Meta(max_length=2 * _MOST.tags)]
    unreachable: Annotated[tuple[PeerId, ...], msgspec.Meta(max_length=_MOST.members)]


class Outbid(msgspec.Struct, frozen=True, array_like=True, tag="o"):
    """I promised a higher ballot."""

    at: Place
    ballot: Ballot


class Accept(msgspec.Struct, frozen=True, array_like=True, tag="c"):
    """Let this be the next epoch."""

    at: Place
    ballot: Ballot
    epoch: Epoch


class Accepted(msgspec.Struct, frozen=True, array_like=True, tag="d"):
    """It has my voice."""

    at: Place
    ballot: Ballot


class News(msgspec.Struct, frozen=True, array_like=True, tag="n"):
    """Epochs that were settled, each the successor of the one before."""

    epochs: Annotated[tuple[Epoch, ...], msgspec.Meta(min_length=1, max_length=_MOST.history)]


class Hello(msgspec.Struct, frozen=True, array_like=True, tag="h"):
    """Where I stand (nil: outside), and whether I want in or would begin a group; `asks` for the same.

    `peers` are the members of my epoch or, from outside, the peers that I am connected to.
    """

    life: Count
    place: Place | None
    wants_in: bool
    founds: bool
    asks: bool
    peers: Annotated[tuple[PeerId, ...], msgspec.Meta(max_length=4 * _MOST.members)]


Message = (
    Arrive | Vote | Suspect | Prepare | Promise | Outbid | Accept | Accepted | News | Hello
)  # a tagged union: msgspec tells them apart by their first item
Placed = Arrive | Vote | Suspect | Prepare | Promise | Outbid | Accept | Accepted


class Bundle(msgspec.Struct, frozen=True, array_like=True):
    """What one call carries."""

    messages: Annotated[tuple[Message, ...], msgspec.Meta(max_length=4096)]
