"""Scenario "agreement": the same Kademlia in whole daemons and on the light mesh, side by side.

Figures for thousands of nodes come from the light mesh (`mycel.simnet.lookups`), which has neither ciphers
nor yamux nor anything else that a daemon runs. Here both worlds get as many nodes, the same latency for each
pair, and the same story: all are connected with all, as members of a swarm of this size are; some put
records, others read them; a third falls silent at once, and the survivors read on. What a read finds, over
how many hops, and how long it takes must agree, or figures of the light mesh say nothing about daemons.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import trio

from mycel.dht.kad.service import Kademlia
from mycel.protocol.mesh import PeerId
from mycel.simnet import clock
from mycel.simnet.internet import InternetOptions, internet
from mycel.simnet.lookups import Read, Reads, reads_of
from mycel.simnet.mesh import MeshOptions, mesh_world
from mycel.simnet.swarm import Swarm, SwarmOptions

SETTLE_S = 30.0
"""After the last join: upkeep has looked around, daemons have stated where they are."""
READ_S = 20.0
"""The time that each part's reads are spread over."""
LATENCY_S = (0.005, 0.080)
"""One-way latency of a pair, drawn uniformly; the same in both worlds."""


@dataclass(frozen=True, slots=True)
class AgreementOptions:
    """How large."""

    seed: int = 0
    nodes: int = 50
    records: int = 25
    reads: int = 150
    """In each part."""


@dataclass(frozen=True, slots=True)
class Told:
    """One world: the fewest replicas that confirmed a put, and how reading went in both parts."""

    replicas_min: int
    calm: Reads
    silent: Reads


@dataclass(frozen=True, slots=True)
class AgreementReport:
    """Both worlds."""

    nodes: int
    daemons: Told
    mesh: Told

    @property
    def agrees(self) -> bool:
        """Whether figures of the one world may be told of the other."""
        a, b = self.daemons, self.mesh
        return (
            a.calm.success == b.calm.success == 1.0
            and min(a.silent.success, b.silent.success) >= 0.995
            and abs(a.calm.hops_mean - b.calm.hops_mean) <= 0.25
            and abs(a.calm.hops_p99 - b.calm.hops_p99) <= 1
            and 0.7 <= a.calm.p50_s / b.calm.p50_s <= 1.4
            and 0.5 <= a.silent.p99_s / b.silent.p99_s <= 2.0
        )


@dataclass(frozen=True, slots=True)
class Citizen:
    """One node of either world."""

    peer: PeerId
    kad: Kademlia
    fall_silent: Callable[[], None]


def agreement(options: AgreementOptions) -> AgreementReport:
    """Run both worlds, one after the other."""
    told = [clock.run(partial(world, options), options.seed) for world in (daemons, light_mesh)]
    return AgreementReport(options.nodes, told[0], told[1])


async def daemons(options: AgreementOptions) -> Told:
    """The story among whole daemons on the simulated internet."""
    async with internet(InternetOptions(seed=options.seed)) as net, trio.open_nursery() as nursery:
        names = [f"n{number}" for number in range(options.nodes)]
        for number, name in enumerate(names):
            net.add(name, ips=[f"12.{number >> 8}.{number & 255}.1"])  # each in a network of its own
        for (one, other), seconds in _latencies(options):
            net.set_latency(net.machines[names[one]], net.machines[names[other]], seconds)
        swarm = Swarm(net, nursery, SwarmOptions(model=Path("none")))
        founder = await swarm.found(names[0], serves=False)
        for name in names[1:]:
            await swarm.join(founder.ticket(), name, serves=False)
        citizens = [
            Citizen(one.peer, one.node.discovery.kad, one.machine.silence) for one in swarm.nodes.values()
        ]
        told = await _live(citizens, options)
        nursery.cancel_scope.cancel()
    return told


async def light_mesh(options: AgreementOptions) -> Told:
    """The story on the light mesh."""
    async with mesh_world(MeshOptions(seed=options.seed)) as world, trio.open_nursery() as nursery:
        meshes = [world.add() for _ in range(options.nodes)]
        for (one, other), seconds in _latencies(options):
            world.set_latency(meshes[one], meshes[other], seconds)
        citizens = []
        for place, mesh in enumerate(meshes):
            kad = Kademlia(mesh)
            await nursery.start(kad.run)
            citizens.append(Citizen(mesh.peer_id, kad, partial(world.silence, mesh)))
            async with trio.open_nursery() as dials:
                for older in meshes[:place]:
                    dials.start_soon(mesh.connect, older.listen_addrs)
        told = await _live(citizens, options)
        nursery.cancel_scope.cancel()
    return told


def _latencies(options: AgreementOptions) -> Sequence[tuple[tuple[int, int], float]]:
    """One-way seconds of each pair, by the order of birth."""
    rng = random.Random(f"agreement {options.seed}")
    pairs = [(one, other) for other in range(options.nodes) for one in range(other)]
    return [(pair, rng.uniform(*LATENCY_S)) for pair in pairs]


async def _live(citizens: list[Citizen], options: AgreementOptions) -> Told:
    rng = random.Random(f"story {options.seed}")
    await trio.sleep(SETTLE_S)
    replicas = []
    authors = [rng.choice(citizens) for _ in range(options.records)]
    for number, author in enumerate(authors):
        replicas.append((await author.kad.put(f"record {number}", b"%d" % number)).replicas)
    calm = await _read_through(citizens, authors, options.reads, rng)
    for citizen in rng.sample(citizens, options.nodes // 3):
        citizens.remove(citizen)
        citizen.fall_silent()
    silent = await _read_through(citizens, authors, options.reads, rng)
    return Told(min(replicas), reads_of(calm), reads_of(silent))


async def _read_through(
    citizens: Sequence[Citizen], authors: Sequence[Citizen], count: int, rng: random.Random
) -> list[Read]:
    """Reads of random records by random others, spread evenly."""
    results: list[Read] = []

    async def read(reader: Citizen, number: int, after_s: float) -> None:
        await trio.sleep(after_s)
        began = trio.current_time()
        found = await reader.kad.get(authors[number].peer, f"record {number}")
        good = found is not None and found.record.value == b"%d" % number
        results.append(Read(good, trio.current_time() - began, found.hops if found else 0))

    async with trio.open_nursery() as nursery:
        for place in range(count):
            number = rng.randrange(len(authors))
            others = [one for one in citizens if one is not authors[number]]
            nursery.start_soon(read, rng.choice(others), number, READ_S * place / count)
    return results
