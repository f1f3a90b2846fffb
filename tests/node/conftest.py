"""Whole nodes in this process over real sockets: tiny model, inline engine, HTTP faces."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio

from mycel.compute.inline import InlineEngine
from mycel.compute.model.tiny import tiny_model
from mycel.compute.tokenizer import byte_level_tokenizer_files
from mycel.dht.block.memory import memory_store
from mycel.dht.doc.store import DocumentStore, VolatileStore
from mycel.node import daemon
from mycel.node.blocks import OpenStore
from mycel.node.config import Config
from mycel.node.memory import FolderMemory
from mycel.node.running import Node
from mycel.node.settings import resolve
from mycel.node.tcp import TcpNetwork
from mycel.node.trust import join_swarm, open_trust
from mycel.node.views import TicketAsk
from mycel.node.web import serve_web
from mycel.protocol.ticket import parse_ticket

NodeMaker = Callable[..., AbstractAsyncContextManager[Node]]


@pytest.fixture(scope="session")
def byte_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 4 layers that reads and writes bytes."""
    folder = tiny_model(
        tmp_path_factory.mktemp("models") / "tiny", seed=3, vocab_size=257, max_position_embeddings=512
    )
    for name, content in byte_level_tokenizer_files().items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def make_node(tmp_path: Path) -> NodeMaker:
    """`async with make_node("name", ticket=..., web=True, **settings) as node`.

    A step of its engine takes at least `step_s` seconds. `store` keeps its documents, `open_store` opens its
    store of blocks.
    """

    @asynccontextmanager
    async def make(
        name: str,
        *,
        ticket: str | None = None,
        web: bool = False,
        step_s: float = 0.0,
        store: DocumentStore | None = None,
        open_store: OpenStore = memory_store,
        **settings: object,
    ) -> AsyncIterator[Node]:
        flags = {"home": str(tmp_path / name), "label": name, "preset": "local", "assign": False, **settings}
        config: Config = resolve(flags, {})
        network = TcpNetwork()
        memory = FolderMemory(config.home)
        if ticket is None:
            trust = open_trust(config.home, now=network.wall(), entropy=network.entropy)
            bootstrap: tuple[object, ...] = ()
        else:
            parsed = parse_ticket(ticket)
            trust = join_swarm(config.home, parsed, now=network.wall(), entropy=network.entropy)
            bootstrap = parsed.bootstrap
        kept = (store or VolatileStore(), open_store)
        papers = daemon.Papers(trust.identity, trust.credentials, trust.keep, memory, bootstrap, *kept)  # type: ignore[arg-type]
        async with trio.open_nursery() as nursery:
            engine = partial(InlineEngine, cost=lambda works: step_s)
            node: Node = await nursery.start(daemon.run, config, network, engine, papers)
            if web:
                await nursery.start(serve_web, node, memory)
            yield node
            nursery.cancel_scope.cancel()

    return make


async def until(is_true: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait until `is_true()`; looked at often, given up late."""
    with trio.fail_after(seconds):
        while not is_true():  # noqa: ASYNC110 what is waited for has no event to offer
            await trio.sleep(0.01)


@pytest.fixture
def ticket_of() -> Callable[[Node], str]:
    """A fresh member's ticket of a node."""
    return lambda node: node.issue_ticket(TicketAsk()).text


@pytest.fixture
def wait_until() -> Callable[[Callable[[], bool]], Awaitable[None]]:
    """See `until`."""
    return until
