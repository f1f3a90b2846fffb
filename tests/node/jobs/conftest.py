"""Swarms that run jobs, in virtual time: real services and a real tiny model over the simulated mesh.

A node's disk (documents, blocks, what it remembers) outlives its process: `kill`, then `restart`.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from mycel.compute.engine import StageSpec, Work
from mycel.compute.infer.generate import Generator
from mycel.compute.infer.links import Links
from mycel.compute.infer.serve import StageServer
from mycel.compute.inline import InlineEngine
from mycel.compute.model.tiny import tiny_model
from mycel.compute.tokenizer import byte_level_tokenizer_files
from mycel.dht.block.exchange import Exchange
from mycel.dht.block.memory import MemoryStore
from mycel.dht.board import SwarmBoard
from mycel.dht.doc.library import Library
from mycel.dht.doc.store import VolatileStore
from mycel.dht.doc.sync import Documents
from mycel.node.jobs.generate import GenerateRunner
from mycel.node.jobs.kinds import GenerateSpec
from mycel.node.jobs.runner import Context, Runner, Services
from mycel.node.jobs.service import Jobs, Place
from mycel.node.jobs.spec import Job, read_spec
from mycel.node.jobs.views import JobView
from mycel.node.memory import VolatileMemory
from mycel.protocol.limits_doc import DEFAULT_DOCUMENT_LIMITS
from mycel.protocol.limits_jobs import DEFAULT_JOB_LIMITS, JobLimits
from mycel.protocol.mesh import Access, PeerId
from mycel.protocol.rpc import Rpc
from mycel.simnet.mesh import MeshOptions, MeshWorld, SimMesh, mesh_world

STEP_S = 0.05
"""Virtual seconds of a step of the model."""
LOOK_S = 0.05


class Disk:
    """What a process leaves behind."""

    def __init__(self) -> None:
        self.documents = VolatileStore()
        self.blocks = MemoryStore()
        self.memory = VolatileMemory()


class Node:
    """One node's services, as the daemon has them."""

    def __init__(self, swarm: Swarm, mesh: SimMesh, disk: Disk, model: Path | None) -> None:
        self.swarm = swarm
        self.mesh = mesh
        self.disk = disk
        self.model = model
        self.scope = trio.CancelScope()
        self.asked: list[int] = []
        """Prompts that this node was asked to do, in order."""
        self.runner: Counting
        self.services: list[Any] = []
        """What a kind needs to have running."""

    @property
    def peer(self) -> PeerId:
        return self.mesh.peer_id

    def _make(self) -> None:
        mesh, disk = self.mesh, self.disk
        self.services = []
        self.rpc = Rpc(mesh)
        self.board = SwarmBoard(mesh)
        library = Library(mesh, disk.documents, lambda author, chain: True, limits=self.swarm.documents)
        self.documents = Documents(mesh, self.rpc, library)
        self.exchange = Exchange(mesh, disk.blocks)
        self.links = Links(mesh)
        self.stages = StageServer(self.links, self.rpc, self.board)
        self.generator = Generator(self.links, self.rpc, self.board)
        self.jobs = Jobs(
            Place(
                mesh=mesh,
                rpc=self.rpc,
                documents=self.documents,
                exchange=self._exchange,
                memory=disk.memory,
                access_of=self.swarm.access_of,
                own_access=lambda: mesh.access,
                chain=lambda: b"",
                label=self.swarm.label,
                takes_part=self not in self.swarm.idle,
            ),
            [lambda services: self.swarm.kind(services, self)],
            self.swarm.limits,
        )

    async def _exchange(self) -> Exchange:
        return self.exchange

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        self._make()
        with trio.CancelScope() as self.scope:
            async with trio.open_nursery() as nursery:
                for service in (
                    self.rpc,
                    self.board,
                    self.documents,
                    self.links,
                    self.stages,
                    self.generator,
                    *self.services,
                ):
                    await nursery.start(service.run)
                await nursery.start(self.jobs.run)
                nursery.start_soon(self._stay_connected)
                if self.model is not None:
                    spec = StageSpec(str(self.model), None, dtype="float32", device="cpu")
                    await self.stages.serve(spec, lambda: InlineEngine(cost=_cost, load_s=0.05))
                task_status.started()

    async def _stay_connected(self) -> None:
        while True:
            for other in self.swarm.nodes:
                if other.peer not in self.mesh.peers and other is not self and other.mesh.is_alive:
                    await self.mesh.connect(other.mesh.listen_addrs)
            await trio.sleep(0.2)

    def kill(self) -> None:
        """The process dies where it is."""
        self.swarm.world.kill(self.mesh)
        self.scope.cancel()

    async def restart(self) -> None:
        """It starts again, with its disk and nothing else."""
        self.mesh = self.swarm.world.restart(self.mesh)
        await self.swarm.nursery.start(self.run)

    def view(self, job: str) -> JobView:
        return self.jobs.view(job)

    async def result(self, job: str, name: str) -> bytes:
        return b"".join([piece async for piece in self.jobs.content(job, name)])


