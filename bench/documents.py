"""Replicated documents: what gets lost (nothing may), how soon all agree again, and what an update costs.

All nodes stand in one process on simnet's light mesh, in virtual time; the code that decides, signs, pushes
and compares is the daemon's, signatures are the light mesh's. Four stories, each from the seed:

- storm: every node writes `--writes` keys as fast as they travel, while the swarm is cut in two and healed
  and nodes are killed and started again. Afterwards every key of every author is looked for at every node
  (`lost`), and all disks are compared byte for byte.
- heal: a swarm of `--nodes` is cut in halves that both write; `heal_p99_s` is from the moment the cut heals
  until a node has everything, over all nodes and rounds. Dialling the other half again is part of it.
- trickle: one node writes now and then; bytes on all connections, less those of a swarm where nobody writes,
  by updates and by nodes that they reached.
- million: one author overwrites 1 000 keys a million times, ten to a write; how large is its document then.
"""

from __future__ import annotations

import argparse
import hmac
import statistics
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial

import trio
from measure import report

from mycel.dht.doc.library import Library
from mycel.dht.doc.message import NOWHERE
from mycel.dht.doc.store import VolatileStore
from mycel.dht.doc.terms import Taken
from mycel.protocol.mesh import PeerId
from mycel.simnet.clock import run
from mycel.simnet.documents import LOOK_S, DocumentNode, DocumentSwarm, anybody_may_write
from mycel.simnet.mesh import MeshOptions, mesh_world

DEGREE = 8
SETTLE_S = 120.0
VALUE = b"%020d"
MILLION_KEYS, MILLION_BATCH = 1000, 10

Figures = dict[str, float | int | str | bool | None]


