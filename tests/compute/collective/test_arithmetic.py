"""Items of every word put together, against exact arithmetic and against torch's own bfloat16."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mycel.compute.collective.arithmetic import (
    finish,
    is_finite,
    is_workable,
    narrow,
    put_together,
    storage,
    widen,
)
from mycel.protocol.tensor import ITEM_BYTES


def test_bfloat16_is_torchs() -> None:
    bits = np.random.default_rng(0).integers(0, 1 << 32, 200_000, np.uint32)
    values = bits.view(np.float32)
    narrowed = np.empty(values.size, np.uint16)
    narrow("bfloat16", values, narrowed)
    theirs = torch.from_numpy(values.copy()).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    real = ~np.isnan(values)
    assert np.array_equal(narrowed[real], theirs[real])
    assert np.isnan(widen("bfloat16", narrowed[~real])).all()
    exact = torch.from_numpy(theirs.view(np.int16).copy()).view(torch.bfloat16).float().numpy()
    assert np.array_equal(widen("bfloat16", theirs)[real], exact[real])


@pytest.mark.parametrize("word", sorted(ITEM_BYTES))
@pytest.mark.parametrize("op", ["sum", "avg", "min", "max"])
def test_every_word_and_operation(word: str, op: str) -> None:
    if word == "bool":
        assert not is_workable(word, op)
        return
    assert is_workable(word, op)
    low, high = (0, 40) if word == "uint8" else (-40, 40)
    numbers = np.random.default_rng(5).integers(low, high, (3, 1000))
    arrays = [np.empty(1000, storage(word)) for _ in numbers]
    for array, row in zip(arrays, numbers, strict=True):
        if word == "bfloat16":
            narrow(word, row.astype(np.float32), array)
        else:
            array[...] = row
    out = arrays[0]
    for array in arrays[1:]:
        put_together(word, op, array, out, out)
    finish(word, op, 3, out)
    exact = {"sum": numbers.sum(0), "avg": numbers.sum(0) / 3, "min": numbers.min(0), "max": numbers.max(0)}[
        op
    ]
    got = widen(word, out).astype(np.float64) if word == "bfloat16" else out.astype(np.float64)
    if "float" not in word:
        assert np.array_equal(got, np.floor(exact))
    else:
        loss = {"bfloat16": 2.0**-7, "float16": 2.0**-10}.get(word, 1e-6)
        assert np.abs(got - exact).max() <= loss * np.abs(exact).max()


@pytest.mark.parametrize("word", ["float64", "float32", "float16", "bfloat16"])
def test_what_is_not_a_number_stays_so(word: str) -> None:
    values = np.array([np.nan, np.inf, -np.inf, 1.0], np.float32)
    items = np.empty(4, storage(word))
    narrow(word, values, items)
    other = np.empty(4, storage(word))
    narrow(word, np.array([1, 1, 1, 1], np.float32), other)
    assert not is_finite(word, items)
    assert is_finite(word, other)
    for op in ("sum", "avg", "min", "max"):
        out = np.empty(4, storage(word))
        put_together(word, op, items, other, out)
        assert np.isnan(widen(word, out)[0])


def test_integers_are_always_finite() -> None:
    assert is_finite("int32", np.full(3, -(2**31), np.int32))
