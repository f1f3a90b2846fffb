"""What stands where in a safetensors file, and the header of a new one, without reading a tensor.

The format (safetensors specification): 8 bytes of length, little endian, then JSON of name -> dtype, shape,
data_offsets, then the data. A manifest is made of any peer's files, so everything is checked against the
file's size. A new header is padded with spaces, as the format allows.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mycel.protocol.errors import UsageProblem

HEADER_BYTES_MAX = 100_000_000
"""The format's own bound."""
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor in a file: `nbytes` at `offset`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    path: Path
    offset: int


def read_tensors(path: Path) -> list[Tensor]:
    """The tensors of the file at `path`, ordered by name. Raises `UsageProblem` naming what is wrong."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else HEADER_BYTES_MAX + 1
        if length > min(size - 8, HEADER_BYTES_MAX):
            raise UsageProblem(f"{path} is no safetensors file, or was cut short; fetch it again")
        text = file.read(length)
    try:
        header = json.loads(text)
        found = [_tensor(path, 8 + length, name, header[name]) for name in sorted(header)
                 if name != "__metadata__"]  # fmt: skip
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UsageProblem(f"{path} has a broken safetensors header ({error}); fetch it again") from None
    for tensor in found:
        if tensor.nbytes < 0 or tensor.offset < 8 + length or tensor.offset + tensor.nbytes > size:
            raise UsageProblem(f"tensor {tensor.name} lies outside {path}; fetch it again")
    return found


def _tensor(path: Path, start: int, name: str, spec: dict[str, Any]) -> Tensor:
    begin, end = spec["data_offsets"]
    shape = tuple(int(side) for side in spec["shape"])
    return Tensor(name, str(spec["dtype"]), shape, end - begin, path, start + begin)


def find_files(directory: Path) -> list[Path]:
    """The safetensors files of a model's directory, ordered by name.

    Raises `UsageProblem` when there are none, or one that its index names is missing.
    """
    index = directory / INDEX
    if not index.is_file():
        if (directory / SINGLE).is_file():
            return [directory / SINGLE]
        raise UsageProblem(f"{directory} holds neither {SINGLE} nor {INDEX}: name a model's directory")
    try:
        names = sorted({str(name) for name in json.loads(index.read_text())["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageProblem(f"{index} is no index of a sharded checkpoint ({error}); fetch it again") from None
    for name in names:
        if Path(name).name != name or not (directory / name).is_file():
            raise UsageProblem(f"{index} names {name}, which is not beside it; copy it again")
    return [directory / name for name in names]


def header_of(tensors: Iterable[tuple[str, str, tuple[int, ...], int]], align: int = 8) -> bytes:
    """Length and header of a file with these (name, dtype, shape, nbytes), whose data stand in this order.

    The data begin at a multiple of `align`, which is one of 8.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, dtype, shape, nbytes in tensors:
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + nbytes]}
        at += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % align)
    return struct.pack("<Q", len(text)) + text
