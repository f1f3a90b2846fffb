"""Calls and streams of Mycel against raw trio TCP and trio's SSLStream, in one run.

    unary_vs_raw    round trip of a typed call with 128 bytes / raw TCP echo of 128 bytes     target <= 2.0
    fresh_vs_raw    the same call on a stream of its own                                      target <= 2.0
    stream_vs_tls   one way throughput of a stream, 1 MiB writes / the same through TLS 1.3   target >= 1.5
    calls_N_failed  failures of N calls that are all in flight at once                        target 0
    slow_handlers   8 handlers that block for 0.3 s, at once       target < 0.35 s, pings < 20 ms meanwhile
    slow_consumer   20 000 items to a slow reader; the memory that both ends took for it      target: all
    sim_100ms_fill  256 MiB on one stream over a simulated 1 Gbit/s line of 100 ms, from the opening of the
                    stream to the last byte's arrival                                         target >= 0.85

The far end is a process of its own (rpc_far.py). Ratios are of medians of five rounds, taken in turns. For
comparison, measured once on another machine and not here: py-libp2p 0.8.1 has 5.6, 25 and 0.3-0.5.
"""

from __future__ import annotations

import json
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import trio
from measure import compare, report, stopwatch
from rpc_far import BLOCK, ECHO, ECHO_INLINE, ITEMS, MEET, MEMORY, MESSAGE_BYTES, NOTE, SINK, Memory

from mycel.node.host import Host
from mycel.node.tcp import TcpNetwork
from mycel.protocol.keys import OwnKey
from mycel.protocol.limits import MIB
from mycel.protocol.mesh import Access, PeerId, Stream
from mycel.protocol.rpc import Rpc
from mycel.simnet import clock
from mycel.simnet.internet import InternetOptions, internet
from mycel.simnet.link import GIGABIT, LinkOptions
from mycel.simnet.network import SimNetwork

CALLS = 1000
STREAM_MIB = 256
CHUNK = bytes(MIB)
DEADLINE_S = 60.0
SIM_MIB = 256
RTT_S = 0.1

Figures = dict[str, float | int | str | bool | None]


class Near:
    """This end: the far one's ports, and a connected node."""

    def __init__(self, ports: dict[str, int | str], host: Host, rpc: Rpc, peer: PeerId) -> None:
        self.ports = ports
        self.host = host
        self.rpc = rpc
        self.peer = peer

    async def tcp(self, name: str) -> trio.SocketStream:
        """A raw connection to one of the far end's services."""
        return await trio.open_tcp_stream("127.0.0.1", int(self.ports[name]))

    async def tls(self) -> trio.SSLStream[trio.SocketStream]:
        """A TLS 1.3 connection."""
        context = ssl.create_default_context(cafile=str(self.ports["cert"]))
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        return trio.SSLStream(
            await self.tcp("tls"), context, server_hostname="127.0.0.1", https_compatible=True
        )


