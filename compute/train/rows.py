"""Rows of float32: models and updates as numpy sees them, and as safetensors files.

On disk a model is a safetensors file with the tensors of its layout in their order, so that anything can open
it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping

import msgspec
import numpy as np
from numpy.typing import NDArray

from mycel.compute.train.layout import DTYPES, Entry, Layout
from mycel.protocol.errors import LocalProtocolError, Refused, UsageProblem
from mycel.protocol.mesh import Buffer

Flat = NDArray[np.float32]
"""A whole model, or an update of one, in one row: shape [layout.size]."""
Arrays = Mapping[str, NDArray[np.generic]]
"""A model by the names of its tensors."""
FLOAT32 = np.dtype("<f4")


def layout_of(arrays: Arrays) -> Layout:
    """The layout of `arrays`, in their order. Raises `LocalProtocolError` for a dtype that does not
    travel."""
    for name, array in arrays.items():
        if array.dtype.name not in DTYPES:
            raise LocalProtocolError(
                f"tensor {name!r} is {array.dtype}; it must be one of {', '.join(DTYPES)}"
            )
    return Layout(tuple(Entry(name, array.shape, array.dtype.name) for name, array in arrays.items()))


def flatten(arrays: Arrays, layout: Layout) -> Flat:
    """`arrays` as one row. Raises `LocalProtocolError` where they are not what `layout` says."""
    flat = np.empty(layout.size, FLOAT32)
    missing = [entry.name for entry in layout.entries if entry.name not in arrays]
    if missing or len(arrays) != len(layout.entries):
        raise LocalProtocolError(
            f"{len(arrays)} tensors came where the model has {len(layout.entries)}: {missing}"
        )
    at = 0
    for entry in layout.entries:
        array = arrays[entry.name]
        if array.shape != entry.shape:
            raise LocalProtocolError(f"tensor {entry.name!r} came back as {array.shape}, not {entry.shape}")
        flat[at : at + entry.size] = np.ascontiguousarray(array).reshape(-1)
        at += entry.size
    return flat


def unflatten(flat: Flat, layout: Layout) -> dict[str, NDArray[np.generic]]:
    """The tensors in a row: float32 ones as views of it, others converted back."""
    arrays: dict[str, NDArray[np.generic]] = {}
    at = 0
    for entry in layout.entries:
        part = flat[at : at + entry.size].reshape(entry.shape)
        is_whole = entry.dtype != "bool" and np.dtype(entry.dtype).kind in "iu"
        arrays[entry.name] = part if entry.dtype == "float32" else (
            np.rint(part) if is_whole else part
        ).astype(entry.dtype)  # fmt: skip
        at += entry.size
    return arrays


def row_of(data: Buffer, layout: Layout) -> Flat:
    """Bytes that came as a row, not copied.

    Raises `Refused`: "wrong-size" where they are not as many as the model has, "not-finite" for NaN and
    infinities.
    """
    view = memoryview(data).cast("B")
    if view.nbytes != layout.nbytes:
        raise Refused(f"{view.nbytes} bytes came for a model of {layout.nbytes}", reason="wrong-size")
    flat = np.frombuffer(view, FLOAT32)
    check_finite(flat)
    return flat


def check_finite(flat: Flat) -> None:
    """Raise `Refused` ("not-finite") naming the first number that is none."""
    with np.errstate(over="ignore", invalid="ignore"):
        square = flat.dot(flat)  # one pass, no copy; overflows where a number is beyond all use
    if not np.isfinite(square):
        bad = np.flatnonzero(~np.isfinite(flat))
        where = f"number {bad[0]} of {flat.size} is {flat[bad[0]]}" if bad.size else "its length overflows"
        raise Refused(f"an update that is not finite: {where}", reason="not-finite")


def digest_of(flat: Flat) -> str:
    """The name of a row by its content: sha256, 64 hexadecimal digits."""
    return hashlib.sha256(flat.data.cast("B")).hexdigest()


def to_safetensors(flat: Flat, layout: Layout, extra: Mapping[str, str] | None = None) -> bytes:
    """The model as a safetensors file, float32 throughout; `extra` are its metadata."""
    header: dict[str, object] = {"__metadata__": dict(extra or {})}
    at = 0
    for entry in layout.entries:
        header[entry.name] = {
            "dtype": "F32",
            "shape": list(entry.shape),
            "data_offsets": [at, at + 4 * entry.size],
        }
        at += 4 * entry.size
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    return b"".join((len(head).to_bytes(8, "little"), head, flat.data.cast("B")))


def from_safetensors(content: bytes) -> tuple[Flat, Layout, dict[str, str]]:
    """(row, layout, metadata) of a safetensors file, of float32 tensors only. Raises `UsageProblem`."""
    try:
        size = int.from_bytes(content[:8], "little")
        header = msgspec.json.decode(content[8 : 8 + size], type=dict[str, dict[str, object]])
        extra = msgspec.convert(header.pop("__metadata__", {}), dict[str, str])
        tensors = msgspec.convert(header, dict[str, _Stored])
    except msgspec.ValidationError as error:
        raise UsageProblem(f"this is no safetensors file of float32 tensors: {error}") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageProblem(f"this is no safetensors file: {error}") from error
    body = memoryview(content)[8 + size :]
    ordered = sorted(tensors.items(), key=lambda item: item[1].data_offsets)
    at = 0
    for name, tensor in ordered:
        begin, end = tensor.data_offsets
        if tensor.dtype != "F32" or begin != at or end - begin != 4 * math.prod(tensor.shape):
            raise UsageProblem(
                f"tensor {name!r} of this safetensors file is not float32, or its bytes are not its own"
            )
        at = end
    if at != body.nbytes:
        raise UsageProblem(f"this safetensors file has {body.nbytes} bytes of tensors and names {at}")
    layout = Layout(tuple(Entry(name, tensor.shape) for name, tensor in ordered))
    return np.frombuffer(body, FLOAT32).copy(), layout, extra


class _Stored(msgspec.Struct, frozen=True):
    """What a safetensors header says of one tensor."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]
