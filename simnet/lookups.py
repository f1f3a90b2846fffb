"""Scenario "dht": Kademlia nodes on the light mesh put and get records, lose a third at once, and churn.

Three parts, all from one seed. Calm: every node joins through a random one, records are put by random nodes
and read by others. Silent third: a third of the nodes answers nothing any more, without a word, and the
survivors read through the following minute. Restless: in a world of its own nodes come and go with sessions
of a given median (half of them crash, half fall silent), while records are put and read; a record's author
does not stay either, so it lives by its replicas alone.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import trio

from mycel.dht.kad.service import Kademlia
from mycel.protocol.errors import MycelError
from mycel.protocol.limits import DEFAULT_KAD_LIMITS, KadLimits
from mycel.protocol.mesh import PeerId
from mycel.simnet.mesh import MeshOptions, MeshWorld, SimMesh, mesh_world

JOIN_AT_ONCE = 8
SETTLE_S = 60.0
"""After the last join, until upkeep has looked around once."""
MINUTE_S = 60.0
YOUNG_S = 30.0
"""Sessions shorter than this are not drawn: a join takes seconds."""


@dataclass(frozen=True, slots=True)
class LookupsOptions:
    """How large, how many, how restless."""

    seed: int = 0
    nodes: int = 200
    records: int = 50
    reads: int = 200
    """In each part."""
    churn_s: float = 0.0
    """Virtual seconds of the restless part; 0: none."""
    churn_nodes: int = 60
    session_s: float = 600.0
    """Median session of the restless."""
    limits: KadLimits = DEFAULT_KAD_LIMITS


@dataclass(frozen=True, slots=True)
class Reads:
    """How reading went. Times in virtual seconds."""

    tried: int = 0
    found: int = 0
    hops_p50: float = 0.0
    hops_p99: float = 0.0
    p50_s: float = 0.0
    p99_s: float = 0.0

    @property
    def success(self) -> float:
        """The share that gave the value that was put."""
        return self.found / self.tried if self.tried else math.nan


@dataclass(frozen=True, slots=True)
class LookupsReport:
    """What happened."""

    seed: int
    nodes: int
    joined_s: float
    known: float
    """Peers in a node's table, on average."""
    replicas_min: int
    """The fewest replicas that confirmed a put."""
    calm: Reads
    silent: Reads
    restless: Reads
    deaths: int
    """In the restless part."""
    questions_per_join: float
    questions_per_read: float
    bytes_per_read: float
    """Sent and received by the reader."""

    @property
    def went_well(self) -> bool:
        """Whether every part came up to its promise."""
        restless = self.restless.tried == 0 or self.restless.success >= 0.99
        return self.calm.success == 1.0 and self.silent.success >= 0.995 and restless


class Town:
    """Nodes that run Kademlia, and the records they put."""

    def __init__(
        self, world: MeshWorld, nursery: trio.Nursery, options: LookupsOptions, rng: random.Random
    ) -> None:
        self.world = world
        self.nursery = nursery
        self.options = options
        self.rng = rng
        self.alive: dict[PeerId, tuple[SimMesh, Kademlia, trio.CancelScope]] = {}
        self.put: list[tuple[PeerId, str, bytes, float]] = []
        """Author, name, value and when."""
        self.results: list[tuple[bool, float, int]] = []
        """Of each read: found, seconds, hops."""
        self.replicas: list[int] = []

    async def join(self) -> None:
        """One more node, through a random one."""
        mesh = self.world.add()
        kad, scope = Kademlia(mesh, limits=self.options.limits), trio.CancelScope()
        others = list(self.alive.values())
        await self.nursery.start(self._live, kad, scope)
        while others:
            door = self.rng.choice(others)[0]
            try:
                await mesh.connect(door.listen_addrs)
                break
            except MycelError:  # whoever it asked just died; another one lets it in
                others = list(self.alive.values())
        await kad.bootstrap()
        self.alive[mesh.peer_id] = (mesh, kad, scope)

    async def _live(
        self, kad: Kademlia, scope: trio.CancelScope, *, task_status: trio.TaskStatus[None]
    ) -> None:
        with scope:
            await kad.run(task_status=task_status)

    def die(self, peer: PeerId, *, silently: bool) -> None:
        """A node ends, with a reset or without a word."""
        mesh, _, scope = self.alive.pop(peer)
        scope.cancel()
        if silently:
            self.world.silence(mesh)
        else:
            self.world.kill(mesh)

    async def put_one(self) -> None:
        """A random node puts a record of its own."""
        mesh, kad, _ = self.rng.choice(list(self.alive.values()))
        name, value = f"record {len(self.put)}", self.rng.randbytes(32)
        self.put.append((mesh.peer_id, name, value, math.inf))
        place = len(self.put) - 1
        stored = await kad.put(name, value)
        self.replicas.append(stored.replicas)
        self.put[place] = (mesh.peer_id, name, value, trio.current_time())

    async def read_one(self, after_s: float = 0.0) -> None:
        """After a while a random node reads a random record that another one had put by then."""
        await trio.sleep(after_s)
        author, name, value, _ = self.rng.choice([one for one in self.put if one[3] < math.inf])
        readers = [one for peer, one in self.alive.items() if peer != author]
        mesh, kad, _ = self.rng.choice(readers)
        began = trio.current_time()
        found = await kad.get(author, name)
        if mesh.peer_id in self.alive:  # else the reader itself died meanwhile
            good = found is not None and found.record.value == value
            self.results.append((good, trio.current_time() - began, found.hops if found else 0))

    async def read_through(self, count: int, seconds: float) -> Reads:
        """`count` reads spread evenly over a time, as many at once as it takes."""
        self.results = []
        async with trio.open_nursery() as nursery:
            for number in range(count):
                nursery.start_soon(self.read_one, seconds * number / count)
        return reads_of(self.results)

    def questions(self) -> tuple[int, int]:
        """Questions and bytes of all nodes that live."""
        askers = [kad.asker for _, kad, _ in self.alive.values()]
        return sum(asker.asked for asker in askers), sum(asker.bytes for asker in askers)


