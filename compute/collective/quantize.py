"""Items quantized in blocks: 8 or 4 bits for each, and one scale for every block of some hundred.

A block's scale is its largest magnitude over the largest code, so codes are symmetric around zero and
rounding has no favourite direction: skewed data stays unbiased, and an outlier costs only its own block. A
block whose largest magnitude is below 2**-118 becomes zero (its scale could not be inverted).

Fifteen codes are so few that rounding to the nearest favours where a skewed density is higher (by 0.06
standard deviations for half-normal data). 4-bit codes are therefore dithered: before rounding, a fixed table
of uniform numbers between -1/2 and 1/2 is added, which makes the error's mean zero whatever the data, for 1.4
times its spread. With 255 codes that bias is lost in the noise, and codes are rounded to the nearest.

On the wire a chunk of n items is ceil(n / block) scales, float32, then the codes. Of 4-bit codes the first
half of a block is in the low, the second half in the high four bits of its bytes.

Decoding is one conversion and one float32 multiplication, so equal bytes give equal bits on every machine.
That is what keeps peers together: a finished part is encoded once, by its owner, travels verbatim, and the
owner itself keeps what the others decode.

`kernel.c` does it in one pass over memory. Where a node was installed without a C compiler numpy does it, to
the same bits, in five passes over a stretch, and so at a fifth of the pace. (Whoever moves bulk may be the
daemon's process, where torch is not loaded.)
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

try:
    from mycel.compute.collective import kernel
except ImportError:  # installed without a C compiler
    kernel = None  # type: ignore[assignment]

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

STRETCH = 1 << 18
"""Items worked on at a time, 1 MiB of float32. Smaller ones would fit into a core's nearest cache, but every
pass is a call that lets go of Python's lock and takes it again."""

BLOCKS = (256, 512, 1024)
DITHER = np.random.default_rng(4).uniform(-0.499, 0.499, STRETCH).astype(np.float32)
INFINITE = 0x7F800000
"""The bits of float32 infinity; NaN's are greater."""
SMALLEST = np.float32(2.0**-118)
SCALE_BYTES = 4
NOT_FINITE = "an item is infinite or not a number"


class NotFinite(ValueError):
    """An item is infinite or not a number, so that its block has no scale."""


class _Scratch(threading.local):
    """A stretch of working memory for each thread."""

    def __init__(self) -> None:
        self.floats = np.empty(STRETCH, np.float32)
        self.codes = np.empty(STRETCH, np.int8)


_scratch = _Scratch()
_one_at_a_time = threading.Lock()
"""Threads that encode at once would hand Python's lock to each other at every pass, and wait for it where the
one that has it does not run. One core's encoding is more than a line of 10 Gbit/s takes."""


