"""A model from blocks: fetch what a stage needs, and lay it out as a directory that loads.

The directory is what any reader of Hugging Face models takes: the small files, a safetensors file for each
part, and an index that names just the tensors that are here. A part's file is named after its list of
tensors, made whole or not at all and never changed, for weights in use stay mapped from it. Getting more
layers later adds files and then replaces the index.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import trio

from mycel.dht.block.exchange import Exchange, Progress
from mycel.dht.block.extents import PAGE_BYTES
from mycel.dht.block.manifest import (
    EDGE,
    ITEM_BITS,
    Manifest,
    Part,
    Pieces,
    TensorPieces,
    Want,
    lists_of,
    parts_for,
    pin_name,
    read_manifest,
    read_part,
    unique,
    wants_of,
)
from mycel.dht.block.safetensor import INDEX, header_of
from mycel.protocol.blockstore import FINGERPRINT_FILE, BlockStore
from mycel.protocol.cid import Cid, cid_text, cids_from
from mycel.protocol.errors import UsageProblem
from mycel.protocol.mesh import PeerId


@dataclass(frozen=True, slots=True)
class Model:
    """A model of which some parts are in the store."""

    root: Cid
    manifest: Manifest
    parts: Mapping[int, Part]
    """By layer, or `EDGE`."""


@dataclass(frozen=True, slots=True)
class Sources:
    """Whom to ask: `only` these, or every member, those in `first` before others."""

    only: Sequence[PeerId] | None = None
    first: Sequence[PeerId] = ()


ANYBODY = Sources()


async def fetch_model(
    exchange: Exchange,
    root: Cid,
    span: tuple[int, int] | None = None,
    *,
    sources: Sources = ANYBODY,
    progress: Progress | None = None,
) -> Model:
    """Fetch and pin what a stage of the layers `span` (start, end) needs, None for all; what is here stays.

    Raises `RemoteProtocolError` where `root` names no manifest, `UsageProblem` where it has no such layers,
    and as `Exchange.fetch` does. What came before an error is kept, and the next try goes on from there.
    """
    store, name = exchange.store, pin_name(root)
    kept = store.pinned(name)
    manifest = await _fetch_root(exchange, root, sources)
    try:
        start, end = span or (0, manifest.layers)
        numbers = parts_for(manifest, start, end) if manifest.layers else [EDGE]
    except UsageProblem:
        await (store.pin(name, kept) if kept else store.unpin(name))
        raise
    lists = lists_of(manifest, numbers)
    small = _small(manifest)
    await store.pin(name, _names(root, kept, [*lists, *small]))
    await exchange.fetch([*lists, *small], peers=sources.only, first=sources.first)
    parts = {}
    for number, want in zip(numbers, lists, strict=True):
        parts[number] = read_part(await exchange.get(want, peers=sources.only, first=sources.first))
    tensors = _tensors(parts)
    await store.pin(name, _names(root, kept, [*lists, *small, *tensors]))
    await exchange.fetch(tensors, peers=sources.only, first=sources.first, progress=progress)
    return Model(root, manifest, parts)


async def fetch_manifest(exchange: Exchange, root: Cid, *, sources: Sources = ANYBODY) -> Model:
    """Fetch and pin the small files alone: enough to choose layers by. Raises as `fetch_model`."""
    store, name = exchange.store, pin_name(root)
    kept = store.pinned(name)
    manifest = await _fetch_root(exchange, root, sources)
    small = _small(manifest)
    await store.pin(name, _names(root, kept, small))
    await exchange.fetch(small, peers=sources.only, first=sources.first)
    return Model(root, manifest, {})


async def _fetch_root(exchange: Exchange, root: Cid, sources: Sources) -> Manifest:
    store, name = exchange.store, pin_name(root)
    kept = store.pinned(name)
    await store.pin(name, list(dict.fromkeys([root, *kept])))
    try:
        return read_manifest(await exchange.get(Want(root, None), peers=sources.only, first=sources.first))
    except BaseException:  # why: what never came, or is no model, is not to be kept; raised again
        with trio.CancelScope(shield=True):
            await (store.pin(name, kept) if kept else store.unpin(name))
        raise


async def read_model(store: BlockStore, root: Cid) -> Model | None:
    """What of a model is in the store, with all of its parts' blocks; None where not even the root is.

    Raises `RemoteProtocolError` where `root` names no manifest.
    """
    data = await store.get(root) if store.has(root) else None
    if data is None:
        return None
    manifest = read_manifest(data)
    parts = {}
    for number, link in enumerate(lists_of(manifest, range(EDGE, manifest.layers)), start=EDGE):
        listed = await store.get(link.cid) if store.has(link.cid) else None
        if listed is not None:
            part = read_part(listed)
            if all(store.has(want.cid) for want in _tensors({number: part})):
                parts[number] = part
    return Model(root, manifest, parts)


def _small(manifest: Manifest) -> list[Want]:
    return [want for _, pieces in manifest.files for want in wants_of(pieces)]


def _tensors(parts: Mapping[int, Part]) -> list[Want]:
    return [want for part in parts.values() for t in part.tensors for want in wants_of(t.pieces)]


def _names(root: Cid, kept: Sequence[Cid], wants: Sequence[Want]) -> list[Cid]:
    return list(dict.fromkeys([root, *kept, *(want.cid for want in unique(wants))]))


async def lay_out(store: BlockStore, model: Model, folder: Path) -> Path:
    """Write the parts of `model` as a directory under `folder`, beside those that are there; the directory.

    Raises `UsageProblem` where a block is missing from the store.
    """
    manifest = model.manifest
    directory = folder / cid_text(model.root) / manifest.name.rpartition("/")[2]
    await trio.to_thread.run_sync(lambda: directory.mkdir(mode=0o700, parents=True, exist_ok=True))
    for name, pieces in manifest.files:
        if not (directory / name).exists():
            await _write(store, directory / name, b"", [pieces])
    weight_map = await trio.to_thread.run_sync(_weight_map, directory)
    for number in sorted(model.parts):
        part = model.parts[number]
        if not part.tensors:
            continue
        name = _file_name(number, Cid(manifest.parts[number - EDGE].cid))
        tensors = sorted(part.tensors, key=_place)
        if not (directory / name).exists():
            await _write(store, directory / name, _header(tensors), [tensor.pieces for tensor in tensors])
        weight_map |= {tensor.name: name for tensor in tensors}
    index = {"metadata": {}, "weight_map": dict(sorted(weight_map.items()))}
    told = f"{manifest.fingerprint}\n{manifest.name}\n"
    await _write(store, directory / FINGERPRINT_FILE, told.encode(), [])
    await _write(store, directory / INDEX, json.dumps(index, indent=1).encode(), [])
    return directory


def _file_name(number: int, cid: Cid) -> str:
    word = "edge" if number == EDGE else f"layer-{number:05}"
    return f"{word}-{cid_text(cid)[-16:]}.safetensors"


def _place(tensor: TensorPieces) -> tuple[bool, int, str]:
    """Order in a file: those of whole pages first, for their blocks may share extents, then by size of items,
    so that each begins at a multiple of its own."""
    return tensor.pieces.nbytes % PAGE_BYTES != 0, -ITEM_BITS[tensor.dtype], tensor.name


def _header(tensors: Sequence[TensorPieces]) -> bytes:
    listed = ((t.name, t.dtype, t.shape, t.pieces.nbytes) for t in tensors)
    return header_of(listed, PAGE_BYTES)


def _weight_map(directory: Path) -> dict[str, str]:
    """What the index there says, nothing where there is none."""
    try:
        found: dict[str, str] = json.loads((directory / INDEX).read_text())["weight_map"]
    except FileNotFoundError:
        return {}
    return found


async def _write(store: BlockStore, path: Path, head: bytes, pieces: Sequence[Pieces]) -> None:
    """A file of `head` and blocks, there whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    async with await trio.open_file(partial, "wb") as file:
        await file.write(head)
        await file.flush()
        for cid in (cid for piece in pieces for cid in cids_from(piece.cids)):
            if not await store.append(cid, file.fileno()):
                raise UsageProblem(f"block {cid_text(cid)} is not here any more: get the model again")
        await trio.to_thread.run_sync(os.fsync, file.fileno())
    await trio.to_thread.run_sync(os.replace, partial, path)
