"""Models as blocks between whole nodes: added at one, fetched and served by others, by name alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from mycel.compute.infer.request import GenerateRequest
from mycel.compute.model.tiny import tiny_model
from mycel.compute.tokenizer import byte_level_tokenizer_files
from mycel.dht.block.manifest import pin_name
from mycel.node import catalog
from mycel.node.blocks import store_in
from mycel.node.catalog import spans_of
from mycel.node.client import Client, ControlError
from mycel.node.metrics import render
from mycel.node.running import Node
from mycel.protocol.cid import Cid
from mycel.protocol.errors import UsageProblem

NodeMaker = Callable[..., AbstractAsyncContextManager[Node]]
TicketOf = Callable[[Node], str]
WaitUntil = Callable[[Callable[[], bool]], Awaitable[None]]


async def generate(node: Node, model: str) -> str:
    request = GenerateRequest(model=model, prompt="def ", max_tokens=24)
    async with node.generator.generate(request) as generation:
        return "".join([piece.text async for piece in generation])


def client_of(node: Node) -> Client:
    return Client(node.config.home)


def weight_files(node: Node) -> list[str]:
    """Beginnings of the names of the files that the node's first stage is loaded from."""
    return sorted(path.name[:11] for path in Path(node.lender.lent[0].place).glob("*.safetensors"))


def copy_with(model: Path, to: Path, **settings: object) -> Path:
    """A copy of the model with other settings in its config."""
    shutil.copytree(model, to)
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**config, **settings}))
    return to


def held(node: Node, root: Cid) -> object:
    fact = node.catalog.known()[root].get(node.host.peer_id)
    return None if fact is None else (fact.held, fact.edge)


async def test_layers_are_served_by_name_from_others_blocks(
    make_node: NodeMaker, ticket_of: TicketOf, wait_until: WaitUntil, byte_model: Path
) -> None:
    """Each has its layers' blocks and files alone, what it fetched it shares, and the text is the same."""
    async with AsyncExitStack() as stack:
        a = await stack.enter_async_context(make_node("a"))
        await a.serve(str(byte_model), None)
        whole = await generate(a, "tiny")
        await a.lender.drop(a.lender.lent[0])
        root = await a.catalog.add(byte_model, "org/tiny")
        assert held(a, root) == (((0, 4),), True)
        b = await stack.enter_async_context(make_node("b", ticket=ticket_of(a), stages=2))
        c = await stack.enter_async_context(make_node("c", ticket=ticket_of(a), stages=2))
        await wait_until(lambda: b.catalog.find("tiny") == root == c.catalog.find("org/tiny"))
        await b.serve("tiny", None)
        assert held(b, root) == (((0, 2),), True)
        await wait_until(lambda: bool(c.generator.models()))
        await c.serve("org/tiny", None)
        assert held(c, root) == (((2, 4),), True)
        exchange = await c.blocks.exchange()
        assert len(exchange.store.pinned(pin_name(root))) < len(
            (await a.blocks.exchange()).store.pinned(pin_name(root))
        )
        assert [name[:5] for name in weight_files(c)] == ["edge-", "layer", "layer"]
        assert weight_files(c)[1:] == ["layer-00002", "layer-00003"]
        await wait_until(lambda: bool(a.models()) and a.models()[0].complete)
        assert a.models()[0].name == "org/tiny"
        assert await generate(a, "org/tiny") == whole
        assert {view.label for view in a.models()[0].holders} == {"b", "c"}