def main() -> None:
    """Run the stories; exits 1 where a key was lost, nodes disagree, or healing took longer than allowed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--writers", type=int, default=16, help="nodes of the storm (default %(default)s)")
    parser.add_argument("--writes", type=int, default=1000, help="of each of them (default %(default)s)")
    parser.add_argument("--nodes", type=int, default=200, help="nodes that are parted (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="partitions (default %(default)s)")
    parser.add_argument("--million", type=int, default=1_000_000, help="updates (default %(default)s)")
    asked = parser.parse_args()
    figures: Figures = {"seed": asked.seed}
    figures |= told("storm", run(partial(storm, asked.seed, asked.writers, asked.writes), asked.seed))
    figures |= told("heal", run(partial(heal, asked.seed, asked.nodes, asked.rounds), asked.seed))
    figures |= told("trickle", run(partial(trickle, asked.seed), asked.seed))
    figures |= told("million", million(asked.million))
    report("documents", figures)
    good = figures["lost"] == 0 and figures["byte_equal"] and float(figures["heal_p99_s"] or 0) < 5
    sys.exit(0 if good else 1)


def told(story: str, figures: Figures) -> Figures:
    """Print what a story found."""
    print(f"{story:8} " + ", ".join(f"{key} {value}" for key, value in figures.items()), flush=True)
    return figures


@asynccontextmanager
async def swarm_of(seed: int, count: int) -> AsyncIterator[DocumentSwarm]:
    """A swarm whose nodes know each other."""
    async with mesh_world(MeshOptions(seed=seed)) as world, trio.open_nursery() as nursery:
        swarm = DocumentSwarm(world, nursery, DEGREE)
        await swarm.grow(count)
        await trio.sleep(3)
        yield swarm
        nursery.cancel_scope.cancel()


async def storm(seed: int, writers: int, writes: int) -> Figures:
    """Everybody writes through cuts and deaths."""
    async with swarm_of(seed, writers) as swarm:
        wrote: dict[PeerId, dict[str, bytes]] = {node.mesh.peer_id: {} for node in swarm.nodes}
        restarts = cuts = 0
        for n in range(writes):
            for node in swarm.nodes:
                change = {f"job/{n}": VALUE % n}
                node.documents.write(change)
                wrote[node.mesh.peer_id] |= change
            await trio.sleep(0.01)
            if n % 250 == 60:
                swarm.cut(swarm.random.sample(swarm.nodes, writers // 3))
                cuts += 1
            if n % 250 == 200:
                swarm.world.heal()
            if n % 50 == 25:
                victim = swarm.random.choice(swarm.nodes)
                victim.kill()
                await swarm.restart(victim)
                restarts += 1
        swarm.world.heal()
        settle_s = await swarm.until(swarm.is_settled, SETTLE_S)
        lost = sum(missing(node, wrote) for node in swarm.nodes)
        states = [node.state for node in swarm.nodes]
        return {
            "writers": writers,
            "writes": writers * writes,
            "cuts": cuts,
            "restarts": restarts,
            "lost": lost,
            "byte_equal": all(state == states[0] for state in states),
            "refused": sum(sum(node.library.refused.values()) for node in swarm.nodes),
            "settle_s": settle_s,
        }


def missing(node: DocumentNode, wrote: dict[PeerId, dict[str, bytes]]) -> int:
    """Keys that were written and do not stand at `node` as they were."""
    found: dict[tuple[PeerId, str], bytes | None] = {
        (fact.author, fact.key): fact.value for fact in node.documents.read("")
    }
    return sum(
        found.get((author, key)) != value for author, keys in wrote.items() for key, value in keys.items()
    )


async def heal(seed: int, count: int, rounds: int) -> Figures:
    """Halves that both write come together again."""
    seconds: list[float] = []
    async with swarm_of(seed, count) as swarm:
        for node in swarm.nodes:
            node.documents.write({"models/own": VALUE % 0})
        await swarm.until(swarm.is_settled, SETTLE_S)
        for number in range(rounds):
            swarm.cut(swarm.random.sample(swarm.nodes, count // 2))
            for step in range(4):
                await trio.sleep(2.5)
                for node in swarm.nodes[step::4]:
                    node.documents.write({f"models/{number}": VALUE % number})
            await trio.sleep(2.5)
            swarm.world.heal()
            seconds += await healed(swarm)
    return {
        "nodes": count,
        "heals": rounds,
        "heal_p50_s": statistics.median(seconds),
        "heal_p99_s": statistics.quantiles(seconds, n=100, method="inclusive")[98],
    }


async def healed(swarm: DocumentSwarm) -> list[float]:
    """For each node the seconds from now until it has what all have in the end."""
    began = trio.current_time()
    wanted = {node.mesh.peer_id: node.library.version(node.mesh.peer_id) for node in swarm.nodes}
    waiting = {node.mesh.peer_id: node for node in swarm.nodes}
    seconds: list[float] = []
    while waiting:
        await trio.sleep(LOOK_S)
        for peer, node in list(waiting.items()):
            if all(node.library.version(author) == version for author, version in wanted.items()):
                seconds.append(trio.current_time() - began)
                del waiting[peer]
        if trio.current_time() - began > SETTLE_S:
            raise trio.TooSlowError(f"{len(waiting)} nodes lack something {SETTLE_S} s after the cut healed")
    return seconds


async def trickle(seed: int, count: int = 50, updates: int = 40) -> Figures:
    """What one update costs on its way to everybody."""
    apart_s = 0.5
    async with swarm_of(seed, count) as swarm:
        writer = swarm.nodes[0]
        for node in swarm.nodes:
            node.documents.write({"models/own": VALUE % 0})
        await swarm.until(swarm.is_settled, SETTLE_S)

        async def carried(act: Callable[[int], Awaitable[None]]) -> int:
            before = swarm.world.bytes_carried
            for n in range(updates):
                await act(n)
                await trio.sleep(apart_s)
            return swarm.world.bytes_carried - before

        async def rest(n: int) -> None:
            return None

        async def write(n: int) -> None:
            writer.documents.write({f"job/{n % 10}": VALUE % n})

        idle = await carried(rest)
        busy = await carried(write)
        document = writer.library.document(writer.mesh.peer_id)
        assert document is not None
        return {
            "update_bytes": document.log_bytes / len(document.log),
            "bytes_per_update": (busy - idle) / updates / (count - 1),
            "idle_bytes_per_s": idle / (updates * apart_s) / count,
        }


class OneAuthor:
    """A signer that is alone in the world."""

    def __init__(self, name: str) -> None:
        self.peer_id = PeerId(name)

    def sign(self, data: bytes) -> bytes:
        """64 bytes that stand for a signature."""
        return hmac.digest(b"one author", data, "sha512")

    def verify(self, peer: PeerId, data: bytes, signature: bytes) -> bool:
        """Whether they do."""
        return hmac.compare_digest(self.sign(data), signature)

    def wall(self) -> float:
        """Compaction goes by counting where the calendar stands still."""
        return 1_800_000_000.0


def million(updates: int) -> Figures:
    """One document with a long history, and a newcomer who gets it."""
    author = OneAuthor("author")
    library = Library(author, VolatileStore(), anybody_may_write)
    library.on_compared()
    began = time.perf_counter()
    for n in range(0, updates, MILLION_BATCH):
        library.write({f"job/{k % MILLION_KEYS}": VALUE % k for k in range(n, n + MILLION_BATCH)})
    seconds = time.perf_counter() - began
    newcomer = Library(OneAuthor("newcomer"), VolatileStore(), anybody_may_write)
    for part in library.since(author.peer_id, NOWHERE):
        assert newcomer.take(part) is Taken.NEWS
    assert newcomer.read("") == library.read("")
    live = sum(len(fact.key) + len(fact.value or b"") for fact in library.read(""))
    size = library.size
    library.compact()
    return {
        "updates": updates,
        "live_bytes": live,
        "size_after_million": size,
        "size_compacted": library.size,
        "update_us": seconds / updates * 1e6,
    }


if __name__ == "__main__":
    main()
