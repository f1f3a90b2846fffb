"""A model as blocks: a root that names its small files and its parts, and for each part its tensors.

A part is one layer, or the edge: everything outside the layers (embeddings, norm, head). Each part's list of
tensors is a block of its own, and so is the root. A peer that serves some layers reads the root and those
layers' lists and nothing else; and where two models have an equal layer, they share its list as well as its
blocks. The model's name in the swarm is the root's CID.

Every tensor begins a block, wherever it stands in whatever file, and is cut at fixed places: equal tensors
give equal blocks. Which tensor belongs to which layer is read from the names: of all lists that names count
through ("model.layers.0." ... "model.layers.31."), it is the one with the most bytes.

Encodings are msgpack of arrays (msgspec), the same bytes for the same content. What comes from a peer is
checked here: names of files that could lead elsewhere or be run are refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

import msgspec

from mycel.dht.block.safetensor import INDEX, Tensor
from mycel.protocol.cid import CID_BYTES, Cid, cid_from, cid_text, cids_from
from mycel.protocol.errors import RemoteProtocolError, UsageProblem
from mycel.protocol.limits import DEFAULT_BLOCK_LIMITS

MODEL_PIN = "model/"
"""How the names begin under which models are pinned."""
EDGE = -1
"""The part that is no layer."""
FILE_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken")
"""Small files that a model needs: settings, a vocabulary, a template. None of them is run."""
ITEM_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U8": 8, "BOOL": 8,
    "U16": 16, "U32": 32, "U64": 64, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4, "C64": 64,
}  # fmt: skip
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_MODEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?")
NAME_CHARS_MAX = 200
_COUNTED = re.compile(r"^(.*?)(?:^|\.)(\d+)\.")
_LAYER_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


class Pieces(msgspec.Struct, frozen=True, array_like=True):
    """Bytes as blocks: all of the largest size but the last."""

    nbytes: int
    cids: bytes


class TensorPieces(msgspec.Struct, frozen=True, array_like=True):
    """A tensor's name, safetensors dtype, shape and bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: Pieces


class Part(msgspec.Struct, frozen=True, array_like=True):
    """The tensors of one layer, or of the edge, ordered by name."""

    version: int
    tensors: tuple[TensorPieces, ...]


class PartLink(msgspec.Struct, frozen=True, array_like=True):
    """Where a part is: `layer` or `EDGE`, the block with its list, and the bytes of list and tensors."""

    layer: int
    cid: bytes
    list_bytes: int
    nbytes: int


class Manifest(msgspec.Struct, frozen=True, array_like=True):
    """A model: what it calls itself, its fingerprint, its number of layers, small files, and parts."""

    version: int
    name: str
    fingerprint: str
    layers: int
    files: tuple[tuple[str, Pieces], ...]
    parts: tuple[PartLink, ...]


@dataclass(frozen=True, slots=True)
class Want:
    """A block to fetch. `nbytes` None where its size is not known before."""

    cid: Cid
    nbytes: int | None


VERSION = 1
_encoder = msgspec.msgpack.Encoder()
Listed = TypeVar("Listed", Manifest, Part)


def cut(nbytes: int) -> list[int]:
    """Sizes of the blocks of `nbytes`: none for nothing."""
    whole, rest = divmod(nbytes, DEFAULT_BLOCK_LIMITS.block_bytes)
    return [DEFAULT_BLOCK_LIMITS.block_bytes] * whole + ([rest] if rest else [])


def encode(listed: Manifest | Part) -> bytes:
    """The block that says so. Raises `UsageProblem` where it does not fit in one."""
    data = _encoder.encode(listed)
    if len(data) > DEFAULT_BLOCK_LIMITS.block_bytes:
        raise UsageProblem(
            f"a list of {len(data)} bytes does not fit in a block of {DEFAULT_BLOCK_LIMITS.block_bytes}: "
            "this model has more tensors than a manifest holds"
        )
    return data


def read_manifest(data: bytes) -> Manifest:
    """The root in a block, checked. Raises `RemoteProtocolError`."""
    manifest = _decode(data, Manifest)
    check_model_name(manifest.name)
    layers = [part.layer for part in manifest.parts]
    if layers != list(range(EDGE, manifest.layers)):
        raise RemoteProtocolError("a manifest names its parts once each, the edge first, then every layer")
    for part in manifest.parts:
        cid_from(part.cid)
        if not 0 < part.list_bytes <= DEFAULT_BLOCK_LIMITS.block_bytes or part.nbytes < 0:
            raise RemoteProtocolError(f"the size of part {part.layer} is out of bounds")
    seen: dict[str, None] = {}
    for name, pieces in manifest.files:
        check_file_name(name)
        if name in seen:
            raise RemoteProtocolError(f"file {name} is listed twice")
        seen[name] = None
        if pieces.nbytes > DEFAULT_BLOCK_LIMITS.file_bytes:
            raise RemoteProtocolError(f"file {name} of {pieces.nbytes} bytes is too large for a small file")
        check_pieces(name, pieces)
    return manifest


