"""What callers of a group ask for, read: how their arrays are worked on, and where results go."""

from __future__ import annotations

import numpy as np

from mycel.compute.collective.attempt import Array, Rule, as_items, check_rule
from mycel.protocol.errors import UsageProblem


def read_rule(array: Array, dtype: str, op: str, codec: str | None) -> Rule:
    """How a caller wants `array` worked on. Raises `UsageProblem`."""
    word, plus, extra = (codec or "").partition("+")
    if plus and extra != "feedback":
        raise UsageProblem(f'codec {codec!r} is none; after "+" only "feedback" can stand')
    rule = Rule(dtype or array.dtype.name, op, word or None, bool(extra))
    try:
        check_rule(rule, array)
        as_items(array)
    except ValueError as error:
        raise UsageProblem(str(error)) from error
    return rule


def read_place(into: Array, array: Array) -> Array:
    """The items of `into`, where a result of `array` can go. Raises `UsageProblem`."""
    if into.dtype != array.dtype or into.size != array.size or np.shares_memory(into, array):
        raise UsageProblem("`into` must be other memory than the array, for as many items of its type")
    try:
        return as_items(into)
    except ValueError as error:
        raise UsageProblem(str(error)) from error
