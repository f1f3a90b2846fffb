"""Scenario "dht": Kademlia nodes on the light mesh put and get records, lose a third at once, and churn.

Three parts, all from one seed. Calm: nodes join, each through a random one, a quarter as many at a time as
there are; records are put by random nodes and read by others. Silent third: a third of the nodes answers
nothing any more, without a word, and the survivors read through the following minute. Restless: in a world
of its own nodes come and go with sessions of a given median (half crash, half fall silent), while records
are put and read; a record's author does not stay either, so it lives by its replicas alone.
"""

from __future__ import annotations

import gc
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import trio

from mycel.dht.kad.service import Kademlia
from mycel.protocol.errors import MycelError
from mycel.protocol.limits import DEFAULT_KAD_LIMITS, KadLimits
from mycel.protocol.mesh import PeerId
from mycel.simnet.mesh import MeshOptions, MeshWorld, SimMesh, mesh_world

JOIN_AT_ONCE = 8
"""Nodes that join at the same time while there are few; later a quarter of those there are."""
SETTLE_S = 30.0
"""After the last join, until every node's upkeep has looked around once more."""
PUT_EVERY_S = 0.1
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
    say: Callable[[str], None] = lambda text: None
    """Told how far it is."""


@dataclass(frozen=True, slots=True)
class Reads:
    """How reading went. Times in virtual seconds."""

    tried: int = 0
    found: int = 0
    hops_mean: float = 0.0
    hops_p50: float = 0.0
    hops_p99: float = 0.0
    p50_s: float = 0.0
    p99_s: float = 0.0
    questions: float = 0.0
    """Asked for a read, on average..."""
    bytes: float = 0.0
    """...and bytes sent and received by the reader."""

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
    """Asked by each node until all had joined and settled..."""
    bytes_per_join: float
    """...and bytes sent and received for them."""

    @property
    def went_well(self) -> bool:
        """Whether every part came up to its promise."""
        restless = self.restless.tried == 0 or self.restless.success >= 0.99
        return self.calm.success == 1.0 and self.silent.success >= 0.995 and restless


@dataclass(frozen=True, slots=True)
class Read:
    """One read."""

    good: bool
    seconds: float
    hops: int
    questions: int = 0
    bytes: int = 0


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
        self.results: list[Read] = []
        self.replicas: list[int] = []

    async def join(self) -> PeerId:
        """One more node, through a random one; who it is."""
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
        return mesh.peer_id

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

    async def put_all(self) -> None:
        """As many records as there are to be, one after the other but not one by one."""
        async with trio.open_nursery() as nursery:
            for _ in range(self.options.records):
                nursery.start_soon(self.put_one)
                await trio.sleep(PUT_EVERY_S)

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
        began, before = trio.current_time(), kad.asker.bytes
        found = await kad.get(author, name)
        if mesh.peer_id in self.alive:  # else the reader itself died meanwhile
            good = found is not None and found.record.value == value
            seconds, size = trio.current_time() - began, kad.asker.bytes - before
            hops, questions = (found.hops, found.questions) if found else (0, 0)
            self.results.append(Read(good, seconds, hops, questions, size))

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
    with seldom_collected():
        async with mesh_world(MeshOptions(seed=options.seed)) as world, trio.open_nursery() as nursery:
            town = Town(world, nursery, options, rng)
            began = trio.current_time()
            await _join_all(town, options.nodes)
            joined_s = trio.current_time() - began
            await trio.sleep(SETTLE_S)
            asked, size = town.questions()
            options.say(f"settled, {asked / options.nodes:.0f} questions a node")
            await town.put_all()
            calm = await town.read_through(options.reads, MINUTE_S)
            known = sum(len(kad.table) for _, kad, _ in town.alive.values()) / options.nodes
            options.say(f"read {calm.found} of {calm.tried}; now a third falls silent")
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
        bytes_per_join=size / options.nodes,
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
                peer = await town.join()

        for peer in list(town.alive):
            nursery.start_soon(live_on, peer)
        began, every = trio.current_time(), options.churn_s / options.reads
        await town.put_all()
        async with trio.open_nursery() as readers:
            for number in range(options.reads):
                readers.start_soon(town.read_one)
                await trio.sleep_until(began + every * (number + 1))
                if (number + 1) % max(options.reads // 8, 1) == 0:
                    good = sum(read.good for read in town.results)
                    options.say(
                        f"{every * (number + 1):.0f} s: {good} of {len(town.results)}, {deaths} deaths"
                    )
        reads = reads_of(town.results)
        nursery.cancel_scope.cancel()
    return reads, deaths


async def _join_all(town: Town, count: int) -> None:
    await town.join()
    left = count - 1
    while left:
        batch = min(left, max(JOIN_AT_ONCE, len(town.alive) // 4), len(town.alive))
        async with trio.open_nursery() as nursery:
            for _ in range(batch):
                nursery.start_soon(town.join)
        left -= batch
        if len(town.alive) >= 500:
            town.options.say(f"{len(town.alive)} joined after {trio.current_time():.0f} s")


@contextmanager
def seldom_collected() -> Iterator[None]:
    """Look for garbage less often: what a world holds is millions of objects, and next to none of it is."""
    before = gc.get_threshold()
    gc.set_threshold(100_000, 50, 100)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def reads_of(results: Sequence[Read]) -> Reads:
    """How reads went."""
    times, found = sorted(read.seconds for read in results), [read for read in results if read.good]
    hops, many = sorted(read.hops for read in found), max(len(found), 1)
    return Reads(
        tried=len(results),
        found=len(found),
        hops_mean=sum(hops) / many,
        hops_p50=float(_quantile(hops, 0.5)),
        hops_p99=float(_quantile(hops, 0.99)),
        p50_s=_quantile(times, 0.5),
        p99_s=_quantile(times, 0.99),
        questions=sum(read.questions for read in found) / many,
        bytes=sum(read.bytes for read in found) / many,
    )


def _quantile(values: Sequence[float], share: float) -> float:
    return values[min(len(values) - 1, int(share * len(values)))] if values else math.nan
