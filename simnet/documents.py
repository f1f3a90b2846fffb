"""A swarm of nodes that have nothing but documents, over the light mesh: what tests and benchmark run.

Each node is connected with a few others, drawn from the seed, and dials them again when they are gone, as a
daemon does with its contacts. Its disk outlives it: a node that is killed and restarted finds what it kept.

    async with mesh_world(MeshOptions(seed=7)) as world, trio.open_nursery() as nursery:
        swarm = DocumentSwarm(world, nursery, DEGREE)
        await swarm.grow(50)
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Sequence

import trio

from mycel.dht.doc.library import Library
from mycel.dht.doc.message import Part
from mycel.dht.doc.store import VolatileStore
from mycel.dht.doc.sync import Documents
from mycel.protocol.errors import MycelError
from mycel.protocol.limits_doc import DEFAULT_DOCUMENT_LIMITS, DocumentLimits
from mycel.protocol.mesh import PeerId
from mycel.protocol.rpc import Rpc
from mycel.simnet.mesh import MeshWorld, SimMesh

REDIAL_S = 0.5
LOOK_S = 0.02


def anybody_may_write(author: PeerId, chain: bytes) -> bool:
    """The light mesh has no certificates."""
    return True


class DocumentNode:
    """One node and its disk."""

    def __init__(self, mesh: SimMesh, store: VolatileStore, limits: DocumentLimits) -> None:
        self.mesh = mesh
        self.store = store
        self.limits = limits
        self.wanted: list[SimMesh] = []
        self._scope = trio.CancelScope()
        self._open()

    def _open(self) -> None:
        self.library = Library(self.mesh, self.store, anybody_may_write, limits=self.limits)
        self.rpc = Rpc(self.mesh)
        self.documents = Documents(self.mesh, self.rpc, self.library, self.limits)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Live until killed."""
        with trio.CancelScope() as self._scope:
            async with trio.open_nursery() as nursery:
                await nursery.start(self.rpc.run)
                await nursery.start(self.documents.run)
                task_status.started()
                for other in self.wanted:
                    nursery.start_soon(self._stay_with, other)
                await trio.sleep_forever()

    async def _stay_with(self, other: SimMesh) -> None:
        while True:
            if other.peer_id not in self.mesh.peers:
                with contextlib.suppress(MycelError):
                    await self.mesh.connect(other.listen_addrs)
            await trio.sleep(REDIAL_S)

    def kill(self) -> None:
        """The process dies where it is."""
        self.mesh.world.kill(self.mesh)
        self._scope.cancel()

    def restart(self) -> None:
        """It starts anew from its disk; `run` must be started again."""
        self.mesh = self.mesh.world.restart(self.mesh)
        self._open()

    @property
    def state(self) -> list[Part]:
        """Every document, byte for byte, ordered by author."""
        return self.store.load()


class DocumentSwarm:
    """Nodes in a random graph."""

    def __init__(
        self,
        world: MeshWorld,
        nursery: trio.Nursery,
        degree: int,
        limits: DocumentLimits = DEFAULT_DOCUMENT_LIMITS,
    ) -> None:
        self.world = world
        self.nodes: list[DocumentNode] = []
        self.random = random.Random(f"documents {world.options.seed}")
        self.nursery = nursery
        self._degree = degree
        self._limits = limits

    async def grow(self, count: int) -> list[DocumentNode]:
        """That many more nodes; each dials half its degree of others that were there before it."""
        grown = []
        for _ in range(count):
            node = DocumentNode(self.world.add(), VolatileStore(), self._limits)
            others = self.random.sample(self.nodes, min(len(self.nodes), self._degree // 2))
            node.wanted = [other.mesh for other in others]
            self.nodes.append(node)
            grown.append(node)
            await self.nursery.start(node.run)
        return grown

    async def restart(self, node: DocumentNode) -> None:
        """Start a killed node again."""
        node.restart()
        await self.nursery.start(node.run)

    def cut(self, side: Sequence[DocumentNode]) -> None:
        """Part these nodes from all others until `world.heal`."""
        inside = {id(node): None for node in side}
        others = [node.mesh for node in self.nodes if id(node) not in inside]
        self.world.cut([node.mesh for node in side], others)

    def is_settled(self) -> bool:
        """Whether every node is at the same version with every author."""
        first = self.nodes[0].library.vector.digests
        return all(node.library.vector.digests == first for node in self.nodes)

    async def until(self, holds: Callable[[], bool], limit_s: float) -> float:
        """Virtual seconds until `holds`, looked at often. Raises `trio.TooSlowError` after `limit_s`."""
        began = trio.current_time()
        with trio.fail_after(limit_s):
            while not holds():  # noqa: ASYNC110 - looked at from outside, as the versions of many nodes are
                await trio.sleep(LOOK_S)
        return trio.current_time() - began
