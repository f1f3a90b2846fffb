"""Messages: what is of its type goes through unchanged, everything else is refused with the place named."""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mycel.protocol.errors import LocalProtocolError
from mycel.protocol.failure import Failure, failure_of
from mycel.protocol.message import Codec, MessageError
from mycel.protocol.tensor import Tensor


class Leaf(msgspec.Struct):
    name: str
    values: list[float] = []
    tensor: Tensor | None = None


class Tree(msgspec.Struct):
    leaf: Leaf
    trees: list[Tree] = []
    data: bytes = b""


class Lent(msgspec.Struct):
    view: memoryview
    raw: msgspec.Raw


flat = st.binary(max_size=50).map(lambda data: Tensor("uint8", (len(data),), data))
square = st.binary(max_size=24).map(lambda data: Tensor("int16", (2, len(data)), data * 4))
tensors = flat | square
leaves = st.builds(
    Leaf, st.text(max_size=5), st.lists(st.floats(allow_nan=False), max_size=3), st.none() | tensors
)
trees = st.recursive(
    st.builds(Tree, leaves),
    lambda inner: st.builds(Tree, leaves, st.lists(inner, max_size=3), st.binary(max_size=5)),
    max_leaves=6,
)


def plain(value):
    """Comparable form: tensors by their parts."""
    if isinstance(value, Tensor):
        return value.dtype, value.shape, bytes(value.data)
    if isinstance(value, msgspec.Struct):
        return [plain(getattr(value, name)) for name in value.__struct_fields__]
    return [plain(item) for item in value] if isinstance(value, list) else value


@given(trees)
def test_any_message_comes_back(tree):
    codec = Codec(Tree)
    body, raws = codec.encode(tree)
    assert plain(codec.decode(body, raws)) == plain(tree)


@given(trees, st.data())
def test_a_damaged_message_is_a_message_or_a_clear_no(tree, data):
    codec = Codec(Tree)
    body, raws = codec.encode(tree)
    damaged = bytearray(body)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    damaged = damaged[: data.draw(st.integers(0, len(body)))]
    try:
        again = codec.decode(bytes(damaged), raws)
    except MessageError:
        return
    assert isinstance(again, Tree)


@given(st.binary(max_size=100))
def test_any_bytes_are_a_message_or_a_clear_no(junk):
    for message in (Leaf, Failure, int, dict[str, int], Any):
        with suppress(MessageError):
            Codec(message).decode(junk)


def test_depth_without_end_is_refused():
    with pytest.raises(MessageError, match="recursion"):
        Codec(Any).decode(b"\x91" * 100_000)


def test_lengths_that_nothing_pays_for_cost_nothing():
    for head in (b"\xdd", b"\xdf", b"\xc6", b"\xdb"):
        with pytest.raises(MessageError, match=r"truncated|Expected"):
            Codec(list[int]).decode(head + b"\xff" * 4)
    with pytest.raises(MessageError, match="truncated"):
        Codec(list[int]).decode(b"\xdd\xff\xff\xff\xff")


@pytest.mark.parametrize(
    ("body", "raws", "why"),
    [
        ({"name": 1}, [], r"Expected `str`, got `int` - at `\$.name`"),
        ({}, [], "missing required field `name`"),
        ({"name": "a", "tensor": ["uint8", [3], 0]}, [], "raw buffer 0"),
        ({"name": "a", "tensor": ["uint8", [3], 0]}, [b"ab"], r"needs 3 bytes, 2 came - at `\$.tensor`"),
        ({"name": "a", "tensor": ["uint8", [3], 1]}, [b"abc", b""], "raw buffer 1 where 0"),
        ({"name": "a", "tensor": ["uint8", [3], -1]}, [b"abc"], "raw buffer -1"),
        ({"name": "a", "tensor": ["uint9", [3], 0]}, [b"abc"], "unknown dtype"),
        ({"name": "a", "tensor": ["uint8", [-3, -1], 0]}, [b"abc"], "impossible shape"),
        ({"name": "a", "tensor": ["uint8", [3.0], 0]}, [b"abc"], "expected a tensor"),
        ({"name": "a", "tensor": ["uint8", [True], 0]}, [b"a"], "expected a tensor"),
        ({"name": "a", "tensor": "uint8"}, [b"abc"], "expected a tensor"),
        ({"name": "a"}, [b"abc"], "1 raw buffers came, 0 tensors"),
    ],
)
def test_what_is_wrong_is_named(body, raws, why):
    with pytest.raises(MessageError, match=why):
        Codec(Leaf).decode(msgspec.msgpack.encode(body), raws)


def test_raw_buffers_without_tensors_are_refused():
    with pytest.raises(MessageError, match="no tensors"):
        Codec(int).decode(b"\x01", [b"abc"])


def test_tensors_are_neither_copied_out_nor_in():
    data = bytearray(b"abcdef")
    body, raws = Codec(Leaf).encode(Leaf("a", tensor=Tensor("int8", (2, 3), data)))
    assert raws[0].obj is data
    back = Codec(Leaf).decode(body, raws)
    data[0] = ord("z")
    assert bytes(back.tensor.data) == b"zbcdef"


def test_what_is_only_lent_is_copied():
    data = bytearray(b"abcdef")
    codec = Codec(Leaf)
    body, raws = codec.encode(Leaf("a", tensor=Tensor("int8", (6,), data)))
    kept = codec.decode(body, raws, owned=False)
    body = bytearray(Codec(Lent).encode(Lent(memoryview(b"xyz"), msgspec.Raw(b"\x01")))[0])
    lent = Codec(Lent).decode(body, owned=False)
    data[:] = bytes(len(data))
    body[:] = bytes(len(body))
    assert bytes(kept.tensor.data) == b"abcdef"
    assert (bytes(lent.view), bytes(lent.raw)) == (b"xyz", b"\x01")


@pytest.mark.parametrize("strange", [threading.Thread, list[threading.Lock], complex])
def test_types_that_nobody_can_check_are_no_messages(strange):
    with pytest.raises(LocalProtocolError, match="cannot be a message"):
        Codec(strange)


def test_values_that_cannot_be_encoded_are_our_fault():
    with pytest.raises(LocalProtocolError):
        Codec(Leaf).encode(Leaf("a", [threading.Lock()]))
    with pytest.raises(LocalProtocolError):
        Codec(int).encode(1 << 70)


def test_failures_keep_kind_and_text_in_bounds():
    group = ExceptionGroup("both", [ExceptionGroup("one", [ValueError("x" * 100)])])
    assert failure_of(group, 10) == Failure("error", "ValueError", "x" * 10)
    assert failure_of(ExceptionGroup("two", [ValueError(), KeyError()]), 99).kind == "ExceptionGroup"
