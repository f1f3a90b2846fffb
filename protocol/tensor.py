"""Tensors on the wire: raw bytes with a dtype and a shape, never pickled, never copied where avoidable."""

from __future__ import annotations

import math

from mycel.protocol.errors import RemoteProtocolError
from mycel.protocol.mesh import Buffer

ITEM_BYTES = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1,
}  # fmt: skip
DIMENSIONS_MAX = 8


class Tensor:
    """A dense, C-ordered, little-endian tensor: `dtype` is a key of `ITEM_BYTES`, `data` its bytes.

    A plain class, because msgspec would take a dataclass apart itself: `mycel.protocol.message` puts its
    bytes behind the message instead, untouched.
    """

    __slots__ = ("data", "dtype", "shape")

    def __init__(self, dtype: str, shape: tuple[int, ...], data: Buffer) -> None:
        self.dtype = dtype
        self.shape = shape
        self.data = data

    def __repr__(self) -> str:
        return f"Tensor({self.dtype}{list(self.shape)})"

    @property
    def nbytes(self) -> int:
        """Bytes that dtype and shape ask for."""
        return ITEM_BYTES[self.dtype] * math.prod(self.shape)

    def check(self) -> Tensor:
        """Raise `RemoteProtocolError` unless dtype, shape and byte count agree; returns itself."""
        if self.dtype not in ITEM_BYTES:
            raise RemoteProtocolError(f"tensor of unknown dtype {self.dtype!r}")
        if len(self.shape) > DIMENSIONS_MAX or any(side < 0 for side in self.shape):
            raise RemoteProtocolError(f"tensor of impossible shape {self.shape}")
        if self.nbytes != memoryview(self.data).nbytes:
            raise RemoteProtocolError(
                f"tensor {self.dtype}{list(self.shape)} needs {self.nbytes} bytes, "
                f"{memoryview(self.data).nbytes} came"
            )
        return self
