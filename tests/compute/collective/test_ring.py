"""The schedule by itself: everything arrives, each item is summed in one place and order, rings are best."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mycel.compute.collective.ring import (
    SUM,
    Course,
    Cut,
    Kind,
    Piece,
    Ring,
    Star,
    best_circle,
    worthwhile_circle,
)


def play(courses: list[Course], seed: int) -> list[list[tuple[int, Piece]]]:
    """Deliver everything in an order of chance; returns what each member got, as (from, piece)."""
    chance = random.Random(seed)
    under_way = [(place, send) for place, course in enumerate(courses) for send in course.first()]
    got: list[list[tuple[int, Piece]]] = [[] for _ in courses]
    while under_way:
        sender, send = under_way.pop(chance.randrange(len(under_way)))
        assert courses[send.to].expects(sender, send.piece)
        got[send.to].append((sender, send.piece))
        under_way += [(send.to, following) for following in courses[send.to].after(send.piece)]
    return got


@given(
    members=st.integers(2, 7),
    items=st.integers(0, 60),
    chunk=st.integers(1, 9),
    seed=st.integers(0, 99),
    kind=st.sampled_from(list(Kind)),
)
def test_every_piece_comes_exactly_once(members: int, items: int, chunk: int, seed: int, kind: Kind) -> None:
    short, longer = divmod(items, members)
    sizes = [short + (place < longer) for place in range(members)]
    ends = list(itertools.accumulate(sizes))
    cut = Cut(tuple((end - size, end) for size, end in zip(sizes, ends, strict=True)), chunk)
    courses: list[Course] = [Ring(kind, cut, place) for place in range(members)]
    got = play(courses, seed)
    for place, course in enumerate(courses):
        pieces = [piece for _, piece in got[place]]
        assert len(pieces) == len(set(pieces)) == course.expected
        covered = {(piece.part, piece.chunk) for piece in pieces if piece.phase != SUM}
        if kind in (Kind.REDUCE, Kind.GATHER, Kind.BROADCAST):
            others = [part for part in range(members) if part != place]
            assert covered == {(part, c) for part in others for c in range(cut.chunks(part))}
        if kind in (Kind.REDUCE, Kind.SCATTER):  # its own part is whole here, and only here
            assert sum(piece.phase == SUM and piece.part == place for piece in pieces) == cut.chunks(place)


def test_a_part_is_summed_around_the_ring_and_ends_at_its_owner() -> None:
    cut = Cut(((0, 1), (1, 2), (2, 3), (3, 4)), 1)
    courses: list[Course] = [Ring(Kind.REDUCE, cut, place) for place in range(4)]
    got = play(courses, 1)
    ways: dict[int, dict[int, int]] = {part: {} for part in range(4)}
    for place in range(4):
        for sender, piece in got[place]:
            if piece.phase == SUM:
                ways[piece.part][sender] = place
    for part in range(4):
        at = (part + 1) % 4
        way = [at]
        while at in ways[part]:
            at = ways[part][at]
            way.append(at)
        assert way == [(part + step) % 4 for step in (1, 2, 3, 4)]


@given(members=st.integers(2, 6), seed=st.integers(0, 99))
def test_star_collects_and_tells(members: int, seed: int) -> None:
    got = play([Star(members, place) for place in range(members)], seed)
    assert {piece.part for _, piece in got[0]} == set(range(1, members))
    assert all(len(got[place]) == 1 for place in range(1, members))


@pytest.mark.parametrize(
    ("place", "piece"),
    [
        (2, Piece(SUM, 1, 0)),  # not the member before
        (0, Piece(SUM, 0, 0)),  # a part that begins here
        (0, Piece(SUM, 1, 5)),  # no such chunk
        (0, Piece(SUM, 9, 0)),  # no such part
        (0, Piece(7, 1, 0)),  # no such phase
        (0, Piece(1, 1, 0)),  # this member's own result
    ],
)
def test_what_is_not_due_is_not_expected(place: int, piece: Piece) -> None:
    ring = Ring(Kind.REDUCE, Cut(((0, 4), (4, 8), (8, 12)), 2), 1)
    assert not ring.expects(place, piece)
    assert ring.expects(0, Piece(SUM, 1, 1))


@given(st.integers(2, 6), st.randoms(use_true_random=False))
def test_the_ring_has_the_fastest_slowest_line(members: int, chance: random.Random) -> None:
    cost = [[chance.choice([1.0, 2.0, 5.0, 9.0]) for _ in range(members)] for _ in range(members)]

    def price(circle: tuple[int, ...]) -> tuple[float, float]:
        lines = [cost[a][b] for a, b in zip(circle, circle[1:] + circle[:1], strict=True)]
        return max(lines), sum(lines)

    best = min(price((0, *rest)) for rest in itertools.permutations(range(1, members)))
    assert price(best_circle(cost)) == best


def test_large_rings_avoid_a_slow_line_too() -> None:
    members = 14
    cost = [[1.0] * members for _ in range(members)]
    for other in range(members):  # one member hears well from a single other one
        if other != 7:
            cost[other][3] = 50.0
    circle = best_circle(cost)
    assert sorted(circle) == list(range(members))
    assert circle[circle.index(3) - 1] == 7


def test_the_ring_changes_only_where_that_doubles_its_pace() -> None:
    rates = [
        [0.0, 100.0, 90.0, 80.0],
        [95.0, 0.0, 60.0, 99.0],
        [99.0, 70.0, 0.0, 85.0],
        [99.0, 99.0, 88.0, 0.0],
    ]
    assert worthwhile_circle(rates) == (0, 1, 2, 3)
    rates[1][2] = 20.0
    circle = worthwhile_circle(rates)
    assert circle[(circle.index(1) + 1) % 4] != 2
    assert worthwhile_circle([[0.0] * 3] * 3) == (0, 1, 2)


def test_a_line_that_was_not_measured_is_tried_where_one_is_slow() -> None:
    rates = [[0.0, 1.0, 0.0], [0.0, 0.0, 50.0], [50.0, 0.0, 0.0]]
    assert worthwhile_circle(rates) == (0, 2, 1)
