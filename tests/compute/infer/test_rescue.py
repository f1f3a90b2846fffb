"""Which survivors take which layers when the last holder is gone: the division, claims, patience."""

from __future__ import annotations

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from mycel.compute.engine import ModelCard, Span
from mycel.compute.infer.placement import Holding
from mycel.compute.infer.rescue import ROOM_KEY, Vigil, moves_before, plan_rescue, read_rooms, weight_bytes
from mycel.compute.infer.route import missing_layers
from mycel.protocol.board import Fact
from mycel.protocol.mesh import PeerId

A, B, C, D = (PeerId(name) for name in "abcd")
LAYER, EDGE = 100, 50


def card(n_layers: int) -> ModelCard:
    return ModelCard("m", "f", "X", n_layers, 8, 16, 64, "float32", LAYER, EDGE, 4, (), True, True)


def held(peer: PeerId, start: int, end: int, state: str = "ready") -> Holding:
    return Holding(peer, Span(start, end), state)


def test_the_peer_with_most_room_takes_what_fits_and_the_next_the_rest() -> None:
    holdings = [held(A, 0, 2), held(B, 2, 3), held(C, 7, 8)]  # 3:7 are missing
    rooms = {A: 2 * LAYER, B: 3 * LAYER, C: LAYER}
    shares = {peer: plan_rescue(card(8), holdings, rooms, peer) for peer in (A, B, C)}
    assert shares == {A: Span(6, 7), B: Span(3, 6), C: None}


def test_two_gaps_go_to_two_peers_where_one_has_no_room_for_both() -> None:
    holdings = [held(A, 1, 3), held(B, 4, 5)]
    rooms = {A: LAYER + EDGE, B: LAYER + EDGE}
    shares = [plan_rescue(card(6), holdings, rooms, peer) for peer in (A, B)]
    assert shares == [Span(0, 1), Span(3, 4)]  # 5:6 finds no room: its edge takes memory too
    assert plan_rescue(card(6), holdings, {A: 10**6, B: 10**6}, A) == Span(0, 1)
    assert plan_rescue(card(6), holdings, {A: 10**6, B: 10**6 + 1}, A) == Span(3, 4)


def test_edges_take_room() -> None:
    holdings = [held(A, 1, 3)]
    assert plan_rescue(card(4), holdings, {A: LAYER + EDGE - 1}, A) is None
    assert plan_rescue(card(4), holdings, {A: LAYER + EDGE}, A) == Span(0, 1)


def test_equal_peers_are_told_apart_by_their_ids() -> None:
    holdings = [held(A, 0, 1), held(B, 2, 3)]
    rooms = {A: LAYER, B: LAYER}
    assert plan_rescue(card(3), holdings, rooms, A) == Span(1, 2)
    assert plan_rescue(card(3), holdings, rooms, B) is None


def test_who_holds_nothing_of_the_model_or_has_no_room_takes_nothing() -> None:
    holdings = [held(A, 0, 1)]
    assert plan_rescue(card(2), holdings, {B: 10**6}, B) is None
    assert plan_rescue(card(2), holdings, {}, A) is None
    assert plan_rescue(card(2), [], {A: 10**6}, A) is None


def test_a_claim_of_a_lower_id_stands_and_costs_it_room() -> None:
    holdings = [held(B, 0, 1), held(C, 4, 5)]
    rooms = {B: 2 * LAYER, C: 10 * LAYER}
    assert plan_rescue(card(5), holdings, rooms, C) == Span(1, 4)
    claimed = [*holdings, held(B, 1, 3, "claiming")]
    assert plan_rescue(card(5), claimed, rooms, C) == Span(3, 4)
    assert plan_rescue(card(5), [*holdings, held(D, 1, 4, "claiming")], rooms, C) == Span(1, 4)


def test_a_leaving_peer_holds_nothing_any_more() -> None:
    holdings = [held(A, 0, 1), held(B, 1, 2, "leaving")]
    assert plan_rescue(card(2), holdings, {A: 10**6, B: 10**6}, A) == Span(1, 2)
    assert plan_rescue(card(2), holdings, {A: 10**6, B: 10**6}, B) is None


def test_who_holds_what_others_hold_moves_where_layers_are_missing_the_highest_id_first() -> None:
    holdings = [held(A, 0, 2), held(B, 0, 2), held(C, 0, 2), held(D, 4, 6)]
    assert [moves_before(card(6), holdings, peer) for peer in (A, B, C, D)] == [2, 1, 0, None]
    assert moves_before(card(6), [*holdings, held(PeerId("e"), 2, 4)], C) is None  # nothing is missing
    assert moves_before(card(6), [*holdings, held(PeerId("e"), 2, 4, "claiming")], C) is None
    parts = [held(A, 0, 1), held(B, 1, 2), held(C, 0, 2)]
    assert [moves_before(card(3), parts, peer) for peer in (A, B, C)] == [2, 1, 0]
    assert moves_before(card(3), [held(A, 0, 2), held(B, 0, 2, "leaving")], A) is None
    assert moves_before(card(3), [held(A, 0, 2), held(B, 0, 2, "claiming")], A) is None


