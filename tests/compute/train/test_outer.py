"""The outer optimizer: Nesterov's momentum, the same bits everywhere, and what late averages count."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mycel.compute.train.outer import Outer, OuterOptions, norm, staleness
from mycel.protocol.errors import LocalProtocolError


def rows(seed, count, size):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=size).astype(np.float32) for _ in range(count)]


def test_it_is_nesterov_momentum_as_torch_knows_it():
    weights, *deltas = rows(1, 6, 100_000)
    outer = Outer(weights, OuterOptions(rate=0.7, momentum=0.9))
    theirs = torch.nn.Parameter(torch.from_numpy(weights.copy()))
    sgd = torch.optim.SGD([theirs], lr=0.7, momentum=0.9, nesterov=True)
    for delta in deltas:
        outer.step(delta)
        theirs.grad = torch.from_numpy(delta.copy())
        sgd.step()
    np.testing.assert_allclose(outer.weights, theirs.detach().numpy(), rtol=1e-4, atol=1e-5)


def test_what_is_not_finite_or_of_another_shape_moves_nothing():
    weights, delta = rows(2, 2, 1000)
    outer = Outer(weights, OuterOptions())
    for bad in (np.where(np.arange(1000) == 700, np.float32("nan"), delta), delta[:-1]):
        with pytest.raises(LocalProtocolError):
            outer.step(bad)
    assert np.array_equal(outer.weights, weights)
    assert not outer.momentum.any()


def test_clipping_bounds_the_momentum_by_the_average():
    weights, delta = rows(3, 2, 5000)
    outer = Outer(weights, OuterOptions(clip=2.0))
    for _ in range(20):
        outer.step(delta)
        assert norm(outer.momentum) <= 2.0 * norm(delta) * (1 + 1e-5)
    free = Outer(weights, OuterOptions())
    for _ in range(20):
        free.step(delta)
    assert norm(free.momentum) > 5 * norm(delta)


@pytest.mark.parametrize("bad", [{"rate": 0.0}, {"momentum": 1.0}, {"clip": -1.0}, {"penalty": -0.5}])
def test_settings_that_cannot_be_are_refused(bad):
    with pytest.raises(LocalProtocolError):
        OuterOptions(**bad)


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=300))
def test_a_length_is_euclids(numbers):
    row = np.array(numbers, np.float32)
    assert norm(row) == pytest.approx(math.sqrt(math.fsum(float(x) ** 2 for x in row)), rel=1e-9, abs=1e-30)


def test_a_length_does_not_depend_on_where_the_row_lies():
    (row,) = rows(4, 1, 200_001)
    apart = np.zeros(400_002, np.float32)
    apart[1::2] = row
    assert norm(row) == norm(apart[1::2]) == norm(np.concatenate([row, np.zeros(7, np.float32)]))


@given(st.floats(0, 100), st.floats(0.01, 100), st.floats(0, 4))
def test_a_late_average_counts_less_the_further_the_weights_went(moved, length, penalty):
    weight = staleness(moved, length, penalty)
    assert 0 < weight <= 1
    assert staleness(moved + 1, length, penalty) <= weight
    if moved <= length or penalty == 0:
        assert weight == 1
