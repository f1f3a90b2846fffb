"""Manifests: what is equal has equal names, layers are found, and what a peer makes up is refused."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mycel.dht.block.manifest import (
    EDGE,
    VERSION,
    Manifest,
    Part,
    PartLink,
    Pieces,
    TensorPieces,
    Want,
    by_part,
    cut,
    encode,
    layer_count,
    lists_of,
    parts_for,
    read_manifest,
    read_part,
    unique,
    wants_of,
)
from mycel.dht.block.safetensor import Tensor
from mycel.protocol.cid import cid_of
from mycel.protocol.errors import RemoteProtocolError, UsageProblem
from mycel.protocol.limits import DEFAULT_BLOCK_LIMITS

BLOCK = DEFAULT_BLOCK_LIMITS.block_bytes


def pieces_of(nbytes: int) -> Pieces:
    return Pieces(nbytes, b"".join(cid_of(bytes([n])) for n, _ in enumerate(cut(nbytes))))


def manifest(**changes: object) -> Manifest:
    links = tuple(PartLink(layer, cid_of(bytes([layer + 1])), 10, 100) for layer in range(EDGE, 3))
    whole = Manifest(VERSION, "m", "print", 3, (("config.json", pieces_of(5)),), links)
    return msgspec.structs.replace(whole, **changes)


def tensors(*names: str, nbytes: int = 8) -> list[Tensor]:
    return [Tensor(name, "F32", (nbytes // 4,), nbytes, Path("f"), 0) for name in names]


@given(st.integers(0, 5 * BLOCK))
def test_a_cut_covers_all_and_no_piece_is_empty(nbytes: int) -> None:
    sizes = cut(nbytes)
    assert sum(sizes) == nbytes
    assert all(0 < size <= BLOCK for size in sizes)
    assert all(size == BLOCK for size in sizes[:-1])


def test_lists_read_what_was_written() -> None:
    assert read_manifest(encode(manifest())) == manifest()
    part = Part(
        VERSION,
        (TensorPieces("a", "BF16", (2, 3), pieces_of(12)), TensorPieces("b", "F4", (3,), pieces_of(0))),
    )
    with pytest.raises(RemoteProtocolError, match="bytes that its shape"):
        read_part(encode(part))
    good = Part(VERSION, (part.tensors[0],))
    assert read_part(encode(good)) == good
    assert wants_of(good.tensors[0].pieces) == [Want(cid_of(b"\0"), 12)]


@pytest.mark.parametrize(
    "name",
    ["../config.json", "/etc/x.json", ".hidden.json", "a/b.json", "modeling.py", "w.safetensors", "",
     "a\0.json", "x" * 130 + ".json", "pytorch_model.bin", "model.safetensors.index.json"],
)  # fmt: skip
def test_files_that_lead_elsewhere_or_run_are_refused(name: str) -> None:
    with pytest.raises(RemoteProtocolError, match="small file"):
        read_manifest(encode(manifest(files=((name, pieces_of(5)),))))


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 2},
        {"layers": 2},
        {"name": "../../x"},
        {"name": "a/b/c"},
        {"name": ""},
        {"parts": ()},
        {"files": (("a.json", pieces_of(5)), ("a.json", pieces_of(5)))},
        {"files": (("a.json", Pieces(5, b"")),)},
        {"files": (("a.json", Pieces(-1, b"")),)},
        {"files": (("a.json", Pieces(1 << 40, b"")),)},
        {"files": (("a.json", Pieces(5, bytes(36))),)},
        {"parts": tuple(PartLink(layer, b"short", 10, 100) for layer in range(EDGE, 3))},
        {"parts": tuple(PartLink(layer, cid_of(b""), BLOCK + 1, 100) for layer in range(EDGE, 3))},
    ],
)
def test_manifests_that_do_not_agree_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(RemoteProtocolError):
        read_manifest(encode(manifest(**changes)))


@pytest.mark.parametrize(
    "listed",
    [
        (TensorPieces("b", "F32", (), pieces_of(4)), TensorPieces("a", "F32", (), pieces_of(4))),
        (TensorPieces("a", "F32", (), pieces_of(4)),) * 2,
        (TensorPieces("a", "object", (1,), pieces_of(4)),),
        (TensorPieces("a", "F32", (-1, -1), pieces_of(4)),),
        (TensorPieces("a", "F32", (1,), Pieces(4, b"")),),
    ],
)
def test_parts_that_do_not_agree_are_refused(listed: tuple[TensorPieces, ...]) -> None:
    with pytest.raises(RemoteProtocolError):
        read_part(encode(Part(VERSION, listed)))


@given(st.binary(max_size=200))
def test_noise_is_no_manifest(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        read_manifest(data)
    with pytest.raises(RemoteProtocolError):
        read_part(data)


def test_a_list_too_long_for_a_block_says_so() -> None:
    huge = Part(VERSION, (TensorPieces("x" * (BLOCK + 1), "F32", (), pieces_of(4)),))
    with pytest.raises(UsageProblem, match="does not fit"):
        encode(huge)


def test_layers_are_the_longest_list_that_names_count_through() -> None:
    found = by_part(
        [
            *tensors("model.embed.weight", "head.weight"),
            *tensors(
                *(f"model.layers.{n}.mlp.experts.{e}.w" for n in range(3) for e in range(2)), nbytes=400
            ),
            *tensors(*(f"vision.blocks.{n}.w" for n in range(4))),
        ],
        3,
    )
    assert [len(part) for part in found] == [2 + 4, 2, 2, 2]
    assert [tensor.name for tensor in found[3]] == [
        "model.layers.2.mlp.experts.0.w",
        "model.layers.2.mlp.experts.1.w",
    ]


def test_layers_beyond_the_configs_belong_to_the_edge() -> None:
    found = by_part(tensors("h.0.w", "h.1.w", "h.2.w", "wte"), 2)
    assert [[tensor.name for tensor in part] for part in found] == [["h.2.w", "wte"], ["h.0.w"], ["h.1.w"]]
    assert len(by_part(tensors("h.0.w", "h.1.w"), None)) == 3
    assert len(by_part(tensors("wte"), None)) == 1


def test_the_config_says_how_many_layers() -> None:
    assert layer_count({"n_layer": 12}) == 12
    assert layer_count({"num_hidden_layers": 2, "text_config": {"num_hidden_layers": 7}}) == 7
    assert layer_count({"hidden_size": 3}) is None


def test_a_stage_needs_its_layers_and_at_the_ends_the_edge() -> None:
    model = manifest()
    assert parts_for(model, 1, 2) == [1]
    assert parts_for(model, 0, 1) == [EDGE, 0]
    assert parts_for(model, 1, 3) == [EDGE, 1, 2]
    assert [want.cid for want in lists_of(model, [EDGE, 2])] == [cid_of(b"\0"), cid_of(b"\3")]
    with pytest.raises(UsageProblem, match="0:3"):
        parts_for(model, 2, 4)
    assert unique([Want(cid_of(b"a"), 1), Want(cid_of(b"a"), 1)]) == [Want(cid_of(b"a"), 1)]
