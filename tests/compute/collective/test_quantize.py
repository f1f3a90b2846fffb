"""Blocks of codes: bounded error, the same bits everywhere, no bias, and nothing lost over many steps."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mycel.compute.collective import quantize
from mycel.compute.collective.quantize import CODECS, BlockCodec, NotFinite, codec_of, feed_back

LOSS = {"int8": 0.5001, "int4": 1.0}
SIZES = (1, 7, 511, 512, 513, 70_001)


@pytest.fixture(params=["compiled", "numpy"], autouse=True)
def way(request: pytest.FixtureRequest) -> Iterator[None]:
    """All that follows holds for the compiled kernel and for numpy."""
    compiled = quantize.kernel
    if request.param == "compiled" and compiled is None:
        pytest.skip("the kernel was not built: there is no C compiler")
    quantize.kernel = compiled if request.param == "compiled" else None
    yield
    quantize.kernel = compiled


def pass_through(codec: BlockCodec, values: np.ndarray) -> np.ndarray:
    """What others get of `values`; also that the encoder knows it to the bit."""
    wire = np.full(codec.wire_bytes(values.size), 0xAA, np.uint8)
    told, out = np.empty_like(values), np.empty_like(values)
    codec.encode(values, wire, decoded=told)
    codec.check(wire, values.size)
    codec.decode(wire, out)
    assert told.tobytes() == out.tobytes()
    return out


@pytest.mark.parametrize("word", sorted(CODECS))
@pytest.mark.parametrize("items", SIZES)
def test_the_error_is_half_a_step_of_the_block_or_one_where_dithered(word: str, items: int) -> None:
    codec = CODECS[word]
    values = np.random.default_rng(items).standard_normal(items, np.float32)
    out = pass_through(codec, values)
    for begin in range(0, items, codec.block):
        block = slice(begin, begin + codec.block)
        step = np.abs(values[block]).max() / codec.top
        assert np.abs(out[block] - values[block]).max() <= LOSS[word] * step


@given(
    st.lists(st.floats(-(2.0**127), 2.0**127, width=32), min_size=1, max_size=40),
    st.sampled_from([BlockCodec(bits, block) for bits in (4, 8) for block in (256, 1024)]),
)
def test_any_finite_values_pass(values: list[float], codec: BlockCodec) -> None:
    array = np.array(values, np.float32)
    out = pass_through(codec, array)
    assert np.isfinite(out).all()
    assert np.abs(out - array).max() <= max(np.abs(array).max() / codec.top, 2.0**-118)


@pytest.mark.parametrize("word", sorted(CODECS))
@pytest.mark.parametrize("skew", ["negative", "exponential", "outliers", "tiny"])
def test_skewed_data_stays_unbiased(word: str, skew: str) -> None:
    chance = np.random.default_rng(3)
    values = {
        "negative": lambda: -np.abs(chance.standard_normal(1 << 17)) - 2.0,
        "exponential": lambda: chance.exponential(size=1 << 17),
        "outliers": lambda: np.where(chance.random(1 << 17) < 1e-4, 1e3, -chance.random(1 << 17)),
        "tiny": lambda: -chance.random(1 << 17) * 1e-30,
    }[skew]()
    values = values.astype(np.float32)
    out = pass_through(CODECS[word], values)
    untouched = np.ones(values.size, bool)
    if skew == "outliers":  # an outlier costs its own block, and no other one
        hit = np.abs(values).reshape(-1, 512).max(axis=1) > 1
        assert hit.any()
        untouched = np.repeat(~hit, 512)
    error = (out.astype(np.float64) - values)[untouched]
    assert abs(error.mean()) < 5 * error.std() / np.sqrt(error.size)
    assert error.std() < 0.5 * np.abs(values[untouched]).max() / CODECS[word].top


@pytest.mark.parametrize("word", sorted(CODECS))
def test_division_is_folded_into_the_scales(word: str) -> None:
    codec = CODECS[word]
    values = np.random.default_rng(0).standard_normal(3000, np.float32)
    whole, third = (np.empty(codec.wire_bytes(3000), np.uint8) for _ in range(2))
    out = np.empty_like(values)
    codec.encode(values, whole)
    codec.encode(values, third, divisor=3)
    codec.decode(third, out)
    scales = 4 * -(-3000 // codec.block)
    assert whole[scales:].tobytes() == third[scales:].tobytes()
    assert np.abs(out - values / 3).max() <= LOSS[word] * np.abs(values / 3).max() / codec.top


def test_feedback_loses_nothing_over_many_steps() -> None:
    codec = CODECS["int4"]
    chance = np.random.default_rng(1)
    values = -chance.exponential(size=2048).astype(np.float32)
    values[::512] *= 100  # what drowns everything else in its block
    residual, total = np.zeros_like(values), np.zeros(2048)
    for _ in range(100):
        told, given_values = np.empty_like(values), values + residual
        codec.encode(given_values, np.empty(codec.wire_bytes(2048), np.uint8), divisor=4, decoded=told)
        total += told.astype(np.float64) * 4
        feed_back(given_values, told, 4, residual)
    plain = pass_through(codec, values)
    assert np.abs(plain - values).mean() > 20 * np.abs(total / 100 - values).mean()


@pytest.mark.parametrize("strange", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [0, 512, 1029])
def test_what_is_not_finite_is_refused(strange: float, at: int) -> None:
    values = np.ones(1030, np.float32)
    values[at] = strange
    with pytest.raises(NotFinite):
        CODECS["int8"].encode(values, np.empty(CODECS["int8"].wire_bytes(1030), np.uint8))


@pytest.mark.parametrize("scale", [np.nan, np.inf, -1.0])
def test_scales_that_nobody_sends_are_refused(scale: float) -> None:
    codec = CODECS["int8"]
    wire = np.zeros(codec.wire_bytes(1024), np.uint8)
    wire[4:8] = np.array([scale], np.float32).view(np.uint8)
    with pytest.raises(NotFinite):
        codec.check(wire, 1024)


def test_unknown_codecs_are_named() -> None:
    with pytest.raises(ValueError, match="int4, int8"):
        codec_of("int2")
    with pytest.raises(ValueError, match="256"):
        BlockCodec(8, 100)
