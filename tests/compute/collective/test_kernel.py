"""The compiled kernel of quantized blocks: the same bits as numpy, and no memory but what it was given."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mycel.compute.collective import quantize
from mycel.compute.collective.quantize import BlockCodec

kernel = pytest.importorskip(
    "mycel.compute.collective.kernel", reason="installed where there was no C compiler"
)


@given(
    st.lists(st.floats(-(2.0**120), 2.0**120, width=32), min_size=1, max_size=40),
    st.sampled_from([BlockCodec(bits, block) for bits in (4, 8) for block in (256, 512)]),
    st.integers(1, 5),
    st.integers(1, 40),
)
def test_the_kernel_and_numpy_agree_to_the_bit(
    some: list[float], codec: BlockCodec, divisor: int, times: int
) -> None:
    values = np.tile(np.array(some, np.float32), times)
    made = []
    for way in (kernel, None):
        quantize.kernel = way
        wire = np.zeros(codec.wire_bytes(values.size), np.uint8)
        told, added = np.empty_like(values), np.empty_like(values)
        codec.encode(values, wire, divisor=divisor, decoded=told)
        codec.decode(wire, added, add=values)
        made.append((wire.tobytes(), told.tobytes(), added.tobytes()))
    quantize.kernel = kernel
    assert made[0] == made[1]


def test_the_kernel_touches_no_memory_but_what_it_was_given() -> None:
    items, wire = np.zeros(1000, np.float32), np.zeros(BlockCodec(8).wire_bytes(1000), np.uint8)
    for wrong in (
        lambda: kernel.encode_blocks(items, wire[:-1], 8, 512, 1, None, None),
        lambda: kernel.encode_blocks(items, wire, 8, 2048, 1, None, None),
        lambda: kernel.encode_blocks(items, wire, 7, 512, 1, None, None),
        lambda: kernel.encode_blocks(items, wire, 8, 512, 0, None, None),
        lambda: kernel.encode_blocks(items, wire, 8, 512, 1, items[:700], None),
        lambda: kernel.encode_blocks(items, wire, 8, 512, 1, None, items[:-1]),
        lambda: kernel.decode_blocks(wire, items[:-1], 8, 512, None),
        lambda: kernel.decode_blocks(wire, items, 8, 512, items[1:]),
    ):
        with pytest.raises(ValueError, match=r"blocks have|the wire's buffer|the arrays of items|no such"):
            wrong()
