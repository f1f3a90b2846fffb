"""Where a model's files are, and its weights by name, without reading more of them than asked.

A model is a local directory or a hub id. Either way it ends as a directory with config.json and safetensors
files; of a hub model only the files that hold wanted tensors are downloaded. The safetensors header (format
specification: 8 bytes of length, JSON of name -> dtype, shape, offsets, then the data) is checked here before
anything maps the file, so that a truncated or foreign file is named in the error, with what to do about it.
Pickled checkpoints (pytorch_model.bin) are refused: loading one can run code.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from safetensors import safe_open

from mycel.compute.engine import ModelUnsupported
from mycel.compute.fingerprint import fingerprint_of, name_of

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken"]
HEADER_BYTES_MAX = 100_000_000
"""The format's own bound on a header."""
ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
    "U16": 2, "U32": 4, "U64": 8, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
}  # fmt: skip
DTYPE_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Entry:
    """One tensor of a safetensors file."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Source:
    """A model found: its directory, and which file holds which tensor."""

    name: str
    directory: Path
    weight_map: dict[str, str]
    """Tensor name -> file name; empty for a hub model of one file until `name_tensors` fetched it."""
    file_bytes: dict[str, int]
    """File name -> size."""
    hub: bool

    def fingerprint(self) -> str:
        """See `fingerprint_of`."""
        return fingerprint_of(self.directory, self.file_bytes)


def find(model: str) -> Source:
    """Find `model`: a directory, else a hub id. Weights of a hub model are not downloaded.

    Raises `FileNotFoundError` (neither), `ModelUnsupported` (no safetensors in it).
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return _local(path)
    return _remote(model)


def _local(path: Path) -> Source:
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"{path} holds no config.json: name the directory of a Hugging Face model")
    if (path / INDEX).is_file():
        weight_map = read_index(path / INDEX)
        names = sorted(set(weight_map.values()))
        missing = [name for name in names if not (path / name).is_file()]
        if missing:
            raise FileNotFoundError(f"{path}: {INDEX} names {missing[0]}, which is not there; copy it again")
    elif (path / SINGLE).is_file():
        weight_map = dict.fromkeys(read_header(path / SINGLE), SINGLE)
        names = [SINGLE]
    else:
        raise _no_safetensors(str(path), [entry.name for entry in path.iterdir()])
    sizes = {name: (path / name).stat().st_size for name in names}
    return Source(name_of(path), path, weight_map, sizes, hub=False)


def _remote(model: str) -> Source:
    try:
        listed = HfApi().model_info(model, files_metadata=True).siblings or []
        directory = download(model, [*SMALL_FILES, INDEX])
    except HFValidationError as error:
        raise FileNotFoundError(f"{model!r} is neither a directory nor a hub id (org/name)") from error
    except Exception as error:  # boundary: the hub client passes on what its HTTP library raises
        return _cached(model, error)
    sizes = {entry.rfilename: entry.size or 0 for entry in listed}
    if INDEX in sizes:
        weight_map = read_index(directory / INDEX)
        names = sorted(set(weight_map.values()))
    elif SINGLE in sizes:
        weight_map, names = {}, [SINGLE]
    else:
        raise _no_safetensors(model, list(sizes))
    missing = [name for name in names if name not in sizes]
    if missing:
        raise FileNotFoundError(f"{model}: {INDEX} names {missing[0]}, which the hub does not list")
    return Source(model, directory, weight_map, {name: sizes[name] for name in names}, hub=True)


def download(model: str, patterns: list[str]) -> Path:
    """Fetch what is not yet here of a hub model's files matching `patterns`; their directory."""
    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        return Path(snapshot_download(model, allow_patterns=patterns))
    finally:
        if shown:
            enable_progress_bars()


def fetch_whole(model: str) -> Path:
    """A directory with all of a hub model's files that are of use, fetched where they are not cached.

    Raises `FileNotFoundError` with what to do where there is no such model or no hub, `ModelUnsupported`.
    """
    source = find(model)
    if not source.hub:  # the hub did not answer: all of it is cached
        return source.directory
    try:
        return download(model, [*SMALL_FILES, *sorted(source.file_bytes)])
    except Exception as error:  # boundary: the hub client passes on what its HTTP library raises
        raise FileNotFoundError(
            f"{model} could not be fetched from the hub ({error}): ask again, it goes on where it was, or "
            "copy the model's directory here and name that"
        ) from error


def _cached(model: str, error: Exception) -> Source:
    """A hub model as far as this machine has it, when the hub did not answer."""
    try:
        directory = Path(snapshot_download(model, local_files_only=True))
        source = replace(_local(directory), name=model)
    except (LocalEntryNotFoundError, FileNotFoundError) as missing:
        here = "nothing" if isinstance(missing, LocalEntryNotFoundError) else f"not all ({missing})"
        raise FileNotFoundError(
            f"{model!r} is no directory, the hub gave no such model ({error}), and {here} of it is cached; "
            "reach the hub, or name a directory with the model's files"
        ) from error
    return source


