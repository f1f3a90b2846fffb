"""Strategies: what they may depend on, what one liar can do to a robust one, and sums that hold nothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mycel.compute.train import robust
from mycel.compute.train.robust import gram
from mycel.compute.train.strategy import RULES, Sum, Weighed, combine_all, make_strategy
from mycel.protocol.errors import LocalProtocolError, UsageProblem

SEEDS = st.integers(0, 2**32 - 1)


def honest_rows(seed: int, count: int, size: int = 17) -> np.ndarray:
    """Updates around one direction, as honest clients' are."""
    draw = np.random.default_rng(seed)
    return (draw.normal(size=size) + 0.5 * draw.normal(size=(count, size))).astype(np.float32)


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.integers(3, 12), st.sampled_from(sorted(RULES)))
def test_the_order_of_updates_does_not_matter(seed: int, count: int, rule: str) -> None:
    rows = honest_rows(seed, count)
    shuffled = np.random.default_rng(seed + 1).permutation(rows)
    strategy = make_strategy(rule)
    assert strategy.combine(rows) == pytest.approx(strategy.combine(shuffled), abs=1e-3)


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.integers(3, 12), st.sampled_from(sorted(RULES)))
def test_equal_updates_come_out_as_they_are(seed: int, count: int, rule: str) -> None:
    row = honest_rows(seed, 1)
    assert make_strategy(rule).combine(np.repeat(row, count, axis=0)) == pytest.approx(row[0], abs=1e-4)


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.sampled_from(sorted(RULES)), st.floats(1.0, 1e12), st.booleans())
def test_one_liar_cannot_take_the_result_out_of_the_honest_range(
    seed: int, rule: str, loud: float, along: bool
) -> None:
    honest = honest_rows(seed, 8)
    lie = -honest.mean(axis=0) if along else np.random.default_rng(seed).normal(size=honest.shape[1])
    rows = np.concatenate([honest, (lie * loud).astype(np.float32)[None]])
    result = make_strategy(rule, {"liars": 0.2}).combine(rows).astype(np.float64)
    lengths = np.linalg.norm(honest, axis=1)
    spread = max(float(np.linalg.norm(a - b)) for a in honest for b in honest)
    if rule == "trimmed-mean":
        assert (result >= honest.min(axis=0) - 1e-3).all()
        assert (result <= honest.max(axis=0) + 1e-3).all()
    elif rule == "flag":  # it bounds lengths, and cannot tell a lie along the honest direction
        assert np.linalg.norm(result) <= 1.001 * lengths.max()
    else:
        assert min(np.linalg.norm(result - row) for row in honest) <= spread


def test_a_minority_that_agrees_does_not_move_multi_krum() -> None:
    honest = honest_rows(3, 7, size=200)
    rows = np.concatenate([honest, np.repeat(-honest.mean(axis=0, keepdims=True), 3, axis=0)])
    shares = robust.krum_shares(gram(rows), 3)
    assert shares[7:] == pytest.approx(0.0)
    assert shares[:7] == pytest.approx(1 / 7)


def test_the_geometric_median_is_where_distances_balance() -> None:
    rows = np.array([[0, 0], [4, 0], [2, 3]], np.float32)
    found = robust.geometric_median(rows, 0).astype(np.float64)
    pull = sum((row - found) / np.linalg.norm(row - found) for row in rows)
    assert np.linalg.norm(pull) < 1e-3


def test_flag_projects_the_mean_on_what_most_agree_on() -> None:
    draw = np.random.default_rng(2)
    rows = (draw.normal(size=(9, 60)) * 0.3).astype(np.float32)
    rows[:, 0] += 3.0
    mean, result = rows.mean(axis=0), robust.flag(rows, 2)
    assert result[0] > 0.9 * mean[0]
    assert np.linalg.norm(result) <= 1.001 * np.linalg.norm(mean)
    assert np.linalg.norm(result - mean) > 0.1 * np.linalg.norm(mean)


@pytest.mark.parametrize("rule", sorted(RULES))
def test_nothing_moves_where_nobody_moves(rule: str) -> None:
    assert not make_strategy(rule).combine(np.zeros((5, 9), np.float32)).any()


def test_too_many_liars_and_wrong_settings_are_named() -> None:
    with pytest.raises(LocalProtocolError, match="3 liars among 6"):
        robust.trimmed_mean(honest_rows(0, 6), 3)
    for name, tuning, words in [
        ("fedavgg", {}, "no strategy 'fedavgg'"),
        ("flag", {"liars": 0.5}, "below 0.5"),
        ("fedadam", {"beta3": 1.0}, "beta3"),
        ("fedprox", {"mu": 0.0}, "above 0"),
    ]:
        with pytest.raises(UsageProblem, match=words):
            make_strategy(name, tuning)


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.lists(st.integers(1, 1000), min_size=1, max_size=8))
def test_a_streamed_mean_is_the_mean_and_may_be_made_in_parts(seed: int, weights: list[int]) -> None:
    rows = honest_rows(seed, len(weights))
    expected = np.average(rows, axis=0, weights=weights)
    assert combine_all(make_strategy("fedavg"), list(rows), weights) == pytest.approx(expected, abs=1e-5)
    left, right, top = Sum(rows.shape[1]), Sum(rows.shape[1]), Sum(rows.shape[1])
    for n, (row, weight) in enumerate(zip(rows, weights, strict=True)):
        (left if n % 2 else right).add(row, weight)
    for part in (left, right):
        if part.weight:
            top.add(part.mean(), part.weight)
    assert top.mean() == pytest.approx(expected, abs=1e-4)


def test_a_sum_holds_two_rows_however_many_come() -> None:
    row = np.ones(1000, np.float32)
    total = Sum(len(row))
    for _ in range(12):
        total.add(row, 1.0)
    held = [value for value in vars(total).values() if isinstance(value, np.ndarray)]
    assert sum(value.nbytes for value in held) == 2 * row.nbytes
    assert total.mean() == pytest.approx(row)


def test_strategies_say_what_clients_are_told_and_what_memory_they_take() -> None:
    assert make_strategy("robust").configure(1) == {"worker_momentum": 0.9}
    assert make_strategy("flag", {"momentum": 0.0}).configure(1) == {}
    assert make_strategy("fedprox", {"mu": 0.1}).configure(1) == {"proximal_mu": 0.1}
    assert make_strategy("fedavg").memory_bytes(100, 10) == make_strategy("fedavg").memory_bytes(10, 10)
    assert make_strategy("fedavg").weigh(Weighed(30, 0.5)) == 15.0
    assert make_strategy("robust").weigh(Weighed(30, 0.5)) == 0.5


def test_fedadam_steps_by_its_moments() -> None:
    adam = make_strategy("fedadam", {"rate": 0.1})
    model, update = np.zeros(3, np.float32), np.array([1.0, -2.0, 0.0], np.float32)
    model = adam.step(model, update)
    second = 0.99 * 1e-6 + 0.01 * update**2
    assert model == pytest.approx(0.1 * 0.1 * update / (np.sqrt(second) + 1e-3), rel=1e-4)
    assert sorted(adam.state) == ["first", "second"]