PEERS = [PeerId(f"p{index}") for index in range(6)]


@settings(max_examples=300)
@given(
    st.integers(1, 12),
    st.lists(st.tuples(st.sampled_from(PEERS), st.integers(0, 11), st.integers(1, 6)), max_size=8),
    st.dictionaries(st.sampled_from(PEERS), st.integers(0, 1500)),
)
def test_shares_of_one_view_are_disjoint_fit_and_leave_nothing_that_would_fit(
    n_layers: int, spans: list[tuple[PeerId, int, int]], rooms: dict[PeerId, int]
) -> None:
    model = card(n_layers)
    holdings = [held(p, start, min(start + size, n_layers)) for p, start, size in spans if start < n_layers]
    left = dict(rooms)
    while True:  # everybody takes its share, again and again, as facts follow
        shares = {peer: plan_rescue(model, holdings, left, peer) for peer in PEERS}
        taken = [(peer, span) for peer, span in shares.items() if span is not None]
        covered = [layer for _, span in taken for layer in range(span.start, span.end)]
        missing = missing_layers(n_layers, holdings)
        assert len(covered) == len(set(covered)), "two take the same layer"
        assert all(any(span in gap for gap in missing) for _, span in taken), "a layer was not missing"
        for peer, span in taken:
            left[peer] -= weight_bytes(model, span)
            assert left[peer] >= 0, "more than fits"
            assert any(one.peer == peer for one in holdings), "a stranger to the model"
            holdings = [*holdings, Holding(peer, span, "ready")]
        if not taken:
            break
    for gap in missing_layers(n_layers, holdings):
        for layer in range(gap.start, gap.end):
            cost = weight_bytes(model, Span(layer, layer + 1))
            assert all(left.get(one.peer, 0) < cost for one in holdings), "somebody had room left"


@settings(max_examples=200)
@given(
    st.integers(2, 10),
    st.lists(st.tuples(st.sampled_from(PEERS), st.integers(0, 9)), min_size=1, max_size=6),
    st.dictionaries(st.sampled_from(PEERS), st.integers(0, 1200), min_size=1),
    st.randoms(use_true_random=False),
)
def test_claims_of_peers_that_look_at_any_moment_settle_without_overlap(
    n_layers: int, owned: list[tuple[PeerId, int]], rooms: dict[PeerId, int], rng: object
) -> None:
    """Each claims, looks again later, and loads only a claim that still is its plan (as `Served` does)."""
    model = card(n_layers)
    ready = [held(peer, layer, layer + 1) for peer, layer in owned if layer < n_layers]
    claims: dict[PeerId, Span] = {}
    loading: dict[PeerId, Span] = {}
    looks = 0
    while looks < 200:
        looks += 1
        peer = rng.choice(PEERS)  # type: ignore[attr-defined]
        if peer in loading:
            continue
        view = [
            *ready,
            *(Holding(one, span, "loading") for one, span in loading.items()),
            *(Holding(one, span, "claiming") for one, span in claims.items() if one != peer),
        ]
        plan = plan_rescue(model, view, rooms, peer)
        if plan is None:
            claims.pop(peer, None)
        elif claims.get(peer) == plan:
            loading[peer] = claims.pop(peer)
        else:
            claims[peer] = plan
    layers = [layer for span in loading.values() for layer in range(span.start, span.end)]
    # A peer may claim late what a lower id is about to load: never two loads of one layer by the same facts.
    assert len(layers) == len(set(layers))


def test_a_model_that_was_never_whole_is_left_alone() -> None:
    vigil = Vigil(1.0)
    assert not any(vigil.look([Span(1, 2)], now) for now in (0.0, 5.0, 100.0))


def test_layers_are_due_when_they_were_missing_for_long_enough() -> None:
    vigil = Vigil(1.0)
    assert not vigil.look([], 0.0)
    assert not vigil.look([Span(1, 2)], 10.0)
    assert not vigil.look([Span(1, 2)], 10.9)
    assert vigil.look([Span(1, 2)], 11.0)
    assert not vigil.look([], 11.5)  # somebody came
    assert not vigil.look([Span(0, 1)], 12.0)
    assert vigil.look([Span(0, 1)], 13.0)


class Said:
    """A board with facts on it."""

    def __init__(self, *facts: Fact) -> None:
        self._facts = facts

    def facts(self, prefix: str) -> tuple[Fact, ...]:
        return tuple(fact for fact in self._facts if fact.key.startswith(prefix))


def test_rooms_that_make_no_sense_are_none() -> None:
    values = {A: 4096, B: -1, C: "many", D: None}
    facts = [Fact(peer, ROOM_KEY, msgspec.msgpack.encode(value)) for peer, value in values.items()]
    said = Said(*facts, Fact(B, "roomy", msgspec.msgpack.encode(1)), Fact(C, ROOM_KEY, b""))
    assert read_rooms(said) == {A: 4096}  # type: ignore[arg-type]
