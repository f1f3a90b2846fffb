"""Putting items together: sum, average, smallest, largest, for every word of `ITEM_BYTES` but bool.

float16 and bfloat16 are added as float32 and rounded to nearest even once per member. numpy has no bfloat16;
such items are words of 16 bits here, the upper halves of a float32. Averages of integers are floors of the
sum, which wraps around as the type does.

What is not a number stays so: sum, average, smallest and largest of anything with NaN are NaN.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mycel.compute.collective.attempt import Array
from mycel.compute.collective.quantize import Floats

STRETCH = 1 << 16
"""Items worked on at a time, so that they stay in a core's cache between two passes."""

FLOATS = ("float64", "float32", "float16", "bfloat16")
HALVES = ("float16", "bfloat16")

_PUT = {"sum": np.add, "avg": np.add, "min": np.minimum, "max": np.maximum}


def items_of(buffer: Any, word: str) -> Array:
    """Items of the type that `word` names over a buffer, without a copy; bfloat16 as uint16."""
    return np.frombuffer(buffer, storage(word))


def storage(word: str) -> np.dtype[Any]:
    """The numpy type that items of `word` are held in."""
    return np.dtype(np.uint16 if word == "bfloat16" else word)


def is_workable(word: str, op: str) -> bool:
    """Whether items of `word` can be put together by `op`: all numbers can."""
    return op in _PUT and word != "bool"


def put_together(word: str, op: str, theirs: Array, mine: Array, out: Array) -> None:
    """out = theirs `op` mine, for as many items each. `out` may be either of them."""
    put = _PUT[op]
    if word not in HALVES:
        with np.errstate(all="ignore"):
            put(theirs, mine, out=out)
        return
    with np.errstate(all="ignore"):
        narrow(word, put(widen(word, theirs), widen(word, mine)), out)


def finish(word: str, op: str, members: int, out: Array) -> None:
    """Make a whole sum an average where `op` says so."""
    if op != "avg" or members == 1:
        return
    with np.errstate(all="ignore"):
        if word in HALVES:
            narrow(word, widen(word, out) / np.float32(members), out)
        elif word in FLOATS:
            np.divide(out, out.dtype.type(members), out=out)
        else:
            np.floor_divide(out, out.dtype.type(members), out=out)


def widen(word: str, items: Array) -> Floats:
    """Items as float32, a copy except where they are that. float64 loses what float32 cannot hold."""
    if word == "bfloat16":
        wide = items.astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    with np.errstate(all="ignore"):
        return items.astype(np.float32, copy=False)


def narrow(word: str, values: Floats, out: Array) -> None:
    """Write float32 values as items of `word`, rounded to nearest even."""
    if word != "bfloat16":
        with np.errstate(all="ignore"):
            np.copyto(out, values, casting="unsafe")
        return
    bits = values.view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    out[...] = (bits + odd + np.uint32(0x7FFF)) >> np.uint32(16)
    strange = np.isnan(values)
    if strange.any():
        out[strange] = 0x7FC0


def is_finite(word: str, items: Array) -> bool:
    """Whether all items are numbers; integers always are."""
    if word not in FLOATS:
        return True
    for begin in range(0, items.size, STRETCH):
        piece = items[begin : begin + STRETCH]
        wide = widen(word, piece) if word == "bfloat16" else piece
        if not np.isfinite(wide).all():
            return False
    return True
