"""How a model lies in one row of float32, and how such a row comes back from somebody who may lie.

Between peers a model, and every update of it, is one flat row: float32, little-endian, the tensors one after
the other in the order of their **layout** (name, shape, dtype). The layout travels once, with the order of a
round; after that only its digest is compared. Nothing of what comes back is interpreted but by the layout
that was sent out, so a lying shape has nowhere to stand: a row is as long as it must be, or it is refused.

Tensors of other dtypes (counters of a batch norm, half-precision weights) travel as float32 and are given
back to the application as what they were. Whole numbers are exact up to 2**24.

This module needs no numpy: a client's daemon checks layouts and hands rows through. What looks into rows is
`mycel.compute.train.rows`.
"""

from __future__ import annotations

import hashlib
import math

import msgspec

from mycel.protocol.errors import Refused
from mycel.protocol.tensor import DIMENSIONS_MAX

ENTRIES_MAX = 65536
NAME_CHARS_MAX = 256
DTYPES = ("float32", "float64", "float16", "int64", "int32", "int16", "int8", "uint8", "bool")
"""What an application may hold a tensor as."""


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """One tensor of a model."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"

    @property
    def size(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)


class Layout(msgspec.Struct, frozen=True):
    """The tensors of a model, in the order in which they lie in its row."""

    entries: tuple[Entry, ...]

    @property
    def size(self) -> int:
        """How many numbers all of them have."""
        return sum(entry.size for entry in self.entries)

    @property
    def nbytes(self) -> int:
        """Bytes of a row."""
        return 4 * self.size

    @property
    def digest(self) -> str:
        """Equal where layouts are: sha256 over their msgpack, 64 hexadecimal digits."""
        return hashlib.sha256(msgspec.msgpack.encode(self)).hexdigest()

    def check(self, bytes_max: int) -> Layout:
        """Raise `Refused` ("layout", "too-large") for what no model has; returns itself."""
        names = {entry.name: None for entry in self.entries}
        if not 0 < len(self.entries) <= ENTRIES_MAX or len(names) != len(self.entries):
            raise Refused(
                f"a layout of {len(self.entries)} tensors, names used twice or none", reason="layout"
            )
        for entry in self.entries:
            if not 0 < len(entry.name) <= NAME_CHARS_MAX or entry.dtype not in DTYPES:
                raise Refused(f"tensor {entry.name[:40]!r} of dtype {entry.dtype[:20]!r}", reason="layout")
            if len(entry.shape) > DIMENSIONS_MAX or any(side < 0 for side in entry.shape):
                raise Refused(f"tensor {entry.name!r} of impossible shape {entry.shape}", reason="layout")
        if self.nbytes > bytes_max:
            raise Refused(
                f"a model of {self.nbytes} bytes, more than {bytes_max} taken here", reason="too-large"
            )
        return self