class Swarm:
    """Nodes that know each other."""

    def __init__(self, world: MeshWorld, nursery: trio.Nursery, limits: JobLimits) -> None:
        self.limits = limits
        self.documents = DEFAULT_DOCUMENT_LIMITS
        self.world = world
        self.nursery = nursery
        self.nodes: list[Node] = []
        self.access: dict[PeerId, Access] = {}
        self.idle: list[Node] = []
        """Nodes whose owners let them do nothing for jobs."""
        self.kind: Callable[[Services, Node], Runner] = Watched

    def access_of(self, peer: PeerId, chain: bytes) -> Access:
        return self.access.get(peer, Access.STRANGER)

    def label(self, peer: PeerId) -> str:
        return next((node.mesh.name for node in self.nodes if node.peer == peer), peer)

    async def grow(
        self, count: int, model: Path | None = None, access: Access = Access.MEMBER, *, works: bool = True
    ) -> list[Node]:
        grown = []
        for _ in range(count):
            node = Node(self, self.world.add(f"n{len(self.nodes)}", access=access), Disk(), model)
            self.access[node.peer] = access
            self.nodes.append(node)
            grown.append(node)
            if not works:
                self.idle.append(node)
            await self.nursery.start(node.run)
        await self.until(lambda: all(len(node.mesh.peers) == len(self.nodes) - 1 for node in self.nodes))
        return grown

    async def until(self, holds: Callable[[], bool], limit_s: float = 120.0) -> None:
        with trio.fail_after(limit_s):
            while not holds():  # noqa: ASYNC110 - looked at from outside
                await trio.sleep(LOOK_S)

    def coordinator(self, job: str) -> Node | None:
        """Who holds the lease of a job now."""
        for node in self.nodes:
            attendance = node.jobs._attended.get(job) if node.mesh.is_alive else None
            if attendance is not None and attendance.holding is not None and attendance.holding.is_held:
                return node
        return None


class Watched(GenerateRunner):
    """The generate kind, and which prompts it was asked for."""

    def __init__(self, services, node: Node) -> None:
        self.node = node
        super().__init__(services, node.generator)

    async def _on_generate(self, call, ask):
        self.node.asked.append(ask.prompt.index)
        return await super()._on_generate(call, ask)


class Counting:
    """A kind of its own, under the generate kind's name: it counts to twenty, five a second."""

    kind = "generate"
    GOAL = 20

    def __init__(self, services: Services, node: Node) -> None:
        self.node = node
        self.counted: list[int] = []
        """What this node's coordinators counted, in order."""
        self.taking_part = 0
        self.before: Callable[[int], object] = lambda number: None
        """Called before each number; what it raises, the coordinator raises."""
        node.runner = self

    async def coordinate(self, job: Job, context: Context) -> None:
        number = int(await context.resume() or b"0")
        while number < self.GOAL:
            self.before(number)
            number += 1
            self.counted.append(number)
            await trio.sleep(0.2)
            context.report(number, {"square": number**2}, steps=self.GOAL)
            await context.checkpoint(b"%d" % number)
        await context.artefact("numbers.txt", b"".join(b"%d\n" % one for one in range(1, self.GOAL + 1)))

    async def take_part(self, job: Job, context: Context) -> None:
        self.taking_part += 1
        try:
            await trio.sleep_forever()
        finally:
            self.taking_part -= 1


def _cost(works: Sequence[Work]) -> float:
    return STEP_S


SwarmOf = Callable[..., AbstractAsyncContextManager[Swarm]]


@pytest.fixture
def swarm() -> SwarmOf:
    """Opens a swarm: `async with swarm() as s`. Tests ask for autojump_clock as well."""

    @asynccontextmanager
    async def open_swarm(kind=Watched, limits: JobLimits = DEFAULT_JOB_LIMITS) -> AsyncIterator[Swarm]:
        options = MeshOptions(seed=1, latency_s_min=0.002, latency_s_max=0.02)
        async with mesh_world(options) as world, trio.open_nursery() as nursery:
            swarm = Swarm(world, nursery, limits)
            swarm.kind = kind
            yield swarm
            nursery.cancel_scope.cancel()

    return open_swarm


@pytest.fixture(scope="session")
def byte_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model that reads and writes bytes."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model(folder, "llama", seed=7, vocab_size=257, max_position_embeddings=512)
    for name, content in byte_level_tokenizer_files().items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def prompts() -> bytes:
    """A file of two dozen prompts."""
    lines = [json.dumps({"prompt": f"prompt {number}: ", "id": f"p{number}"}) for number in range(24)]
    return "\n".join(lines).encode()


@pytest.fixture
def generate_spec() -> GenerateSpec:
    spec = read_spec(
        {"kind": "generate", "name": "night", "model": "tiny", "prompts": "prompts.jsonl", "at_once": 2,
         "sampling": {"max_tokens": 8, "temperature": 0.8, "seed": 5}}
    )  # fmt: skip
    assert isinstance(spec, GenerateSpec)
    return spec


@pytest.fixture
def counting() -> type[Counting]:
    """The kind of job that counts."""
    return Counting
