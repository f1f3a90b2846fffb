"""A stream through a relay against the same stream directly, in one run, on loopback.

    relay_vs_direct   one way throughput, 1 MiB writes, through a relay / directly          target >= 0.4
    rtt_vs_direct     round trip of 32 bytes (ping) through a relay / directly
    relay_mib_s       what went through, and direct_mib_s without it
    relay_cpu_s_gib   CPU seconds of the relay for a GiB
    relay_rss_mib     the relay's resident memory afterwards

Three processes: this one sends, `relay_far.py relay` relays, `relay_far.py far` takes. On a machine with two
cores they share those: a relayed byte is sealed and opened twice on the way and within (Noise from end to end
inside Noise to the relay), six times instead of two, so one core's worth of work becomes three. Figures are
medians of rounds taken in turns.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import psutil
import trio
from measure import compare, report, stopwatch
from rpc_far import SINK

from mycel.node.host import Host
from mycel.node.reach.relay_client import RelayClient
from mycel.node.tcp import TcpNetwork
from mycel.protocol.keys import OwnKey
from mycel.protocol.limits import MIB
from mycel.protocol.mesh import Access, PathKind, PeerId

STREAM_MIB = 256
CHUNK = bytes(MIB)
PINGS = 500
ROUNDS = 5


@contextmanager
def process(*arguments: str) -> Iterator[dict[str, str | int]]:
    """One of the other ends, and what it says."""
    command = [sys.executable, str(Path(__file__).with_name("relay_far.py")), *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdin is not None
        assert running.stdout is not None
        try:
            yield json.loads(running.stdout.readline())
        finally:
            running.stdin.close()
            running.terminate()


@asynccontextmanager
async def connected(addr: str) -> AsyncIterator[tuple[Host, PeerId]]:
    """A host of this process that is connected with whoever is at `addr`."""
    host = Host(TcpNetwork(), OwnKey(os.urandom(32)), default_access=Access.MEMBER)
    RelayClient(host)
    async with trio.open_nursery() as nursery:
        await nursery.start(host.run)
        yield host, await host.connect([addr])
        nursery.cancel_scope.cancel()


async def throughput(host: Host, peer: PeerId) -> float:
    """MiB per second, one way."""
    stream = await host.open_stream(peer, SINK)
    with stopwatch() as seconds:
        for _ in range(STREAM_MIB):
            await stream.send(CHUNK)
        await stream.send_eof()
        count = int.from_bytes(await stream.receive_exactly(8), "big")
        took = seconds()
    assert count == STREAM_MIB * MIB
    await stream.aclose()
    return STREAM_MIB / took


async def round_trip(host: Host, peer: PeerId) -> float:
    """Seconds of a ping, the mean of many."""
    total = 0.0
    for _ in range(PINGS):
        total += await host.ping(peer)
    return total / PINGS


async def main() -> None:
    """Measure and report."""
    with process("relay") as relay, process("far", str(relay["direct"])) as far:
        async with (
            connected(str(far["direct"])) as (near, peer),
            connected(str(far["relayed"])) as (behind, same),
        ):
            assert near.peers[peer].path is PathKind.DIRECT
            assert behind.peers[same].path is PathKind.RELAYED
            middle = psutil.Process(int(relay["pid"]))
            before = middle.cpu_times()
            bulk = await compare(
                {"direct": lambda: throughput(near, peer), "relayed": lambda: throughput(behind, same)},
                rounds=ROUNDS,
            )
            after = middle.cpu_times()
            print("throughput\n" + bulk.table("MiB/s"), flush=True)
            trips = await compare(
                {"direct": lambda: round_trip(near, peer), "relayed": lambda: round_trip(behind, same)},
                rounds=ROUNDS,
            )
            print("round trip\n" + trips.table("us", 1e6), flush=True)
            relayed_gib = (ROUNDS + 1) * STREAM_MIB / 1024
            cpu_s = after.user + after.system - before.user - before.system
            report(
                "relay",
                {
                    "relay_vs_direct": bulk.ratio("relayed", "direct"),
                    "rtt_vs_direct": trips.ratio("relayed", "direct"),
                    "direct_mib_s": bulk.median("direct"),
                    "relay_mib_s": bulk.median("relayed"),
                    "relay_cpu_s_gib": cpu_s / relayed_gib,
                    "relay_rss_mib": middle.memory_info().rss / MIB,
                },
            )


if __name__ == "__main__":
    trio.run(main)
