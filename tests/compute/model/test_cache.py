"""Our cache layers against transformers' own: the same rows out, whatever goes in."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from mycel.compute.engine import ModelUnsupported, Span
from mycel.compute.model.cache import (
    REWIND_ROWS,
    GrowingLayer,
    LayerPlan,
    RowShape,
    SessionCache,
    WindowLayer,
    grown_capacity,
)

FULL = LayerPlan("full_attention", None, ())


def rows(count: int, start: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values that tell their position: [1, 2, count, 3]."""
    key = torch.arange(start, start + count, dtype=torch.float32)[None, None, :, None].repeat(1, 2, 1, 3)
    return key, -key


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 90), max_size=20))
def test_growing_layer_gives_what_transformers_gives(counts: list[int]) -> None:
    ours, theirs, start = GrowingLayer(), DynamicLayer(), 0
    for count in counts:
        key, value = rows(count, start)
        assert ours.get_mask_sizes(count) == theirs.get_mask_sizes(count)
        got, wanted = ours.update(key, value), theirs.update(key, value)
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
        assert ours.get_seq_length() == theirs.get_seq_length()
        start += count


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 40), st.lists(st.integers(1, 90), max_size=30))
def test_window_layer_gives_what_transformers_gives(window: int, counts: list[int]) -> None:
    ours, theirs, start = WindowLayer(window), DynamicSlidingWindowLayer(window), 0
    theirs.record_past = window == 1  # `[-0:]` keeps all: transformers' slice does not know a window of one
    for count in counts:
        key, value = rows(count, start)
        assert ours.get_mask_sizes(count) == theirs.get_mask_sizes(count)
        got, wanted = ours.update(key, value), theirs.update(key, value)
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
        assert ours.get_seq_length() == theirs.get_seq_length()
        start += count


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 40), st.lists(st.tuples(st.integers(1, 30), st.integers(0, REWIND_ROWS)), max_size=20))
def test_window_layer_rewinds_to_what_was_there(window: int, moves: list[tuple[int, int]]) -> None:
    layer, length, furthest = WindowLayer(window), 0, 0
    for count, back in moves:
        key, value = rows(count, length)
        seen, _ = layer.update(key, value)
        length += count
        furthest = max(furthest, length)
        first = max(0, length - count - (window - 1))
        assert seen[0, 0, :, 0].tolist() == list(range(first, length))
        back = min(back, length)
        if layer.can_rewind(back):
            layer.rewind(back)
            length -= back
        else:
            gone = furthest - length + back  # what was rewound before counts too
            assert gone > REWIND_ROWS - count, "a rewind within the promised rows must be possible"


def test_a_windows_memory_is_bounded() -> None:
    layer, length = WindowLayer(32), 0
    for count in [500, *[1] * 1000]:
        layer.update(*rows(count, length))
        length += count
        if count == 1:
            assert layer.capacity <= 31 + REWIND_ROWS + 64


@given(st.integers(0, 5000), st.integers(1, 5000))
def test_capacity_grows_by_steps(held: int, needed: int) -> None:
    capacity = grown_capacity(held, needed)
    assert capacity >= needed
    if needed <= held:
        assert capacity == held
    else:
        assert needed + 64 <= capacity <= needed * 9 // 8 + 64 + 8


def test_reserving_says_beforehand_what_it_takes() -> None:
    shape = RowShape((2, 3), (2, 3), torch.float32, torch.device("cpu"))
    window = LayerPlan("sliding_attention", 8, (("sliding_window", 8),))
    cache = SessionCache([FULL, window, FULL], Span(0, 2))
    for count in (5, 1, 200, 1, 90):
        said = cache.bytes_after(count, [shape, shape])
        cache.reserve(count, [shape, shape])
        assert cache.nbytes() == said
        before = [layer.capacity for layer in cache.own]
        for layer in cache.own:
            layer.update(*rows(count, cache.length))
        cache.length += count
        assert [layer.capacity for layer in cache.own] == before, "update grew what reserve had not"


def test_a_middle_stage_counts_its_own_length() -> None:
    cache = SessionCache([FULL] * 4, Span(2, 3))
    cache.own_layer(2).update(*rows(5, 0))
    cache.length = 5
    assert cache.get_seq_length() == 5
    assert cache.get_mask_sizes(3, 0) == (8, 0)
    assert cache.get_mask_sizes(3, 2) == (8, 0)
    assert [layer is cache.own_layer(2) for layer in cache.own] == [True]


def test_a_rewind_that_one_layer_refuses_changes_none() -> None:
    window = LayerPlan("sliding_attention", 4, (("sliding_window", 4),))
    cache = SessionCache([FULL, window], Span(0, 2))
    for start in range(0, 400, 40):
        for layer in cache.own:
            layer.update(*rows(40, start))
        cache.length += 40
    with pytest.raises(ModelUnsupported, match="layer 1 has a sliding window"):
        cache.rewind(10)
    assert [layer.get_seq_length() for layer in cache.own] == [400, 400]
    cache.rewind(390)
    assert [layer.get_seq_length() for layer in cache.own] == [390, 390]