async def lookups(options: LookupsOptions) -> LookupsReport:
    """Run the calm part and the silent third on this trio loop. The restless part: `restless`."""
    rng = random.Random(f"lookups {options.seed}")
    async with mesh_world(MeshOptions(seed=options.seed)) as world, trio.open_nursery() as nursery:
        town = Town(world, nursery, options, rng)
        began = trio.current_time()
        await _join_all(town, options.nodes)
        joined_s, asked = trio.current_time() - began, town.questions()[0]
        await trio.sleep(SETTLE_S)
        for _ in range(options.records):
            await town.put_one()
        calm = await town.read_through(options.reads, MINUTE_S)
        known = sum(len(kad.table) for _, kad, _ in town.alive.values()) / options.nodes
        before, one_by_one = town.questions(), min(options.reads, 50)
        for _ in range(one_by_one):
            await town.read_one()
        after = town.questions()
        for peer in rng.sample(list(town.alive), options.nodes // 3):
            town.die(peer, silently=True)
        silent = await town.read_through(options.reads, MINUTE_S)
        nursery.cancel_scope.cancel()
    return LookupsReport(
        seed=options.seed,
        nodes=options.nodes,
        joined_s=joined_s,
        known=known,
        replicas_min=min(town.replicas),
        calm=calm,
        silent=silent,
        restless=Reads(),
        deaths=0,
        questions_per_join=asked / options.nodes,
        questions_per_read=(after[0] - before[0]) / one_by_one,
        bytes_per_read=(after[1] - before[1]) / one_by_one,
    )


async def restless(options: LookupsOptions) -> tuple[Reads, int]:
    """Run the restless part on this trio loop: how reading went, and how many nodes died."""
    rng = random.Random(f"restless {options.seed}")
    deaths = 0
    async with mesh_world(MeshOptions(seed=options.seed)) as world, trio.open_nursery() as nursery:
        town = Town(world, nursery, options, rng)
        await _join_all(town, options.churn_nodes)

        async def live_on(peer: PeerId) -> None:
            nonlocal deaths
            while True:
                mean = options.session_s / math.log(2)
                await trio.sleep(max(YOUNG_S, rng.expovariate(1 / mean)))
                town.die(peer, silently=rng.random() < 0.5)
                deaths += 1
                before = dict.fromkeys(town.alive)
                await town.join()
                peer = next(one for one in reversed(town.alive) if one not in before)

        for peer in list(town.alive):
            nursery.start_soon(live_on, peer)
        until = trio.current_time() + options.churn_s
        for _ in range(options.records):
            await town.put_one()
        every = options.churn_s / options.reads
        async with trio.open_nursery() as readers:
            while trio.current_time() < until:
                readers.start_soon(town.read_one)
                await trio.sleep(every)
        reads = reads_of(town.results)
        nursery.cancel_scope.cancel()
    return reads, deaths


async def _join_all(town: Town, count: int) -> None:
    await town.join()
    left = count - 1
    while left:
        batch = min(left, JOIN_AT_ONCE, len(town.alive))
        async with trio.open_nursery() as nursery:
            for _ in range(batch):
                nursery.start_soon(town.join)
        left -= batch


def reads_of(results: Sequence[tuple[bool, float, int]]) -> Reads:
    """How reads went, from what each gave: whether it found the value, seconds, hops."""
    times, hops = sorted(one[1] for one in results), sorted(one[2] for one in results if one[0])
    return Reads(
        len(results),
        sum(one[0] for one in results),
        float(_quantile(hops, 0.5)),
        float(_quantile(hops, 0.99)),
        _quantile(times, 0.5),
        _quantile(times, 0.99),
    )


def _quantile(values: Sequence[float], share: float) -> float:
    return values[min(len(values) - 1, int(share * len(values)))] if values else math.nan
