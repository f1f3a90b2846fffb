"""Who sends which part of an array to whom, and when: the ring, and the star for what is small. No I/O.

The array is cut into as many parts as there are members, each part into chunks. Part p is owned by the member
at place p of the ring. Its sum begins at place p + 1, goes once around, every member on the way adding its
own, and is whole at its owner; from there the result goes around the same way, verbatim. So each item is
summed in exactly one place and in one order, and all members hold the same bits. That is ring reduce-scatter
and all-gather (Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations",
2009) without a barrier between its steps: a chunk is sent on as soon as it was added to, whatever the others
do, so all lines are busy from the first chunk to the last.

Such a ring runs at the pace of its slowest line, not at the sum of all; `best_circle` therefore makes the
slowest line of the ring as fast as can be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, Protocol

SUM = 0
"""Phase of partial sums on their way to the owner of their part."""
SPREAD = 1
"""Phase of finished parts on their way to everybody."""

EXACT_MEMBERS = 9
"""Up to so many members every ring is looked at; above, rings are improved by exchanging pairs of lines."""


class Kind(Enum):
    """What an operation does; all but STAR go around the ring."""

    REDUCE = "all_reduce"
    SCATTER = "reduce_scatter"
    GATHER = "all_gather"
    BROADCAST = "broadcast"


class Piece(NamedTuple):
    """A chunk of a part in a phase: what one frame carries."""

    phase: int
    part: int
    chunk: int


class Send(NamedTuple):
    """Send `piece` to the member at place `to`."""

    to: int
    piece: Piece


class Course(Protocol):
    """The way of one operation as one member goes it."""

    sources: tuple[int, ...]
    """Places of the members that send to this one."""
    targets: tuple[int, ...]
    """Places of the members that this one sends to."""
    expected: int
    """Pieces that come to this member in all."""

    def first(self) -> list[Send]:
        """What is sent before anything comes."""

    def expects(self, place: int, piece: Piece) -> bool:
        """Whether the member at `place` has to send this piece, once, to this one."""

    def after(self, piece: Piece) -> list[Send]:
        """What is sent once `piece` was worked in."""


@dataclass(frozen=True, slots=True)
class Cut:
    """How `items` items are cut: parts as (begin, end), in the ring's order, and items of a chunk."""

    parts: tuple[tuple[int, int], ...]
    chunk_items: int

    def chunks(self, part: int) -> int:
        """How many chunks a part has; an empty one has none."""
        begin, end = self.parts[part]
        return -(-(end - begin) // self.chunk_items)

    def bounds(self, part: int, chunk: int) -> tuple[int, int]:
        """(begin, end) of a chunk's items."""
        begin, end = self.parts[part]
        start = begin + chunk * self.chunk_items
        return start, min(end, start + self.chunk_items)


class Ring:
    """The ring as the member at place `me` of `members` goes it."""

    def __init__(self, kind: Kind, cut: Cut, me: int) -> None:
        members = len(cut.parts)
        self._cut = cut
        self._me = me
        self._members = members
        self._next = (me + 1) % members
        self._before = (me - 1) % members
        self._sums = kind in (Kind.REDUCE, Kind.SCATTER)
        self._spreads = kind is not Kind.SCATTER
        everything = sum(cut.chunks(part) for part in range(members))
        self.expected = 0
        if self._sums:
            self.expected += everything - cut.chunks(self._before)
        if self._spreads:
            self.expected += everything - cut.chunks(me)
        self.sources: tuple[int, ...] = (self._before,)
        self.targets: tuple[int, ...] = (self._next,)

    def first(self) -> list[Send]:
        """See `Course.first`: the part that ends farthest away; this member's own where nothing is summed."""
        phase, part = (SUM, self._before) if self._sums else (SPREAD, self._me)
        return [Send(self._next, Piece(phase, part, chunk)) for chunk in range(self._cut.chunks(part))]

    def expects(self, place: int, piece: Piece) -> bool:
        """See `Course.expects`."""
        if place != self._before or not 0 <= piece.part < self._members:
            return False
        if not 0 <= piece.chunk < self._cut.chunks(piece.part):
            return False
        if piece.phase == SUM:
            return self._sums and piece.part != self._before
        return piece.phase == SPREAD and self._spreads and piece.part != self._me

    def after(self, piece: Piece) -> list[Send]:
        """See `Course.after`."""
        if piece.phase == SUM and piece.part != self._me:
            return [Send(self._next, piece)]
        if piece.phase == SUM:
            return [Send(self._next, piece._replace(phase=SPREAD))] if self._spreads else []
        return [Send(self._next, piece)] if piece.part != self._next else []


class Star:
    """All-reduce through the member at place 0: each sends it its whole array, it sends everybody the result.

    `cut` has one part for each member, all of them the whole array in one chunk: a piece's part says whose it
    is. The result is part 0. The centre sums in the order of the places, once it has all.
    """

    def __init__(self, members: int, me: int) -> None:
        self._members = members
        self._me = me
        self._come = 0
        others = tuple(place for place in range(members) if place)
        self.sources: tuple[int, ...] = others if me == 0 else (0,)
        self.targets: tuple[int, ...] = self.sources
        self.expected = len(self.sources)

    def first(self) -> list[Send]:
        """See `Course.first`."""
        return [] if self._me == 0 else [Send(0, Piece(SUM, self._me, 0))]

    def expects(self, place: int, piece: Piece) -> bool:
        """See `Course.expects`."""
        if self._me == 0:
            return piece == Piece(SUM, place, 0) and place in self.sources
        return place == 0 and piece == Piece(SPREAD, 0, 0)

    def after(self, piece: Piece) -> list[Send]:
        """See `Course.after`. Called once for each piece, one after the other."""
        if self._me:
            return []
        self._come += 1
        if self._come < self.expected:
            return []
        return [Send(place, Piece(SPREAD, 0, 0)) for place in self.targets]


def best_circle(cost: Sequence[Sequence[float]]) -> tuple[int, ...]:
    """The ring through all members whose slowest line is fastest; of several, the one with the least sum.

    `cost[a][b]` is what a byte from a to b costs, in any unit (1 / bandwidth); both directions count by
    themselves. Returns the members' numbers in the ring's order, beginning with 0. Exact up to
    `EXACT_MEMBERS` members. The same matrix gives the same ring everywhere.
    """
    members = len(cost)
    if members <= 2:
        return tuple(range(members))
    if members <= EXACT_MEMBERS:
        return _exact_circle(cost)
    return _improved_circle(cost, _greedy_circle(cost))


def worthwhile_circle(rates: Sequence[Sequence[float]]) -> tuple[int, ...]:
    """The best ring where its slowest line is twice as fast as that of the members' own order; or that order.

    `rates[a][b]` is what was measured from a to b, bytes a second, 0 for nothing yet: such a line is taken to
    be as fast as the fastest, so it is tried where there is something to gain. Changing the ring costs fresh
    lanes, so it does not follow every breath of the measurements.
    """
    members = len(rates)
    order = tuple(range(members))
    fastest = max(max(row) for row in rates)
    if fastest <= 0:
        return order
    cost = [[1 / rate if rate > 0 else 1 / fastest for rate in row] for row in rates]
    best = best_circle(cost)
    return best if 2 * _price(cost, best)[0] <= _price(cost, order)[0] else order


def _price(cost: Sequence[Sequence[float]], circle: Sequence[int]) -> tuple[float, float]:
    lines = [cost[a][b] for a, b in zip(circle, [*circle[1:], circle[0]], strict=True)]
    return max(lines), sum(lines)


def _exact_circle(cost: Sequence[Sequence[float]]) -> tuple[int, ...]:
    """Dynamic programming over (members visited, last one): the best price of each, by (slowest, sum)."""
    members = len(cost)
    best: dict[tuple[int, int], tuple[float, float, tuple[int, ...]]] = {(1, 0): (0.0, 0.0, (0,))}
    for visited in range(1, 1 << members, 2):
        for last in range(members):
            found = best.get((visited, last))
            if found is None:
                continue
            for following in range(1, members):
                if visited >> following & 1:
                    continue
                line = cost[last][following]
                offer = (max(found[0], line), found[1] + line, (*found[2], following))
                key = (visited | 1 << following, following)
                if key not in best or offer < best[key]:
                    best[key] = offer
    everybody = (1 << members) - 1
    ends = [best[everybody, last] for last in range(1, members)]
    closed = [(max(end[0], cost[end[2][-1]][0]), end[1] + cost[end[2][-1]][0], end[2]) for end in ends]
    return min(closed)[2]


def _greedy_circle(cost: Sequence[Sequence[float]]) -> list[int]:
    circle = [0]
    left = list(range(1, len(cost)))
    while left:
        nearest = min(left, key=lambda member: (cost[circle[-1]][member], member))
        circle.append(nearest)
        left.remove(nearest)
    return circle


def _improved_circle(cost: Sequence[Sequence[float]], circle: list[int]) -> tuple[int, ...]:
    """Move single members to where they cost least, until that gains nothing."""
    price = _price(cost, circle)
    gained = True
    while gained:
        gained = False
        for member in list(circle[1:]):
            rest = [other for other in circle if other != member]
            tries = [[*rest[:at], member, *rest[at:]] for at in range(1, len(rest) + 1)]
            offer = min(tries, key=lambda found: _price(cost, found))
            if _price(cost, offer) < price:
                circle, price, gained = offer, _price(cost, offer), True
    return tuple(circle)