@asynccontextmanager
async def far_end() -> AsyncIterator[Near]:
    """The far process, and this node connected to it."""
    command = [sys.executable, str(Path(__file__).with_name("rpc_far.py"))]
    with subprocess.Popen(  # noqa: ASYNC220 (starting it is not what is measured)
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            ports = json.loads(await trio.to_thread.run_sync(process.stdout.readline))
            host = Host(TcpNetwork(), OwnKey(b"\1" * 32), default_access=Access.MEMBER)
            rpc = Rpc(host)
            async with trio.open_nursery() as nursery:
                await nursery.start(host.run)
                await nursery.start(rpc.run)
                yield Near(ports, host, rpc, await host.connect([ports["mycel"]]))
                nursery.cancel_scope.cancel()
        finally:
            process.stdin.close()
            process.terminate()


async def round_trips(near: Near) -> Figures:
    """A call's round trip against the raw one's."""
    raw = await near.tcp("echo")
    message = bytes(MESSAGE_BYTES)

    async def raw_echo() -> None:
        await raw.send_all(message)
        left = MESSAGE_BYTES
        while left:
            left -= len(await raw.receive_some(65536))

    async def unary() -> None:
        await near.rpc.call(near.peer, ECHO, NOTE, deadline_s=DEADLINE_S)

    async def inline() -> None:
        await near.rpc.call(near.peer, ECHO_INLINE, NOTE, deadline_s=DEADLINE_S)

    async def fresh() -> None:
        await near.rpc.call(near.peer, ECHO, NOTE, deadline_s=DEADLINE_S, fresh=True)

    def each(once: Callable[[], Awaitable[None]]) -> Callable[[], Awaitable[float]]:
        async def measure() -> float:
            with stopwatch() as seconds:
                for _ in range(CALLS):
                    await once()
            return seconds() / CALLS

        return measure

    ways = {"raw TCP": raw_echo, "call": unary, "call, inline handler": inline, "call, fresh stream": fresh}
    found = await compare({name: each(way) for name, way in ways.items()})
    print(f"round trip of {MESSAGE_BYTES} bytes\n{found.table('us', 1e6)}", flush=True)
    await raw.aclose()
    return {
        "unary_vs_raw": found.ratio("call", "raw TCP"),
        "unary_inline_vs_raw": found.ratio("call, inline handler", "raw TCP"),
        "fresh_vs_raw": found.ratio("call, fresh stream", "raw TCP"),
        "unary_us": found.median("call") * 1e6,
        "raw_us": found.median("raw TCP") * 1e6,
    }


async def throughput(near: Near) -> Figures:
    """One-way throughput with 1 MiB writes."""
    raw, tls = await near.tcp("sink"), await near.tls()
    await tls.do_handshake()
    total = STREAM_MIB * MIB

    def each(stream: trio.abc.Stream) -> Callable[[], Awaitable[float]]:
        async def measure() -> float:
            with stopwatch() as seconds:
                await stream.send_all(total.to_bytes(8, "big"))
                for _ in range(STREAM_MIB):
                    await stream.send_all(CHUNK)
                await stream.receive_some(8)
            return total / seconds()

        return measure

    async def mycel() -> float:
        stream = await near.host.open_stream(near.peer, SINK)
        with stopwatch() as seconds:
            for _ in range(STREAM_MIB):
                await stream.send(CHUNK)
            await stream.send_eof()
            assert int.from_bytes(await stream.receive_exactly(8), "big") == total
        rate = total / seconds()
        await stream.aclose()
        return rate

    found = await compare({"raw TCP": each(raw), "TLS 1.3": each(tls), "stream": mycel})
    print(f"one way, 1 MiB writes, {STREAM_MIB} MiB\n{found.table('MB/s', 1e-6)}", flush=True)
    await raw.aclose()
    await tls.aclose()
    return {
        "stream_vs_tls": found.ratio("stream", "TLS 1.3"),
        "stream_mb_s": found.median("stream") / 1e6,
        "tls_mb_s": found.median("TLS 1.3") / 1e6,
    }


async def in_flight(near: Near, count: int) -> Figures:
    """Calls that all wait for each other at the far end."""
    failed = 0

    async def ask() -> None:
        nonlocal failed
        try:
            await near.rpc.call(near.peer, MEET, count, deadline_s=DEADLINE_S)
        except Exception as error:  # boundary: failures are what is counted here
            failed += 1
            print(f"  failed: {error!r}", flush=True)

    with stopwatch() as seconds:
        async with trio.open_nursery() as nursery:
            for _ in range(count):
                nursery.start_soon(ask)
    print(f"{count} calls in flight at once: {failed} failed, {seconds():.2f} s", flush=True)
    return {f"calls_{count}_failed": failed, f"calls_{count}_s": seconds()}


async def slow_handlers(near: Near) -> Figures:
    """Eight blocking handlers at once, and pings beside them."""
    for _ in range(8):  # start the threads
        await near.rpc.call(near.peer, BLOCK, 0.0, deadline_s=DEADLINE_S)
    worst = 0.0
    with stopwatch() as seconds:
        async with trio.open_nursery() as nursery:

            async def ping() -> None:
                nonlocal worst
                while True:
                    with stopwatch() as trip:
                        await near.rpc.call(near.peer, ECHO, NOTE, deadline_s=DEADLINE_S)
                    worst = max(worst, trip())
                    await trio.sleep(0.002)

            nursery.start_soon(ping)
            async with trio.open_nursery() as blocked:
                for _ in range(8):
                    blocked.start_soon(lambda: near.rpc.call(near.peer, BLOCK, 0.3, deadline_s=DEADLINE_S))
            took = seconds()
            nursery.cancel_scope.cancel()
    print(f"8 handlers blocking for 0.3 s: {took:.3f} s, slowest ping {worst * 1e3:.1f} ms", flush=True)
    return {"slow_handlers_s": took, "slow_handlers_ping_ms": worst * 1e3}


async def slow_consumer(near: Near) -> Figures:
    """20 000 items of 4 KiB for a reader that first sleeps and then dawdles."""
    count, size = 20_000, 4096
    got = 0
    here = Memory()
    before = psutil.Process().memory_info().rss
    await near.rpc.call(near.peer, MEMORY, True, deadline_s=DEADLINE_S)
    await trio.sleep(0.05)
    far_before = await near.rpc.call(near.peer, MEMORY, True, deadline_s=DEADLINE_S)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(here.run)
        async with near.rpc.stream(near.peer, ITEMS, (count, size), deadline_s=DEADLINE_S) as stream:
            await trio.sleep(1.0)
            async for item in stream:
                got += len(item) == size
                if got % 20 == 0:
                    await trio.sleep(0.001)
        nursery.cancel_scope.cancel()
    far_peak = await near.rpc.call(near.peer, MEMORY, True, deadline_s=DEADLINE_S) - far_before
    peak = here.most - before
    print(
        f"slow consumer: {got} of {count} items of {size} bytes ({count * size / MIB:.0f} MiB), "
        f"peak +{peak / MIB:.1f} MiB here, +{far_peak / MIB:.1f} MiB there",
        flush=True,
    )
    return {"slow_consumer_items": got, "slow_consumer_peak_mib": max(peak, far_peak) / MIB}


async def long_fat_line() -> Figures:
    """One stream over a simulated line of 1 Gbit/s and 100 ms, in virtual time."""
    line = LinkOptions(latency_s=RTT_S / 4, up_bytes_per_s=GIGABIT, down_bytes_per_s=GIGABIT)
    total = SIM_MIB * MIB
    async with internet(InternetOptions(seed=1, link=line)) as net, trio.open_nursery() as nursery:
        machines = [net.add("near"), net.add("far")]
        near, far = (
            Host(
                SimNetwork(machine),
                OwnKey(bytes([number]) * 32),
                listen=[f"/ip4/{machine.ips[0]}/tcp/4001"],
                default_access=Access.MEMBER,
            )
            for number, machine in enumerate(machines, 1)
        )
        arrived = 0.0

        async def timed_sink(stream: Stream) -> None:
            nonlocal arrived
            count = 0
            while data := await stream.receive_some():
                count += len(data)
                arrived = trio.current_time()
            assert count == total
            await stream.send(b"all")

        far.serve_stream(SINK, timed_sink)
        await nursery.start(near.run)
        await nursery.start(far.run)
        peer = await near.connect(far.listen_addrs)
        began = trio.current_time()
        stream = await near.open_stream(peer, SINK)
        for _ in range(SIM_MIB):
            await stream.send(CHUNK)
        await stream.send_eof()
        await stream.receive_exactly(3)
        fill = total / (arrived - began) / GIGABIT
        nursery.cancel_scope.cancel()
    print(f"{SIM_MIB} MiB over a simulated 1 Gbit/s line of 100 ms: {fill:.0%} of it", flush=True)
    return {"sim_100ms_fill": fill}


async def on_real_sockets() -> Figures:
    """All that needs the far process."""
    figures: Figures = {}
    async with far_end() as near:
        figures |= await round_trips(near)
        figures |= await throughput(near)
        for count in (2_000, 10_000):
            figures |= await in_flight(near, count)
        figures |= await slow_handlers(near)
        figures |= await slow_consumer(near)
    return figures


def main() -> None:
    """Measure everything and report."""
    figures = trio.run(on_real_sockets)
    figures |= clock.run(long_fat_line, 1)
    print("py-libp2p 0.8.1, elsewhere: unary 5.6, fresh 25, stream 0.3-0.5", flush=True)
    report("rpc", figures)


if __name__ == "__main__":
    main()
