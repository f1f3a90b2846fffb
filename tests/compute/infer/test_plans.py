"""Routes, placements, batches and paces: what is decided from what is known."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mycel.compute.engine import ModelCard, Span
from mycel.compute.infer.batch import Candidate, plan_step
from mycel.compute.infer.pace import Pace, Timing
from mycel.compute.infer.placement import Holding, Placement, plan_placement
from mycel.compute.infer.request import RouteStage
from mycel.compute.infer.route import Offer, missing_layers, plan_repair, plan_route
from mycel.protocol.mesh import PeerId

A, B, C, D, E, ME = (PeerId(name) for name in "abcdem")


def offer(peer: PeerId, start: int, end: int, **more: float) -> Offer:
    return Offer(peer, Span(start, end), **more)  # type: ignore[arg-type]


def near(one: PeerId, other: PeerId) -> float:
    return 0.0 if one == other else 0.001


def spans(route: tuple[RouteStage, ...] | None) -> list[tuple[str, int, int]]:
    assert route is not None
    return [(stage.peer, stage.span.start, stage.span.end) for stage in route]


# --- routes


def test_a_route_covers_every_layer_once() -> None:
    route = plan_route(6, [offer(A, 0, 2), offer(B, 2, 4), offer(C, 4, 6)], ME, near)
    assert spans(route) == [(A, 0, 2), (B, 2, 4), (C, 4, 6)]


def test_overlapping_holders_run_parts_of_what_they_hold() -> None:
    route = plan_route(6, [offer(A, 0, 4), offer(B, 3, 6)], ME, near)
    assert spans(route) in ([(A, 0, 3), (B, 3, 6)], [(A, 0, 4), (B, 4, 6)])


def test_the_faster_of_two_holders_is_taken() -> None:
    fast, slow = offer(A, 0, 4, layer_row_s=0.001), offer(B, 0, 4, layer_row_s=0.01)
    assert spans(plan_route(4, [slow, fast], ME, near)) == [(A, 0, 4)]
    busy = offer(A, 0, 4, layer_row_s=0.001, sessions=200)
    assert spans(plan_route(4, [slow, busy], ME, near)) == [(B, 0, 4)]


def test_a_near_pair_beats_a_far_single_where_it_pays() -> None:
    def rtt(one: PeerId, other: PeerId) -> float:
        return 0.5 if A in (one, other) else 0.001

    offers = [offer(A, 0, 4), offer(B, 0, 2), offer(C, 2, 4)]
    assert spans(plan_route(4, offers, ME, rtt)) == [(B, 0, 2), (C, 2, 4)]


def test_a_spare_is_left_alone_while_others_hold_the_layers() -> None:
    offers = [offer(A, 0, 2), offer(B, 2, 4), offer(C, 0, 4, standby=True)]
    assert spans(plan_route(4, offers, ME, near)) == [(A, 0, 2), (B, 2, 4)]
    assert spans(plan_route(4, offers, ME, near, avoid=[A])) == [(C, 0, 4)]


def test_no_stage_is_on_a_route_twice() -> None:
    # A holds all layers, the last ones slowly; the cheapest walk would come back to it.
    offers = [offer(A, 0, 3, layer_row_s=0.1), offer(B, 1, 2)]
    assert spans(plan_route(3, offers, ME, near)) == [(A, 0, 3)]
    assert spans(plan_route(3, [*offers, offer(C, 2, 3)], ME, near)) == [(A, 0, 1), (B, 1, 2), (C, 2, 3)]


def test_a_peer_with_two_stages_may_be_there_with_both() -> None:
    offers = [offer(A, 0, 1), offer(B, 1, 2), offer(A, 2, 3)]
    assert spans(plan_route(3, offers, ME, near)) == [(A, 0, 1), (B, 1, 2), (A, 2, 3)]
    assert spans(plan_route(3, [offer(A, 1, 3), offer(A, 0, 1)], ME, near)) == [(A, 0, 1), (A, 1, 3)]


def test_equal_views_give_equal_routes() -> None:
    offers = [offer(C, 0, 4), offer(A, 0, 4), offer(B, 0, 4)]
    for view in (offers, offers[::-1]):
        assert spans(plan_route(4, view, ME, near)) == [(A, 0, 4)]


def test_missing_layers_are_named() -> None:
    assert missing_layers(8, [offer(A, 0, 2), offer(B, 4, 6)]) == (Span(2, 4), Span(6, 8))
    assert missing_layers(8, [offer(A, 0, 8)]) == ()
    assert plan_route(8, [offer(A, 0, 2), offer(B, 4, 8)], ME, near) is None


ROUTE = (RouteStage(A, Span(0, 2)), RouteStage(B, Span(2, 4)), RouteStage(C, Span(4, 6)))


def test_a_repair_keeps_the_survivors() -> None:
    offers = [offer(A, 0, 2), offer(C, 4, 6), offer(D, 0, 6)]
    assert spans(plan_repair(ROUTE, offers, ME, near, [B])) == [(A, 0, 2), (D, 2, 4), (C, 4, 6)]
    assert spans(plan_repair(ROUTE, offers, ME, near, [B, C])) == [(A, 0, 2), (D, 2, 6)]
    assert spans(plan_repair(ROUTE, offers, ME, near, [A, C])) == [(D, 0, 6)]  # one stage, one span


def test_a_survivor_that_took_layers_beside_its_own_keeps_both() -> None:
    for start, end in ((0, 2), (4, 6)):  # before and behind what is missing
        route = [stage for stage in ROUTE if stage.span.start != start] + [RouteStage(D, Span(start, end))]
        held = [offer(stage.peer, stage.span.start, stage.span.end) for stage in route]
        repaired = plan_repair(
            sorted(route, key=lambda stage: stage.span), [*held, offer(D, 2, 4)], ME, near, [B]
        )
        assert (D, 2, 4) in spans(repaired)
        assert (D, start, end) in spans(repaired)
        assert len(spans(repaired)) == 3


def test_two_gaps_are_filled_by_two_peers() -> None:
    offers = [offer(D, 0, 6), offer(E, 0, 6)]
    repaired = spans(plan_repair(ROUTE, offers, ME, near, [A, C]))
    assert [stage[1:] for stage in repaired] == [(0, 2), (2, 4), (4, 6)]
    assert {repaired[0][0], repaired[2][0]} == {D, E}
    assert repaired[1][0] == B


def test_a_survivor_takes_more_layers_where_nobody_else_can() -> None:
    offers = [offer(A, 0, 4), offer(C, 4, 6)]
    assert spans(plan_repair(ROUTE, offers, ME, near, [B])) == [(A, 0, 4), (C, 4, 6)]
    assert plan_repair(ROUTE, [offer(A, 0, 2), offer(C, 4, 6)], ME, near, [B]) is None


@given(
    st.integers(1, 8),
    st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(0, 7), st.integers(1, 8)), max_size=8),
)
def test_any_route_is_whole_and_within_what_is_held(n: int, held: list[tuple[str, int, int]]) -> None:
    unique = {peer: (start, min(start + size, n)) for peer, start, size in held if start < n}
    offers = [offer(PeerId(peer), *span) for peer, span in unique.items()]
    route = plan_route(n, offers, ME, near)
    if route is None:
        return
    assert route[0].span.start == 0
    assert route[-1].span.end == n
    assert all(one.span.end == other.span.start for one, other in pairwise(route))
    assert all(stage.span in Span(*unique[stage.peer]) for stage in route)
    assert len({stage.peer for stage in route}) == len(route)


# --- placement


def card(n_layers: int = 12) -> ModelCard:
    return ModelCard("m", "f", "X", n_layers, 8, 16, 64, "float32", 100, 50, 4, (), True, True)


def test_peers_cover_the_model_in_balanced_spans_and_then_spare() -> None:
    holdings: list[Holding] = []
    taken = []
    for peer in (D, B, C, A):
        placed = plan_placement(card(), holdings, peer, 10**6, stages=3)
        assert placed is not None
        taken.append(placed)
        holdings.append(Holding(peer, placed.span, "ready", placed.standby))
    assert taken == [
        Placement(Span(0, 4), False),
        Placement(Span(4, 8), False),
        Placement(Span(8, 12), False),
        Placement(Span(0, 12), True),
    ]


def test_memory_bounds_a_span_and_sets_the_number_of_stages() -> None:
    assert plan_placement(card(), [], A, 50 + 12 * 100) == Placement(Span(0, 12), False)
    assert plan_placement(card(), [], A, 50 + 5 * 100) == Placement(Span(0, 4), False)  # three stages of four
    assert plan_placement(card(), [], A, 50 + 3 * 100, stages=2) == Placement(Span(0, 3), False)
    assert plan_placement(card(), [], A, 149) is None


def test_a_gap_in_the_middle_is_filled_first() -> None:
    holdings = [Holding(A, Span(0, 4), "ready"), Holding(B, Span(8, 12), "loading")]
    assert plan_placement(card(), holdings, C, 10**6) == Placement(Span(4, 8), False)
    leaving = [*holdings, Holding(D, Span(4, 8), "leaving")]
    assert plan_placement(card(), leaving, C, 10**6) == Placement(Span(4, 8), False)


def test_a_small_spare_takes_what_the_fewest_hold() -> None:
    holdings = [Holding(A, Span(0, 12), "ready"), Holding(B, Span(0, 6), "ready")]
    assert plan_placement(card(), holdings, C, 50 + 300) == Placement(Span(6, 9), True)


def test_of_two_claims_the_lower_id_stands() -> None:
    claims = [Holding(A, Span(0, 4), "claiming"), Holding(B, Span(0, 4), "claiming")]
    assert plan_placement(card(), claims, A, 10**6, stages=3) == Placement(Span(0, 4), False)
    assert plan_placement(card(), claims, B, 10**6, stages=3) == Placement(Span(4, 8), False)


# --- batches


def test_decodes_go_together_and_before_prefills() -> None:
    waiting = [Candidate("p", 100, 0.0), Candidate("x", 1, 2.0), Candidate("y", 1, 1.0)]
    assert plan_step(waiting, decoded_last=False) == ["y", "x"]
    assert plan_step(waiting, decoded_last=True) == ["p"]
    assert plan_step([waiting[0]], decoded_last=True) == ["p"]
    assert plan_step([waiting[1]], decoded_last=True) == ["x"]
    assert plan_step([], decoded_last=True) == []


def test_prefills_are_bounded_in_rows_but_never_starve() -> None:
    waiting = [Candidate("a", 300, 1.0), Candidate("b", 300, 0.0), Candidate("c", 200, 2.0)]
    assert plan_step(waiting, decoded_last=True, rows_max=512) == ["b"]
    assert plan_step(waiting, decoded_last=True, rows_max=600) == ["b", "a"]
    assert plan_step([Candidate("huge", 5000, 0.0)], decoded_last=True) == ["huge"]


def test_a_model_that_cannot_batch_steps_one_at_a_time() -> None:
    waiting = [Candidate("a", 1, 1.0), Candidate("b", 1, 0.0), Candidate("p", 9, 0.0)]
    assert plan_step(waiting, decoded_last=False, batchable=False) == ["b"]
    assert plan_step(waiting, decoded_last=True, batchable=False) == ["p"]


@given(st.lists(st.tuples(st.integers(1, 600), st.floats(0, 9)), min_size=1, max_size=100), st.booleans())
def test_every_session_gets_its_turn(waiting: list[tuple[int, float]], decoded: bool) -> None:
    left = {str(n): Candidate(str(n), rows, since) for n, (rows, since) in enumerate(waiting)}
    for _ in range(len(waiting) * 2):
        if not left:
            break
        step = plan_step(list(left.values()), decoded_last=decoded)
        assert step
        assert len(set(step)) == len(step)
        rows = [left.pop(name).rows for name in step]
        decoded = rows[0] == 1
        assert all(r == 1 for r in rows) or all(r > 1 for r in rows)
    assert not left


# --- pace


def test_a_steps_deadline_follows_the_pace_within_floor_and_cap() -> None:
    timing = Timing()
    pace = Pace(timing, 100.0)
    assert pace.deadline(0.0) == 101.0  # no token yet
    assert pace.deadline(0.1) == pytest.approx(101.4)
    for n in range(50):
        pace.on_token(101 + 0.01 * n)
    assert pace.deadline(0.0) == pytest.approx(101.49 + timing.step_floor_s)
    for n in range(50):
        pace.on_token(102 + 0.1 * n)
    assert pace.deadline(0.0) == pytest.approx(106.9 + 0.4, abs=0.05)
    for n in range(50):
        pace.on_token(110 + 3.0 * n)
    assert pace.deadline(0.0) == 257 + timing.step_cap_s


def test_a_pause_is_not_a_pace() -> None:
    pace = Pace(Timing(step_floor_s=0.0), 0.0)
    pace.on_token(1.0)
    pace.on_token(1.1)
    pace.restart(1000.0)
    pace.on_token(1000.1)
    pace.on_token(1000.2)
    assert pace.deadline(0.0) == pytest.approx(1000.2 + 0.4)
    assert math.isfinite(pace.deadline(10.0))