def read_part(data: bytes) -> Part:
    """A part's list in a block, checked: shapes, sizes and blocks agree. Raises `RemoteProtocolError`."""
    part = _decode(data, Part)
    names = [tensor.name for tensor in part.tensors]
    if any(a >= b for a, b in pairwise(names)):
        raise RemoteProtocolError("a part lists its tensors once each, by name")
    for tensor in part.tensors:
        bits = ITEM_BITS.get(tensor.dtype)
        if bits is None or any(side < 0 for side in tensor.shape):
            raise RemoteProtocolError(f"tensor {tensor.name!r}: {tensor.dtype!r} {tensor.shape} is no tensor")
        if math.prod(tensor.shape) * bits != tensor.pieces.nbytes * 8:
            raise RemoteProtocolError(f"tensor {tensor.name!r} has not the bytes that its shape asks for")
        check_pieces(tensor.name, tensor.pieces)
    return part


def _decode(data: bytes, kind: type[Listed]) -> Listed:
    try:
        listed = msgspec.msgpack.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise RemoteProtocolError(f"this block is no {kind.__name__.lower()} of a model: {error}") from None
    if listed.version != VERSION:
        raise RemoteProtocolError(
            f"a {kind.__name__.lower()} of version {listed.version}; this node reads {VERSION}: update it"
        )
    return listed


def check_pieces(name: str, pieces: Pieces) -> None:
    """Raise `RemoteProtocolError` where size and blocks do not agree."""
    if pieces.nbytes < 0 or len(pieces.cids) != len(cut(pieces.nbytes)) * CID_BYTES:
        raise RemoteProtocolError(f"{name!r}: {pieces.nbytes} bytes and the number of blocks do not agree")
    cids_from(pieces.cids)


def check_model_name(name: str) -> None:
    """Raise `RemoteProtocolError` for what is neither a plain name nor org/name."""
    if not _MODEL.fullmatch(name) or len(name) > NAME_CHARS_MAX:
        raise RemoteProtocolError(f"{name[:80]!r} is not the name of a model")


def check_file_name(name: str) -> None:
    """Raise `RemoteProtocolError` for a name that could lead elsewhere, hide, or be run."""
    if not _NAME.fullmatch(name) or not name.endswith(FILE_SUFFIXES) or name == INDEX:
        raise RemoteProtocolError(f"{name[:80]!r} is not the name of a model's small file")


def wants_of(pieces: Pieces) -> list[Want]:
    """The blocks of some bytes."""
    return [Want(cid, size) for cid, size in zip(cids_from(pieces.cids), cut(pieces.nbytes), strict=True)]


def lists_of(manifest: Manifest, layers: Iterable[int]) -> list[Want]:
    """The blocks with the lists of these parts (`EDGE` or a layer)."""
    return [Want(Cid(link.cid), link.list_bytes) for link in (manifest.parts[n + 1] for n in layers)]


def parts_for(manifest: Manifest, start: int, end: int) -> list[int]:
    """Parts that a stage of layers [start:end) needs: those, and the edge at either end of the model."""
    if not 0 <= start < end <= manifest.layers:
        raise UsageProblem(f"{manifest.name} has layers 0:{manifest.layers}; {start}:{end} is no span of it")
    edge = [EDGE] if start == 0 or end == manifest.layers else []
    return edge + list(range(start, end))


def unique(wants: Iterable[Want]) -> list[Want]:
    """Each block once, in order of first mention."""
    return list({want.cid: want for want in wants}.values())


def layer_count(config: Mapping[str, Any]) -> int | None:
    """How many layers a config.json says, in whatever words, None where it does not."""
    text = config.get("text_config")
    for settings in (text if isinstance(text, dict) else {}, config):
        for key in _LAYER_KEYS:
            value = settings.get(key)
            if isinstance(value, int) and value > 0:
                return value
    return None


def by_part(tensors: Sequence[Tensor], layers: int | None) -> list[list[Tensor]]:
    """Tensors by part, the edge first, each ordered by name; `layers` as the config says it.

    Layers beyond those the config counts (for predicting further tokens) belong to the edge.
    """
    weights: dict[str, int] = {}
    indices: dict[str, dict[int, None]] = {}
    places = {tensor.name: _COUNTED.match(tensor.name) for tensor in tensors}
    for tensor in tensors:
        place = places[tensor.name]
        if place is not None:
            weights[place[1]] = weights.get(place[1], 0) + tensor.nbytes
            indices.setdefault(place[1], {})[int(place[2])] = None
    lists = [p for p in sorted(weights) if all(n in indices[p] for n in range(layers or len(indices[p])))]
    chosen = max(lists, key=lambda path: weights[path], default=None)
    count = 0 if chosen is None else layers or len(indices[chosen])
    parts: list[list[Tensor]] = [[] for _ in range(count + 1)]
    for tensor in sorted(tensors, key=lambda tensor: tensor.name):
        place = places[tensor.name]
        layer = int(place[2]) if place is not None and place[1] == chosen else EDGE
        parts[layer + 1 if layer < count else 0].append(tensor)
    return parts


def pin_name(root: Cid) -> str:
    """Under which a store keeps the blocks of a model."""
    return MODEL_PIN + cid_text(root)
