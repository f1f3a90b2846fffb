"""Take a model's directory into the store.

Twice through its files. First every piece is hashed, which gives the manifest, and with it all that is to be
pinned; then what the store has not is copied. So nothing of a model is evicted while it is being added, and
adding goes on where it was when it is done again after a crash. Files are read and hashed in worker threads.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import trio

from mycel.dht.block.manifest import (
    EDGE,
    VERSION,
    Manifest,
    Part,
    PartLink,
    Pieces,
    TensorPieces,
    by_part,
    check_file_name,
    check_model_name,
    cut,
    encode,
    layer_count,
    pin_name,
)
from mycel.dht.block.safetensor import Tensor, find_files, read_tensors
from mycel.protocol.blockstore import BlockStore, CorruptBlock
from mycel.protocol.cid import Cid, cid_of
from mycel.protocol.errors import RemoteProtocolError, UsageProblem
from mycel.protocol.limits import DEFAULT_BLOCK_LIMITS

Progress = Callable[[str, int, int], None]
"""What is done ("hashing" or "copying"), bytes done, bytes in all."""


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a block's bytes are now."""

    path: Path
    offset: int
    nbytes: int


@dataclass(slots=True)
class _Cutting:
    """What hashing found."""

    places: dict[Cid, _Place] = field(default_factory=dict)
    lists: dict[Cid, bytes] = field(default_factory=dict)

    def write_list(self, listed: Manifest | Part) -> tuple[Cid, int]:
        """Keep a list's block in mind; its name and size."""
        data = encode(listed)
        cid = cid_of(data)
        self.lists[cid] = data
        return cid, len(data)


async def add_model(
    store: BlockStore,
    directory: Path,
    *,
    name: str,
    fingerprint: str,
    progress: Progress | None = None,
) -> Cid:
    """Cut the model in `directory` into blocks, keep and pin them; the root's CID.

    `fingerprint` is what cards of the model carry. Raises `UsageProblem` where the directory holds no model
    that can be cut, or changes meanwhile, and what the store raises.
    """
    say = progress or (lambda what, done, total: None)
    try:
        check_model_name(name)
    except RemoteProtocolError as error:
        raise UsageProblem(f"{error}: letters, digits, . _ - and one / between org and name") from None
    cutting = _Cutting()
    root = await _hash(directory, cutting, name, fingerprint, say)
    earlier = store.pinned(pin_name(root))
    await store.pin(pin_name(root), [*cutting.lists, *cutting.places])
    try:
        await _copy(store, cutting, say)
    except BaseException:  # why: who gives up adding pins nothing either; raised again
        with trio.CancelScope(shield=True):
            await (store.pin(pin_name(root), earlier) if earlier else store.unpin(pin_name(root)))
        raise
    return root


async def _hash(directory: Path, cutting: _Cutting, name: str, fingerprint: str, say: Progress) -> Cid:
    config, small, tensors = await trio.to_thread.run_sync(_look, directory)
    total = sum(tensor.nbytes for tensor in tensors)
    done = 0
    files = []
    for path in small:
        nbytes = path.stat().st_size
        files.append((path.name, await trio.to_thread.run_sync(_cut, path, 0, nbytes, cutting.places)))
    parts = []
    for layer, members in enumerate(by_part(tensors, config), start=EDGE):
        listed = []
        for tensor in members:
            pieces = await trio.to_thread.run_sync(
                _cut, tensor.path, tensor.offset, tensor.nbytes, cutting.places
            )
            listed.append(TensorPieces(tensor.name, tensor.dtype, tensor.shape, pieces))
            done += tensor.nbytes
            say("hashing", done, total)
        cid, list_bytes = cutting.write_list(Part(VERSION, tuple(listed)))
        parts.append(PartLink(layer, cid, list_bytes, sum(tensor.nbytes for tensor in members)))
    manifest = Manifest(VERSION, name, fingerprint, len(parts) - 1, tuple(files), tuple(parts))
    return cutting.write_list(manifest)[0]


def _look(directory: Path) -> tuple[int | None, list[Path], list[Tensor]]:
    """How many layers the config says, the small files, and the tensors."""
    try:
        layers = layer_count(json.loads((directory / "config.json").read_text()))
    except (OSError, ValueError, AttributeError) as error:
        raise UsageProblem(
            f"{directory} has no readable config.json ({error}): name a model's directory"
        ) from None
    small = [path for path in sorted(directory.iterdir()) if _is_small_file(path)]
    return layers, small, [tensor for file in find_files(directory) for tensor in read_tensors(file)]


def _is_small_file(path: Path) -> bool:
    try:
        check_file_name(path.name)
    except RemoteProtocolError:
        return False
    return path.is_file() and path.stat().st_size <= DEFAULT_BLOCK_LIMITS.file_bytes


def _cut(path: Path, offset: int, nbytes: int, places: dict[Cid, _Place]) -> Pieces:
    """Hash a range of a file, piece by piece."""
    cids = []
    buffer = bytearray(min(nbytes, DEFAULT_BLOCK_LIMITS.block_bytes))
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        for size in cut(nbytes):
            view = memoryview(buffer)[:size]
            if file.readinto(view) != size:
                raise UsageProblem(f"{path} became shorter while it was added: add the model again")
            cid = cid_of(view)
            places.setdefault(cid, _Place(path, offset, size))
            cids.append(cid)
            offset += size
    return Pieces(nbytes, b"".join(cids))


async def _copy(store: BlockStore, cutting: _Cutting, say: Progress) -> None:
    missing = {cid: place for cid, place in cutting.places.items() if not store.has(cid)}
    total = sum(place.nbytes for place in missing.values())
    done = 0
    for cid, place in missing.items():
        try:
            await store.put(cid, await trio.to_thread.run_sync(_read, place))
        except CorruptBlock:
            raise UsageProblem(f"{place.path} changed while it was added: add the model again") from None
        done += place.nbytes
        say("copying", done, total)
    for cid, data in cutting.lists.items():  # the root last: who has it can read the rest
        await store.put(cid, data)


def _read(place: _Place) -> bytes:
    with place.path.open("rb", buffering=0) as file:
        file.seek(place.offset)
        return file.read(place.nbytes)
