"""Models through blocks: from a directory to a peer's, of which stages load as from the original."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import torch
import trio
from safetensors.torch import load_file, save_file

from mycel.compute.engine import Span
from mycel.compute.model.card import describe, read_card
from mycel.compute.model.load import load_weights
from mycel.compute.model.tiny import tiny_model
from mycel.dht.block.add import add_model
from mycel.dht.block.disk import DiskStore
from mycel.dht.block.exchange import Exchange
from mycel.dht.block.manifest import EDGE, pin_name, read_manifest
from mycel.dht.block.memory import MemoryStore
from mycel.dht.block.model import Model, fetch_model, lay_out, read_model
from mycel.dht.block.safetensor import read_tensors
from mycel.protocol.cid import Cid, cid_of, cid_text
from mycel.protocol.errors import LimitExceeded, RemoteProtocolError, UsageProblem
from mycel.simnet.mesh import MeshOptions, mesh_world


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of four layers in several shards, its embeddings tied to its head."""
    return tiny_model(tmp_path_factory.mktemp("models") / "tiny", "llama-tied", seed=2, shard_size="20KB")


@asynccontextmanager
async def seed_and_peer(folder: Path) -> AsyncIterator[tuple[DiskStore, Exchange, DiskStore]]:
    """A seed's store, a peer's exchange, and the peer's store."""
    stores = [DiskStore(folder / name) for name in ("seed", "peer")]
    async with mesh_world(MeshOptions(latency_s_min=0.0001, latency_s_max=0.0002)) as world:
        seed, peer = world.add("seed"), world.add("peer")
        Exchange(seed, stores[0])
        await peer.connect(seed.listen_addrs)
        with trio.fail_after(60):
            yield stores[0], Exchange(peer, stores[1]), stores[1]
    for store in stores:
        store.close()


async def add(store: DiskStore | MemoryStore, path: Path) -> Cid:
    return await add_model(store, path, name="org/tiny", fingerprint=read_card(str(path)).fingerprint)


def weights(path: Path, span: Span) -> dict[str, torch.Tensor]:
    described = describe(str(path))
    model = load_weights(described, span, torch.float32, lambda fraction, what: None)
    return dict(model.state_dict())


def bytes_of(path: Path) -> int:
    return sum(tensor.nbytes for file in path.glob("*.safetensors") for tensor in read_tensors(file))


@pytest.mark.parametrize(("start", "end"), [(1, 3), (0, 2), (2, 4), (0, 4)])
async def test_layers_from_blocks_load_as_from_the_original(
    original: Path, tmp_path: Path, start: int, end: int
) -> None:
    async with seed_and_peer(tmp_path) as (seed, exchange, store):
        root = await add(seed, original)
        model = await fetch_model(exchange, root, (start, end))
        made = await lay_out(store, model, tmp_path / "models")
        assert made == tmp_path / "models" / cid_text(root) / "tiny"
        ours, theirs = weights(made, Span(start, end)), weights(original, Span(start, end))
        assert list(ours) == list(theirs)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert read_card(str(made)).fingerprint == read_card(str(original)).fingerprint
        if (start, end) == (1, 3):
            layer = model.manifest.parts[2].nbytes
            assert bytes_of(made) == 2 * layer
            assert exchange.bytes_received < 2 * layer + 20_000
        if (start, end) == (0, 4):
            assert bytes_of(made) == bytes_of(original)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neo", "bloom", "mpt", "falcon", "mamba", "qwen3_moe", "opt"])
async def test_layers_are_found_in_every_familys_names(tmp_path: Path, family: str) -> None:
    store = MemoryStore()
    root = await add(store, tiny_model(tmp_path / "m", family, layers=4))
    manifest = read_manifest(await store.get(root) or b"")
    assert manifest.layers == 4
    sizes = [part.nbytes for part in manifest.parts[1:]]
    assert max(sizes) < 1.5 * min(sizes)
    assert min(sizes) > 0


async def test_more_layers_later_stand_beside_those_that_are_there(original: Path, tmp_path: Path) -> None:
    async with seed_and_peer(tmp_path) as (seed, exchange, store):
        root = await add(seed, original)
        made = await lay_out(store, await fetch_model(exchange, root, (1, 2)), tmp_path / "models")
        before = {path.name: path.stat().st_ino for path in made.glob("*.safetensors")}
        received = exchange.bytes_received
        await lay_out(store, await fetch_model(exchange, root, (1, 3)), tmp_path / "models")
        after = {path.name: path.stat().st_ino for path in made.glob("*.safetensors")}
        assert (len(before), len(after)) == (1, 2)
        assert after.items() >= before.items()
        weights(made, Span(1, 3))
        assert exchange.bytes_received - received < received
        assert len(store.pinned(pin_name(root))) == len(dict.fromkeys(store.pinned(pin_name(root))))
        assert all(store.has(cid) for cid in store.pinned(pin_name(root)))


