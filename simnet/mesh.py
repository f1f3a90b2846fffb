"""The simulated mesh: thousands of nodes' services over one light `Mesh`, without sockets or ciphers.

A `MeshWorld` is a flat internet: every node reaches every other, after a latency that depends on the pair.
A `SimMesh` is one node's `Mesh` in it. Connections cost round trips, carry streams in order, and end as real
ones do: `kill` is a crash (peers see a reset), `silence` a host that answers nothing (peers find out by
themselves after `silence_s`), `cut` and `heal` a partition. Where bytes meet a cut they wait, as TCP would
retransmit them, and go on when it heals in time.

    async with mesh_world(MeshOptions(seed=7)) as world:
        a, b = world.add("a"), world.add("b")
        await a.connect(b.listen_addrs)

It runs under any trio clock; with `mycel.simnet.clock.run` the same seed gives the same run.
"""

from __future__ import annotations

import math
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio
from multiaddr import Multiaddr

from mycel.protocol.address import endpoint_of
from mycel.protocol.limits import DEFAULT_LIMITS
from mycel.protocol.mesh import Access, PeerId
from mycel.simnet.clock import Timeline
from mycel.simnet.mesh_node import PORT, SimMesh

__all__ = ["MeshOptions", "MeshWorld", "SimMesh", "mesh_world"]


@dataclass(frozen=True, slots=True)
class MeshOptions:
    """The world's nature, from one seed."""

    seed: int = 0
    latency_s_min: float = 0.005
    latency_s_max: float = 0.080
    """One-way latency of a pair of nodes: drawn once per pair, uniform between the two."""
    bytes_per_s: float = math.inf
    """Bandwidth of a connection, each way."""
    window_bytes: int = 1 << 20
    """What a stream may have under way."""
    dial_s: float = DEFAULT_LIMITS.dial_s
    """How long a dial waits for a host that does not answer."""
    silence_s: float = DEFAULT_LIMITS.keepalive_s + DEFAULT_LIMITS.silence_s
    """How long until a connection that carries nothing any more is given up."""
    epoch: float = 1_800_000_000.0
    """Calendar time at the start of the run."""


class MeshWorld:
    """Nodes and what stands between them."""

    def __init__(self, options: MeshOptions, timeline: Timeline, nursery: trio.Nursery) -> None:
        self.options = options
        self.timeline = timeline
        self.nursery = nursery
        self.is_over = False
        """Whether the block was left: what still arrives starts nothing."""
        self.bytes_carried = 0
        """Bytes of streams that nodes sent so far."""
        self.nodes: dict[PeerId, SimMesh] = {}
        self._by_host: dict[tuple[str, int], SimMesh] = {}
        self._blocked: dict[tuple[PeerId, PeerId], None] = {}
        self._silent: dict[PeerId, None] = {}
        self._latency: dict[tuple[PeerId, PeerId], float] = {}
        self._started = trio.current_time()

    def add(self, name: str = "", *, access: Access = Access.MEMBER, swarm: str = "swarm") -> SimMesh:
        """A new node. Peers of the same `swarm` grant it `access`, all others take it for a stranger."""
        node = SimMesh(self, len(self.nodes), name or f"node-{len(self.nodes)}", access, swarm)
        self.nodes[node.peer_id] = node
        self._by_host[node.host, PORT] = node
        return node

    def latency(self, a: PeerId, b: PeerId) -> float:
        """One-way seconds between two nodes."""
        pair = (a, b) if a < b else (b, a)
        if pair not in self._latency:
            draw = random.Random(f"{self.options.seed} {pair[0]} {pair[1]}").random()
            low, high = self.options.latency_s_min, self.options.latency_s_max
            self._latency[pair] = low + (high - low) * draw
        return self._latency[pair]

    def set_latency(self, a: SimMesh, b: SimMesh, seconds: float) -> None:
        """Fix the one-way latency of a pair; connections that are open follow."""
        self._latency[min(a.peer_id, b.peer_id), max(a.peer_id, b.peer_id)] = seconds

    def is_blocked(self, a: PeerId, b: PeerId) -> bool:
        """Whether nothing passes between two nodes now."""
        if not self._silent and not self._blocked:
            return False
        return a in self._silent or b in self._silent or (min(a, b), max(a, b)) in self._blocked

    def cut(self, side: Sequence[SimMesh], other: Sequence[SimMesh]) -> None:
        """Let nothing pass between two groups of nodes until `heal`."""
        for a in side:
            for b in other:
                self._blocked[min(a.peer_id, b.peer_id), max(a.peer_id, b.peer_id)] = None
        for node in side:
            node.watch_silence()

    def heal(self) -> None:
        """Undo every `cut`."""
        self._blocked.clear()
        self._release()

    def silence(self, node: SimMesh) -> None:
        """The host answers nothing any more: packets to and from it vanish, its program runs on."""
        self._silent[node.peer_id] = None
        node.watch_silence()

    def unsilence(self, node: SimMesh) -> None:
        """The host is back on the net."""
        self._silent.pop(node.peer_id, None)
        self._release()

    def kill(self, node: SimMesh) -> None:
        """The process crashes: its handlers stop where they are, its peers see a reset."""
        node.crash()
        self._by_host.pop((node.host, PORT), None)

    def restart(self, node: SimMesh) -> SimMesh:
        """The killed program starts again: the same identity at the same address, and nothing else of it."""
        again = SimMesh(self, node.index, node.name, node.access, node.swarm)
        self.nodes[again.peer_id] = again
        self._by_host[again.host, PORT] = again
        return again

    def _release(self) -> None:
        for node in self.nodes.values():
            node.release_held()

    def find(self, addr: Multiaddr | str) -> SimMesh | None:
        """The node that listens on `addr`, None when nobody does. Raises `AddressError`."""
        endpoint = endpoint_of(addr)
        return self._by_host.get((endpoint.host, endpoint.port))

    def wall(self) -> float:
        """Calendar seconds: the epoch and the time since the run began."""
        return self.options.epoch + trio.current_time() - self._started


@asynccontextmanager
async def mesh_world(options: MeshOptions | None = None) -> AsyncIterator[MeshWorld]:
    """A world that lives as long as the block; leaving it stops every handler."""
    async with trio.open_nursery() as nursery:
        timeline = Timeline()
        await nursery.start(timeline.run)
        async with trio.open_nursery() as handlers:
            world = MeshWorld(options or MeshOptions(), timeline, handlers)
            try:
                yield world
            finally:
                world.is_over = True
            handlers.cancel_scope.cancel()
        nursery.cancel_scope.cancel()