def _no_safetensors(model: str, names: Sequence[str]) -> Exception:
    pickled = sorted(name for name in names if name.endswith((".bin", ".pt", ".pth")))
    if pickled:
        return ModelUnsupported(
            f"{model} holds its weights in {pickled[0]}, a pickle that can run code when it is loaded; "
            "convert it to safetensors (save_pretrained of transformers does)"
        )
    return FileNotFoundError(f"{model} holds neither {SINGLE} nor {INDEX}")


def read_index(path: Path) -> dict[str, str]:
    """Tensor name -> file name, of a sharded checkpoint. Raises `ModelUnsupported` when it is broken."""
    try:
        weight_map = json.loads(path.read_text())["weight_map"]
        checked = {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelUnsupported(
            f"{path} is no index of a sharded checkpoint ({error}); fetch it again"
        ) from error
    for file in checked.values():
        if Path(file).name != file:
            raise ModelUnsupported(f"{path} names a weight file outside its directory: {file!r}")
    return checked


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file, checked against its size.

    Raises `ModelUnsupported` naming the file, and the tensor where one is to blame.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else HEADER_BYTES_MAX + 1
        if length > min(size - 8, HEADER_BYTES_MAX):
            raise ModelUnsupported(f"{path} is no safetensors file, or was cut short; fetch it again")
        text = file.read(length)
    try:
        header = json.loads(text)
        entries = {name: _entry(path, name, spec, size - 8 - length) for name, spec in header.items()
                   if name != "__metadata__"}  # fmt: skip
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelUnsupported(f"{path} has a broken safetensors header ({error}); fetch it again") from error
    return entries


def _entry(path: Path, name: str, spec: dict[str, Any], data_bytes: int) -> Entry:
    begin, end = spec["data_offsets"]
    shape = tuple(int(side) for side in spec["shape"])
    wanted = math.prod(shape) * ITEM_BYTES.get(spec["dtype"], 0)
    if not 0 <= begin <= end <= data_bytes:
        raise ModelUnsupported(f"tensor {name} lies outside {path}: the file was cut short; fetch it again")
    if spec["dtype"] in ITEM_BYTES and end - begin != wanted:
        raise ModelUnsupported(
            f"tensor {name} in {path} has {end - begin} bytes, its shape asks for {wanted}"
        )
    return Entry(spec["dtype"], shape)


def name_tensors(source: Source) -> Source:
    """The source with its weight map: one file has to be here before its tensors are known."""
    if source.weight_map:
        return source
    here = fetch(source, [])
    return replace(here, weight_map=dict.fromkeys(read_header(here.directory / SINGLE), SINGLE))


def fetch(source: Source, names: Iterable[str]) -> Source:
    """Make sure that the files holding the tensors `names` are here; a hub model's are downloaded now."""
    if not source.hub:
        return source
    files = sorted({source.weight_map[name] for name in names}) or [SINGLE]
    try:
        directory = download(source.name, [*SMALL_FILES, INDEX, *files])
    except Exception as error:  # boundary: the hub client passes on what its HTTP library raises
        raise FileNotFoundError(f"{source.name}: could not fetch {', '.join(files)} ({error})") from error
    return replace(source, directory=directory)


class LazyTensor:
    """A tensor of an open safetensors file: read when indexed, then counted."""

    def __init__(self, part: Any, nbytes: int, count: Callable[[int], None]) -> None:
        self._part = part
        self._nbytes = nbytes
        self._count = count

    def __getitem__(self, index: Any) -> Any:
        found = self._part[index]
        self._count(self._nbytes)
        return found

    def get_shape(self) -> list[int]:
        """Sides, without reading."""
        return list(self._part.get_shape())

    def get_dtype(self) -> str:
        """The format's own dtype name, without reading."""
        return str(self._part.get_dtype())


def open_tensors(
    source: Source, names: Iterable[str], count: Callable[[int], None]
) -> tuple[dict[str, LazyTensor], list[Any]]:
    """Map the files that hold `names` and nothing else; (tensors, open files to be closed by the caller).

    Raises `ModelUnsupported` for a damaged file or a tensor its index promises in vain.
    """
    wanted = set(names)
    tensors: dict[str, LazyTensor] = {}
    opened: list[Any] = []
    for file in sorted({source.weight_map[name] for name in wanted}):
        path = source.directory / file
        entries = read_header(path)
        handle = safe_open(str(path), framework="pt", device="cpu")
        opened.append(handle)
        for name in sorted(name for name in wanted if source.weight_map[name] == file):
            if name not in entries:
                raise ModelUnsupported(f"tensor {name} should be in {path} and is not; fetch the file again")
            entry = entries[name]
            nbytes = math.prod(entry.shape) * ITEM_BYTES.get(entry.dtype, 1)
            tensors[name] = LazyTensor(handle.get_slice(name), nbytes, count)
    return tensors, opened