def fine_tune(original: Path, tuned: Path, changed: str) -> Path:
    """The model with one tensor changed, in one file and another order."""
    tuned.mkdir()
    files = sorted(original.glob("*.safetensors"))
    tensors = {name: value for file in files for name, value in load_file(file).items()}
    tensors[changed] = tensors[changed] + 1
    save_file(tensors, tuned / "model.safetensors", {"format": "pt"})
    (tuned / "config.json").write_bytes((original / "config.json").read_bytes())
    return tuned


async def test_laid_out_tensors_of_whole_pages_stand_at_pages_and_all_at_their_items(tmp_path: Path) -> None:
    """What can share its extents with its block stands where it does."""
    source = tmp_path / "m"
    source.mkdir()
    (source / "config.json").write_text(json.dumps({"num_hidden_layers": 1}))
    shapes = {
        "a": (3, torch.int8),
        "b": (2048, torch.float32),
        "c": (5, torch.float64),
        "d": (4096, torch.int8),
    }
    tensors = {f"layers.0.{n}": torch.arange(k, dtype=torch.float32).to(t) for n, (k, t) in shapes.items()}
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    store = MemoryStore()
    root = await add_model(store, source, name="m", fingerprint="f")
    model = await read_model(store, root)
    assert model is not None
    made = await lay_out(store, model, tmp_path / "out")
    (file,) = made.glob("layer-*.safetensors")
    places = {tensor.name[-1]: tensor.offset for tensor in read_tensors(file)}
    assert (places["b"] % 4096, places["d"] % 4096, places["c"] % 8) == (0, 0, 0)
    assert max(places["b"], places["d"]) < min(places["c"], places["a"])
    found = load_file(file)
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


async def test_two_fine_tunes_share_what_is_equal(original: Path, tmp_path: Path) -> None:
    tuned = fine_tune(original, tmp_path / "tuned", "model.layers.1.mlp.up_proj.weight")
    store = MemoryStore()
    first = await add(store, original)
    count = len(store.shelf)
    second = await add(store, tuned)
    assert first != second
    assert len(store.shelf) == count + 3, "the tensor, its layer's list, and the root"
    a, b = [read_manifest(await store.get(root) or b"") for root in (first, second)]
    same = [x.cid == y.cid for x, y in zip(a.parts, b.parts, strict=True)]
    assert same == [True, True, False, True, True]


async def test_adding_again_changes_nothing_and_says_how_far_it_is(original: Path) -> None:
    store = MemoryStore()
    steps: list[tuple[str, int, int]] = []
    options = {"name": "m", "fingerprint": "f"}
    root = await add_model(
        store, original, **options, progress=lambda what, done, total: steps.append((what, done, total))
    )
    whole = bytes_of(original)
    assert [step for step in steps if step[0] == "hashing"][-1] == ("hashing", whole, whole)
    assert steps[-1][0] == "copying"
    assert steps[-1][1] == steps[-1][2]
    count = len(store.shelf)
    assert await add_model(store, original, **options) == root
    assert len(store.shelf) == count


async def test_a_model_that_does_not_fit_is_not_pinned(original: Path) -> None:
    store = MemoryStore(quota_bytes=20_000)
    with pytest.raises(LimitExceeded):
        await add_model(store, original, name="m", fingerprint="f")
    assert store.shelf.pins == {}


async def test_what_is_no_model_is_refused_with_a_reason(original: Path, tmp_path: Path) -> None:
    store = MemoryStore()
    for name in ("", "../x", "a/b/c"):
        with pytest.raises(UsageProblem, match="not the name of a model"):
            await add_model(store, original, name=name, fingerprint="f")
    with pytest.raises(UsageProblem, match=r"config\.json"):
        await add_model(store, tmp_path, name="m", fingerprint="f")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UsageProblem, match="holds neither"):
        await add_model(store, tmp_path, name="m", fingerprint="f")
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(UsageProblem, match="cut short"):
        await add_model(store, tmp_path, name="m", fingerprint="f")
    header = json.dumps({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(15))
    with pytest.raises(UsageProblem, match="tensor w lies outside"):
        await add_model(store, tmp_path, name="m", fingerprint="f")


async def test_a_root_that_is_no_manifest_is_refused_and_not_pinned(tmp_path: Path) -> None:
    async with seed_and_peer(tmp_path) as (seed, exchange, store):
        noise = b"no manifest"
        await seed.put(cid_of(noise), noise)
        with pytest.raises(RemoteProtocolError, match="no manifest"):
            await fetch_model(exchange, cid_of(noise))
        assert store.shelf.pins == {}


async def test_a_span_outside_the_model_is_refused(original: Path, tmp_path: Path) -> None:
    async with seed_and_peer(tmp_path) as (seed, exchange, _):
        with pytest.raises(UsageProblem, match="layers 0:4"):
            await fetch_model(exchange, await add(seed, original), (3, 5))


async def test_a_block_that_is_gone_is_told_of(original: Path, tmp_path: Path) -> None:
    store = MemoryStore()
    root = await add(store, original)
    manifest = read_manifest(await store.get(root) or b"")
    model = Model(root, manifest, {})
    del store._blocks[Cid(manifest.files[0][1].cids)]
    with pytest.raises(UsageProblem, match="get the model again"):
        await lay_out(store, model, tmp_path)
    assert manifest.parts[0].layer == EDGE