async def test_a_newcomer_takes_the_swarms_layers_and_survivors_fetch_those_of_the_dead(
    make_node: NodeMaker, ticket_of: TicketOf, wait_until: WaitUntil, byte_model: Path
) -> None:
    """`b` has half of the model; the others take what is missing from `a`, who only keeps blocks."""
    settings = {"assign": True, "memory_bytes": "1MiB"}
    async with AsyncExitStack() as stack:
        a = await stack.enter_async_context(make_node("a"))
        root = await a.catalog.add(byte_model, "tiny")
        b = await stack.enter_async_context(make_node("b", ticket=ticket_of(a), stages=2, **settings))
        await b.serve("tiny", (0, 2))  # at once: it waits until `a` told of it
        nursery = await stack.enter_async_context(trio.open_nursery())
        stack.callback(nursery.cancel_scope.cancel)

        async def come_and_go() -> None:
            async with make_node("c", ticket=ticket_of(a), stages=2, **settings):
                await wait_until(lambda: bool(a.models()) and a.models()[0].complete)

        await come_and_go()
        await wait_until(lambda: held(b, root) == (((0, 4),), True))
        await wait_until(lambda: a.models()[0].complete)
        assert {view.label for view in a.models()[0].holders} == {"b"}
        assert len(await generate(a, "tiny")) > 0


async def test_kept_models_are_added_got_listed_and_removed(
    make_node: NodeMaker, ticket_of: TicketOf, wait_until: WaitUntil, byte_model: Path, tmp_path: Path
) -> None:
    async with (
        make_node("a", web=True) as a,
        make_node("b", web=True, ticket=ticket_of(a)) as b,
    ):

        async def ask(node: Node, path: str, content: object) -> list[dict[str, Any]]:
            return await trio.to_thread.run_sync(
                lambda: list(client_of(node).lines(f"models/{path}", content))
            )

        async def kept(node: Node) -> Any:
            return await trio.to_thread.run_sync(partial(client_of(node).get, "models/kept"))

        told = (await ask(a, "add", {"directory": str(byte_model), "name": "tiny"}))[-1]["result"]
        assert (told["name"], told["layers"], told["here"]["held"]) == ("tiny", 4, [[0, 4]])
        await wait_until(lambda: b.catalog.find("tiny") is not None)
        got = (await ask(b, "get", {"model": "tiny", "layers": [1, 2]}))[-1]["result"]
        assert (got["root"], got["here"]["held"], got["here"]["edge"]) == (told["root"], [[1, 2]], False)
        await wait_until(lambda: len(a.catalog.known()[next(iter(a.catalog.known()))]) == 2)
        (one,) = await kept(a)
        assert [keeper["label"] for keeper in one["others"]] == ["b"]
        with pytest.raises(ControlError, match="layers 0:4"):
            await ask(b, "get", {"model": told["root"], "layers": [3, 9]})
        with pytest.raises(ControlError, match="no connected member keeps nothing"):
            await ask(b, "get", {"model": "nothing"})
        with pytest.raises(ControlError, match="holds neither"):
            await ask(b, "add", {"directory": str(tmp_path), "name": "x"})
        await trio.to_thread.run_sync(client_of(b).post, "models/remove", {"model": "tiny"})
        (one,) = await kept(b)
        assert one["here"] is None
        assert not (await b.blocks.exchange()).store.pins()


async def test_a_node_that_ended_in_mid_fetch_goes_on_where_it_was(
    make_node: NodeMaker, ticket_of: TicketOf, wait_until: WaitUntil, byte_model: Path, tmp_path: Path
) -> None:
    disk = partial(store_in, tmp_path / "blocks", 0)
    async with make_node("a", upload_bytes_per_s=100_000) as a:
        root = await a.catalog.add(byte_model, "tiny")
        total = (await a.blocks.exchange()).store.used_bytes
        async with make_node("b", ticket=ticket_of(a), open_store=disk) as b, trio.open_nursery() as nursery:
            exchange = await b.blocks.exchange()
            nursery.start_soon(b.catalog.get, root, None)
            await wait_until(lambda: exchange.bytes_received > total / 4)
            nursery.cancel_scope.cancel()
        async with make_node("b", ticket=ticket_of(a), open_store=disk) as b:
            exchange = await b.blocks.exchange()
            await b.catalog.looked.wait()
            kept = exchange.store.used_bytes
            assert total / 4 < kept < total
            assert held(b, root) != (((0, 4),), True)
            await b.catalog.get(root, None)
            assert held(b, root) == (((0, 4),), True)
            assert exchange.bytes_received == total - kept
            assert exchange.store.quota_bytes > 0


