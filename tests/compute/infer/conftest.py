"""A swarm in virtual time: real services and real tiny models over the simulated mesh."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import trio
from transformers import AutoModelForCausalLM

from mycel.compute.engine import Span, StageInfo, StageSpec, Work
from mycel.compute.infer.generate import Generator
from mycel.compute.infer.links import Links
from mycel.compute.infer.pace import Timing
from mycel.compute.infer.serve import ServeOptions, StageServer
from mycel.compute.inline import InlineEngine
from mycel.compute.model.tiny import tiny_model
from mycel.compute.tokenizer import byte_level_tokenizer_files
from mycel.dht.board import SwarmBoard
from mycel.protocol.mesh import Access, PeerId
from mycel.protocol.rpc import Rpc
from mycel.simnet.mesh import MeshOptions, MeshWorld, SimMesh, mesh_world

ROW_S = 0.002
"""Virtual seconds of one layer of a step."""


def step_cost(works: Sequence[Work]) -> float:
    """Each layer costs; more rows cost little more."""
    layers = max(work.span.end - work.span.start for work in works)
    return layers * ROW_S * (1 + 0.05 * len(works))


class Node:
    """One node's services."""

    def __init__(self, swarm: Swarm, mesh: SimMesh, timing: Timing) -> None:
        self.mesh = mesh
        self.rpc = Rpc(mesh)
        self.board = SwarmBoard(mesh)
        self.links = Links(mesh)
        self.stages = StageServer(self.links, self.rpc, self.board)
        self.generator = Generator(self.links, self.rpc, self.board, timing)
        self.engines: list[InlineEngine] = []
        self.cost: Callable[[Sequence[Work]], float] = step_cost
        self.scope = trio.CancelScope()
        self._swarm = swarm

    @property
    def peer(self) -> PeerId:
        return self.mesh.peer_id

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        with self.scope:
            async with trio.open_nursery() as nursery:
                for service in (self.rpc.run, self.board.run, self.links.run):
                    await nursery.start(service)
                await nursery.start(self.stages.run)
                await nursery.start(self.generator.run)
                task_status.started()

    def start_engine(self) -> InlineEngine:
        engine = InlineEngine(cost=lambda works: self.cost(works), load_s=0.05)
        self.engines.append(engine)
        return engine

    async def serve(
        self, model: Path, start: int | None = None, end: int | None = None, **options: object
    ) -> StageInfo:
        span = None if start is None or end is None else Span(start, end)
        spec = StageSpec(str(model), span, dtype="float32", device="cpu")
        return await self.stages.serve(spec, self.start_engine, ServeOptions(**options))  # type: ignore[arg-type]

    @property
    def rows(self) -> int:
        return self.stages.totals.rows_computed

    @property
    def open_sessions(self) -> int:
        return sum(len(stage.sessions) for stage in self.stages.stages)

    async def kv_sessions(self) -> int:
        """Sessions with a cache in the engine that runs now."""
        return (await self.engines[-1].stats()).sessions if self.engines else 0

    def kill(self) -> None:
        """The daemon dies as by SIGKILL: its kernel resets its connections."""
        self._swarm.world.kill(self.mesh)
        self.scope.cancel()

    def silence(self) -> None:
        """The machine falls off the net without a word."""
        self._swarm.world.silence(self.mesh)


class Swarm:
    """Nodes that know each other."""

    def __init__(self, world: MeshWorld, nursery: trio.Nursery) -> None:
        self.world = world
        self.nodes: list[Node] = []
        self._nursery = nursery

    async def add(self, timing: Timing = Timing(), access: Access = Access.MEMBER) -> Node:
        """One more node, connected to all others."""
        node = Node(self, self.world.add(f"n{len(self.nodes)}", access=access), timing)
        await self._nursery.start(node.run)
        for other in self.nodes:
            if other.mesh.is_alive:
                await node.mesh.connect(other.mesh.listen_addrs)
        self.nodes.append(node)
        return node

    async def stages(
        self, model: Path, cuts: Sequence[int], spares: int = 0, **options: object
    ) -> list[Node]:
        """An owner without layers, then one node per piece of the model, then spares that hold all of it."""
        owner = await self.add(**options)  # type: ignore[arg-type]
        nodes = [owner]
        for start, end in pairwise(cuts):
            node = await self.add()
            await node.serve(model, start, end)
            nodes.append(node)
        for _ in range(spares):
            node = await self.add()
            await node.serve(model, cuts[0], cuts[-1], standby=True)
            nodes.append(node)
        await self.see(owner, len(nodes) - 1)
        return nodes

    async def see(self, node: Node, holders: int) -> None:
        """Wait until `node` sees that many ready holders."""
        async with node.board.watch("") as changes:
            while sum(h.state == "ready" for m in node.generator.models() for h in m.holders) < holders:
                await changes.__anext__()


SwarmOf = Callable[..., AbstractAsyncContextManager[Swarm]]


@pytest.fixture
def swarm() -> SwarmOf:
    """Opens a swarm: `async with swarm(latency_s=0.001) as s`. Tests ask for autojump_clock as well."""

    @asynccontextmanager
    async def open_swarm(seed: int = 1, latency_s: float = 0.0005) -> AsyncIterator[Swarm]:
        options = MeshOptions(seed=seed, latency_s_min=latency_s, latency_s_max=latency_s)
        async with mesh_world(options) as world, trio.open_nursery() as nursery:
            yield Swarm(world, nursery)
            nursery.cancel_scope.cancel()

    return open_swarm


Reference = Callable[..., list[int]]


@pytest.fixture(scope="session")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny random model of a family, with a byte-level tokenizer, made once."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            path = tmp_path_factory.mktemp("models") / f"tiny-{family}"
            settings = {"n_positions" if family == "gpt2" else "max_position_embeddings": 512}
            made[family] = tiny_model(path, family, seed=7, vocab_size=257, **settings)
            for name, content in byte_level_tokenizer_files().items():
                (path / name).write_bytes(content)
        return made[family]

    return make


@pytest.fixture(scope="session")
def llama(model_of: Callable[[str], Path]) -> Path:
    return model_of("llama")


@pytest.fixture(scope="session")
def reference() -> Reference:
    """Greedy continuation by transformers' own generate() on the unsplit model."""

    @cache
    def generate(model: Path, prompt: tuple[int, ...], count: int) -> list[int]:
        whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with torch.inference_mode():
                out = whole.generate(
                    torch.tensor([list(prompt)]),
                    attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                    max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0,
                )  # fmt: skip
        finally:
            torch.set_num_threads(threads)
        return [int(token) for token in out[0, len(prompt) :]]

    return generate
