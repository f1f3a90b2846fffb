"""What all members of an operation know of it alike: kind, rule, how the array is cut, who comes after whom.

Two members that would cut differently must not mistake each other's pieces, so everything here goes into the
digest that an operation's frames are named by, epoch, tag and the array's description included.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import msgspec

from mycel.compute.collective.arithmetic import FLOATS, is_workable, storage
from mycel.compute.collective.attempt import Attempt, Rule, part_of
from mycel.compute.collective.quantize import BlockCodec, codec_of
from mycel.compute.collective.ring import Course, Cut, Kind, Ring, Star
from mycel.protocol.lane import OP_BYTES
from mycel.protocol.limits import LaneLimits
from mycel.protocol.mesh import PeerId

GRAIN = 1024
"""Chunks end at multiples of so many items, so that blocks of a codec never lie across two."""
CHUNK_ITEMS_MIN = 16 * GRAIN
CHUNKS_WANTED = 4
"""A part is cut into so many chunks at least, where they are not too small: with fewer a ring stands idle."""
LIGHT_CHUNK_ITEMS = 256 * GRAIN
"""The longest chunk that is quantized, whatever the items: what is encoded at a time."""


Description = tuple[
    tuple[str, str, int],
    tuple[int, bytes, bytes],
    tuple[str, str, str, str, int],
    tuple[str, tuple[int, ...], int],
]
"""Name; epoch; what is done; how it is cut. Members as a digest of their ids."""
_descriptions = msgspec.msgpack.Decoder(Description)


@dataclass(frozen=True, slots=True)
class Task:
    """What is to be done, as the group says it."""

    kind: Kind
    attempt: Attempt
    rule: Rule
    items: int
    """Of the array that is cut into parts."""
    root: PeerId | None = None
    """Whose array is broadcast."""


@dataclass(frozen=True, slots=True)
class Difference:
    """How a neighbour's description differs from this node's, for the same tag and number of a group."""

    is_same_attempt: bool
    """Whether it means the same attempt, so that one of the two is wrong, and not one before or after it."""
    text: str


@dataclass(frozen=True, slots=True)
class Plan:
    """How it is done, and this node's place in it."""

    task: Task
    circle: tuple[int, ...]
    """The ring: members by their index in the attempt's order."""
    cut: Cut
    is_star: bool
    own: PeerId

    @property
    def places(self) -> tuple[PeerId, ...]:
        """The members in the ring's order."""
        return tuple(self.task.attempt.order[index] for index in self.circle)

    @property
    def me(self) -> int:
        """This node's place in the ring."""
        return self.places.index(self.own)

    @property
    def codec(self) -> BlockCodec | None:
        """How items travel. What is small enough for the star travels as it is."""
        return None if self.is_star else codec_of(self.task.rule.codec)

    def describe(self) -> bytes:
        """All that members must agree on; this node's own place is not in it."""
        return msgspec.msgpack.encode(self._description())

    def _description(self) -> Description:
        attempt, rule = self.task.attempt, self.task.rule
        members = hashlib.sha256("\n".join(attempt.order).encode()).digest()
        return (
            (attempt.group, attempt.tag, attempt.number),
            (attempt.epoch, attempt.lineage, members),
            (self.task.kind.value, rule.dtype, rule.op, rule.codec or "", self.task.items),
            (self.task.root or "", self.circle, self.cut.chunk_items),
        )

    def digest(self) -> bytes:
        """What its frames are named by."""
        return hashlib.sha256(b"mycel collective" + self.describe()).digest()[:OP_BYTES]

    def course(self) -> Course:
        """The way this member goes it."""
        return Star(len(self.circle), self.me) if self.is_star else Ring(self.task.kind, self.cut, self.me)

    def compare(self, described: bytes) -> Difference | None:
        """How a neighbour's description differs; None where it is of something else, or of this. What cannot
        be read differs in that."""
        try:
            theirs = _descriptions.decode(described)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            return Difference(False, f"described an operation that cannot be read ({error})")
        mine = self._description()
        if theirs[0] != mine[0] or theirs == mine:
            return None
        if theirs[1] != mine[1]:
            return Difference(False, f"is at epoch {theirs[1][0]}, this attempt is of epoch {mine[1][0]}")
        return Difference(True, f"{_in_words(theirs)} there, {_in_words(mine)} here")


def _in_words(description: Description) -> str:
    kind, dtype, op, codec, items = description[2]
    how = f" as {codec}" if codec else ""
    return f"{kind} ({op}) of {items} {dtype}{how} in chunks of {description[3][2]}"


def draw_plan(task: Task, circle: tuple[int, ...], limits: LaneLimits, own: PeerId) -> Plan:
    """The plan of `task` around `circle` for `own`. Raises `ValueError` for a rule that makes no sense."""
    rule, items, members = task.rule, task.items, len(task.attempt.order)
    _check(task)
    width = storage(rule.dtype).itemsize
    if task.kind is Kind.REDUCE and items * width <= limits.small_bytes:
        return Plan(task, circle, Cut(((0, items),) * members, max(items, 1)), True, own)
    if task.kind is Kind.BROADCAST:
        whose = [task.attempt.order[index] for index in circle]
        parts = tuple((0, items) if peer == task.root else (0, 0) for peer in whose)
    else:
        bounds = [part_of(items, members, index) for index in circle]
        parts = tuple((bound.start, bound.stop) for bound in bounds)
    longest = limits.chunk_bytes // width
    if rule.codec is not None:
        longest = min(longest, LIGHT_CHUNK_ITEMS)
    share = max(end - begin for begin, end in parts)
    wanted = max(CHUNK_ITEMS_MIN, -(-share // CHUNKS_WANTED))
    grains = max(1, min(longest // GRAIN, -(-wanted // GRAIN)))
    return Plan(task, circle, Cut(parts, grains * GRAIN), False, own)


def _check(task: Task) -> None:
    rule = task.rule
    sums = task.kind in (Kind.REDUCE, Kind.SCATTER)
    if sums and not is_workable(rule.dtype, rule.op):
        raise ValueError(f"there is no {rule.op} of {rule.dtype}; use uint8 and min or max")
    if codec_of(rule.codec) is None:
        return
    if rule.dtype not in FLOATS:
        raise ValueError(f"{rule.codec} is for floating point, not for {rule.dtype}; leave the codec out")
    if sums and rule.op not in ("avg", "sum"):
        raise ValueError(f"{rule.codec} is for avg and sum; leave the codec out for {rule.op}")