async def test_a_model_is_found_by_its_root_where_no_fact_tells_of_it(
    make_node: NodeMaker, ticket_of: TicketOf, byte_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalog, "ROOTS_MAX", 0)
    async with make_node("a") as a, make_node("b", ticket=ticket_of(a)) as b:
        root = await a.catalog.add(byte_model, "tiny")
        assert b.catalog.providers is not None
        with trio.fail_after(30):
            while await b.catalog.providers.meet(root, []) != [a.host.peer_id]:  # noqa: ASYNC110 told later
                await trio.sleep(0.05)
            await b.catalog.get(root, (0, 1))
        assert held(b, root) == (((0, 1),), True)


async def test_a_name_that_several_have_is_told_apart_by_root(
    make_node: NodeMaker, byte_model: Path, tmp_path: Path
) -> None:
    other = copy_with(byte_model, tmp_path / "other", bos_token_id=7)
    async with make_node("a") as a:
        first, second = await a.catalog.add(byte_model, "tiny"), await a.catalog.add(other, "org/tiny")
        assert a.catalog.find("org/tiny") == second
        assert a.catalog.find("tiny") == first
        third = await a.catalog.add(other, "tiny")
        assert len({first, second, third}) == 3
        with pytest.raises(UsageProblem, match="say which by its root"):
            a.catalog.find("tiny")
        assert a.catalog.find("nobody/has-it") is None


async def test_two_fine_tunes_of_one_shape_are_not_taken_for_each_other(
    make_node: NodeMaker, ticket_of: TicketOf, wait_until: WaitUntil, byte_model: Path, tmp_path: Path
) -> None:
    tuned = tiny_model(tmp_path / "tuned", seed=4, vocab_size=257, max_position_embeddings=512)
    shutil.copy(byte_model / "config.json", tuned)
    for name, content in byte_level_tokenizer_files().items():
        (tuned / name).write_bytes(content)
    async with make_node("a") as a, make_node("b", ticket=ticket_of(a)) as b:
        first = await a.catalog.add(byte_model, "tiny")
        await a.catalog.add(byte_model, "again")
        fingerprint = a.catalog.known()[first][a.host.peer_id].fingerprint
        await wait_until(lambda: b.catalog.find_same(fingerprint) is not None)
        second = await b.catalog.add(tuned, "tuned")
        assert b.catalog.known()[second][b.host.peer_id].fingerprint == fingerprint
        assert b.catalog.find_same(fingerprint) is None
        with pytest.raises(UsageProblem, match="differ in their weights alone"):
            await b.serve("tuned", (0, 2))
        assert b.lender.lent == []
        await b.catalog.remove(second)
        assert (await b.serve("again", (0, 2))).fingerprint == fingerprint


async def test_bytes_of_one_node_are_fetched_by_another(
    make_node: NodeMaker, ticket_of: TicketOf, wait_until: WaitUntil, tmp_path: Path
) -> None:
    (tmp_path / "artefact").write_bytes(b"weights" * 400_000)
    async with make_node("a") as a, make_node("b", ticket=ticket_of(a)) as b:
        await wait_until(lambda: a.host.peer_id in b.host.peers)
        cid = await a.blocks.add_bytes(b"value", pin="record x")
        root = await a.blocks.add_file(tmp_path / "artefact", pin="job/1")
        with trio.fail_after(20):
            assert await b.blocks.fetch(cid, [a.host.peer_id]) == b"value"
            await b.blocks.fetch_file(root, tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == (tmp_path / "artefact").read_bytes()
        told = render(b).splitlines()
        assert "mycel_blocks_received_total 4" in told
        assert "mycel_blocks_corrupt_total 0" in told


@pytest.mark.parametrize(
    ("layers", "spans"),
    [([], ()), ([2], ((2, 3),)), ([0, 1, 2], ((0, 3),)), ([0, 2, 3, 7], ((0, 1), (2, 4), (7, 8)))],
)
def test_layers_become_spans(layers: list[int], spans: object) -> None:
    assert spans_of(layers) == spans
