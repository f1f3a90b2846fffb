"""The seam between a group, which decides, and a mover, which moves the bytes of an operation.

A group's operation is tried among the members of one epoch: that is an `Attempt`. A mover carries it out and
leaves a `Staged` result, which is not the caller's yet: the group collects everybody's vote, and only then
says `keep`. Where a member died first, the group says `drop`, and tries again among the survivors. Between
the call of a mover and `keep` or `drop` the caller does not look at its arrays, so a mover may work in them
as long as it can put them back; what counts is what stands in them afterwards.

Arrays are one-dimensional and C-contiguous numpy views of the caller's memory. bfloat16 and float16 come as
any array of 16-bit items; what they mean says `Rule.dtype`, a word of `mycel.protocol.tensor.ITEM_BYTES`.

What a mover may rely on: the members of an attempt have all arrived and have told each other equal
descriptions (`Rule`, number of items, kind of operation) before any of them begins; no two attempts are
equal; the attempts of one tag follow one another, those of different tags run at once. What the group relies
on: the same bytes on every member that ends with `Staged`, whatever the network did.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from mycel.protocol.errors import MycelError
from mycel.protocol.mesh import PeerId
from mycel.protocol.tensor import ITEM_BYTES

Array = npt.NDArray[Any]

OPS = ("avg", "sum", "min", "max")


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try of one operation, equal on all its members: what frames of it are named by."""

    group: str
    epoch: int
    lineage: bytes
    """8 bytes that name this epoch among all that ever had its number, where a group had split."""
    tag: str
    number: int
    """Counts the operations of the tag in the epoch, from 0."""
    order: tuple[PeerId, ...]
    """Its members, the same order on all, this node among them. A mover may go round in another one."""

    def index(self, peer: PeerId) -> int:
        """Where `peer` stands in the order: which part it has in `reduce_scatter` and `all_gather`."""
        return self.order.index(peer)


@dataclass(frozen=True, slots=True)
class Rule:
    """How items are read and put together."""

    dtype: str
    op: str = "avg"
    """One of `OPS`; `broadcast` and `all_gather` do not look at it."""
    codec: str | None = None
    """How items travel: None as they are, "int8" or "int4" quantized in blocks."""
    feedback: bool = False
    """Whether `all_reduce` adds what the codec lost of this tag's last operation to the next one."""


class AttemptFailed(MycelError):
    """An attempt ended before its result stood; the caller's arrays hold what they held before.

    `peer` is whom to suspect, None where the mover cannot tell. The group asks that peer itself before it
    leaves it out.
    """

    def __init__(self, peer: PeerId | None, why: str) -> None:
        super().__init__(why)
        self.peer = peer
        self.why = why


class InputRefused(MycelError):
    """This node's input cannot be worked on at all (items that are not finite, under a codec that needs it).

    The operation fails on all members with this text, and is not tried again.
    """


class Staged(Protocol):
    """The result of an attempt at this node, held back. Exactly one of the two is called, exactly once.

    Neither blocks for long nor raises.
    """

    def keep(self) -> None:
        """The attempt is committed: the result stands in the caller's array from now on."""

    def drop(self) -> None:
        """It is not: the caller's array holds what it held before the attempt."""


class Mover(Protocol):
    """Carries out attempts. All methods raise `AttemptFailed`, within the mover's progress deadline after the
    last byte that moved, and `InputRefused`; then, and when they are cancelled, the caller's arrays are as
    they were and nothing of the attempt goes on at this node.
    """

    async def all_reduce(
        self, attempt: Attempt, array: Array, rule: Rule, into: Array | None = None
    ) -> Staged:
        """Put the members' arrays together, item by item; once kept, the result stands in `array`.

        Or in `into`, of the same size, which may hold anything while the attempt goes on and after it was
        dropped; `array` stays as it is. That saves a copy of the input.
        """

    async def reduce_scatter(self, attempt: Attempt, array: Array, part: Array, rule: Rule) -> Staged:
        """As `all_reduce`, for this node's part alone: `part_of(array.size, members, index)` of the result.

        It is written to `part`, which has that many items; `array` stays as it is.
        """

    async def all_gather(self, attempt: Attempt, part: Array, whole: Array, rule: Rule) -> Staged:
        """Write every member's part, in the attempt's order, into `whole` (members times `part.size`)."""

    async def broadcast(self, attempt: Attempt, array: Array, root: PeerId, rule: Rule) -> Staged:
        """Write `root`'s array into everybody's."""

    async def abandon(self, attempt: Attempt) -> None:
        """Forget an attempt that will not be kept, begun at this node or not: what still comes of it is
        refused. Its calls at this node have ended before."""


def part_of(items: int, members: int, index: int) -> slice:
    """Which items belong to the member at `index`: parts in order, the first ones longer by one."""
    short, longer = divmod(items, members)
    begin = index * short + min(index, longer)
    return slice(begin, begin + short + (1 if index < longer else 0))


def check_rule(rule: Rule, array: Array) -> None:
    """Raise `ValueError` unless `rule` can describe `array`'s items."""
    if rule.op not in OPS:
        raise ValueError(f"unknown operation {rule.op!r}; use one of {', '.join(OPS)}")
    if ITEM_BYTES.get(rule.dtype) != array.dtype.itemsize:
        raise ValueError(f"{rule.dtype!r} does not describe items of {array.dtype.itemsize} bytes")


def as_items(array: Array) -> Array:
    """A flat view of `array`'s memory. Raises `ValueError` where it is not C-contiguous."""
    if not array.flags.c_contiguous:
        raise ValueError(
            "the array is not C-contiguous; pass np.ascontiguousarray(it) or a contiguous tensor"
        )
    return np.reshape(array, -1)