@dataclass(frozen=True, slots=True)
class BlockCodec:
    """`bits` 8 or 4, `block` items to a scale (256, 512 or 1024)."""

    bits: int
    block: int = 512

    def __post_init__(self) -> None:
        if self.bits not in (4, 8) or self.block not in BLOCKS:
            raise ValueError(
                f"codes have 4 or 8 bits and blocks {BLOCKS} items, not {self.bits}, {self.block}"
            )

    @property
    def top(self) -> int:
        """The largest code."""
        return 127 if self.bits == 8 else 7

    def wire_bytes(self, items: int) -> int:
        """Bytes that `items` items take."""
        full, rest = divmod(items, self.block)
        scales = SCALE_BYTES * (full + (rest > 0))
        return scales + (items if self.bits == 8 else full * (self.block // 2) + -(-rest // 2))

    def encode(self, values: Floats, wire: Bytes, *, divisor: int = 1, decoded: Floats | None = None) -> None:
        """Fill `wire` (`wire_bytes(values.size)` bytes) from `values / divisor`, one-dimensional.

        And `decoded` with what `decode` makes of it, to the bit.

        Raises `NotFinite`; what stands in `wire` and `decoded` then is of no use.
        """
        if kernel is not None:
            dither = DITHER if self.bits == 4 else None
            if not kernel.encode_blocks(values, wire, self.bits, self.block, divisor, dither, decoded):
                raise NotFinite(NOT_FINITE)
            return
        scales, codes = self._split(wire, values.size)
        with _one_at_a_time:
            for begin, end, block in self._stretches(values.size):
                rows = values[begin:end].reshape(-1, block)
                own = scales[begin // self.block :][: len(rows)]
                work = self._encode_rows(rows, own, codes[self._at(begin) :], divisor)
                if decoded is not None:
                    np.add(work, np.float32(0.0), out=work)  # -0.0 is no code: what is decoded is 0.0
                    np.multiply(work, own[:, None], out=decoded[begin:end].reshape(rows.shape))

    def decode(self, wire: Bytes, out: Floats, add: Floats | None = None) -> None:
        """Fill `out` from what `encode` made of as many items, plus `add`."""
        if kernel is not None:
            kernel.decode_blocks(wire, out, self.bits, self.block, add)
            return
        scales, codes = self._split(wire, out.size)
        with _one_at_a_time:
            for begin, end, block in self._stretches(out.size):
                rows = out[begin:end].reshape(-1, block)
                self._decode_rows(scales[begin // self.block :][: len(rows)], codes[self._at(begin) :], rows)
                if add is not None:
                    np.add(out[begin:end], add[begin:end], out=out[begin:end])

    def _stretches(self, items: int) -> Iterator[tuple[int, int, int]]:
        """(begin, end, items of a block) of what is worked on at a time: whole blocks, then a short one."""
        full = items - items % self.block
        for begin in range(0, full, STRETCH):
            yield begin, min(full, begin + STRETCH), self.block
        if full < items:
            yield full, items, items - full

    def check(self, wire: Bytes, items: int) -> None:
        """Raise `NotFinite` where a scale is not finite or negative: no honest peer sends such."""
        scales, _ = self._split(wire, items)
        if items and not 0 <= int(scales.view(np.uint32).max()) < INFINITE:
            raise NotFinite("a scale is negative, infinite or not a number")

    def _at(self, items: int) -> int:
        """Where the code of an item that begins a block, or a stretch, stands."""
        return items if self.bits == 8 else items // 2

    def _split(self, wire: Bytes, items: int) -> tuple[Floats, npt.NDArray[np.int8]]:
        scales = SCALE_BYTES * -(-items // self.block)
        return wire[:scales].view(np.float32), wire[scales:].view(np.int8)

    def _encode_rows(self, rows: Floats, scales: Floats, codes: npt.NDArray[np.int8], divisor: int) -> Floats:
        """The codes as floating point numbers too, valid until the next call in this thread."""
        work = _scratch.floats[: rows.size].reshape(rows.shape)
        np.abs(rows, out=work)
        largest_bits = np.maximum.reduce(work.view(np.int32), axis=1)  # magnitudes order like their bits
        if int(largest_bits.max()) >= INFINITE:
            raise NotFinite(NOT_FINITE)
        largest = largest_bits.view(np.float32)
        np.divide(largest, np.float32(self.top * divisor), out=scales)
        inverse = np.zeros_like(largest)
        np.divide(np.float32(self.top), largest, out=inverse, where=largest >= SMALLEST)
        scales[largest < SMALLEST] = 0.0
        np.multiply(rows, inverse[:, None], out=work)
        if self.bits == 4:
            np.add(work, DITHER[: rows.size].reshape(rows.shape), out=work)
        np.rint(work, out=work)
        if self.bits == 8:
            np.copyto(codes[: rows.size].reshape(rows.shape), work, casting="unsafe")
            return work
        whole = _scratch.codes[: rows.size].reshape(rows.shape)
        np.copyto(whole, work, casting="unsafe")
        _pack(whole, codes)
        return work

    def _decode_rows(self, scales: Floats, codes: npt.NDArray[np.int8], out: Floats) -> None:
        if self.bits == 8:
            np.copyto(out, codes[: out.size].reshape(out.shape))
        else:
            whole = _scratch.codes[: out.size].reshape(out.shape)
            _unpack(codes, whole)
            np.copyto(out, whole)
        np.multiply(out, scales[:, None], out=out)


def _pack(codes: npt.NDArray[np.int8], out: npt.NDArray[np.int8]) -> None:
    """Two codes to a byte, row by row; of an odd row the last byte's high half is zero."""
    low_items = -(-codes.shape[1] // 2)
    packed = out[: codes.shape[0] * low_items].reshape(codes.shape[0], low_items)
    np.bitwise_and(codes[:, :low_items], 15, out=packed)
    high = codes[:, low_items:]
    packed[:, : high.shape[1]] |= np.left_shift(high, 4)


def _unpack(packed: npt.NDArray[np.int8], out: npt.NDArray[np.int8]) -> None:
    low_items = -(-out.shape[1] // 2)
    source = packed[: out.shape[0] * low_items].reshape(out.shape[0], low_items)
    np.right_shift(np.left_shift(source, 4), 4, out=out[:, :low_items])
    high = out[:, low_items:]
    np.right_shift(source[:, : high.shape[1]], 4, out=high)


CODECS = {"int8": BlockCodec(8), "int4": BlockCodec(4)}
"""By the words of `Rule.codec`."""


def codec_of(word: str | None) -> BlockCodec | None:
    """The codec of a rule. Raises `ValueError` for an unknown word."""
    if word is None:
        return None
    if word not in CODECS:
        raise ValueError(f"unknown codec {word!r}; use one of {', '.join(sorted(CODECS))}, or None")
    return CODECS[word]


def feed_back(values: Floats, decoded: Floats, divisor: int, residual: Floats) -> None:
    """What encoding lost of `values` into `residual`, to be added to the next values.

    `decoded` is what came of `values / divisor`. Error feedback (Seide et al., "1-bit stochastic gradient
    descent", 2014): over many steps nothing is lost.
    """
    if divisor != 1:
        np.multiply(decoded, np.float32(divisor), out=decoded)
    np.subtract(values, decoded, out=residual)


def as_bytes(view: Any) -> Bytes:
    """A buffer's bytes as an array, without a copy."""
    return np.frombuffer(view, np.uint8)
