"""What a relay, in a process of its own, holds for 1000 peers and 200 circuits that nobody reads."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import trio

from mycel.node.host import Host
from mycel.node.tcp import TcpNetwork
from mycel.protocol import relay as wire
from mycel.protocol.delimited import receive_prefixed
from mycel.protocol.keys import OwnKey
from mycel.protocol.limits import KIB, MIB, Limits
from mycel.protocol.mesh import Access
from mycel.protocol.relay import HOP, STOP, Kind, Message, Status

PEERS = 1000
CIRCUITS = 200
CALLERS = 10

CONNECTION_BYTES = 100 * KIB
"""`Limits.connections`: what a connection costs."""

CIRCUIT_BYTES = 2 * (256 + 64) * KIB
"""`RelayLimits.circuits`: two windows that nobody empties, and a piece on its way in each direction."""

POOL_BYTES = 64 * MIB
"""`RelayLimits.window_pool`: what windows may have grown by."""

LIMITS = Limits(
    connections=2048, connections_per_ip=2048, keepalive_s=60, silence_s=120, dial_s=60, handshake_s=60
)
"""Patient: what is measured is memory, on whatever machine."""

RELAY = """
import json, sys
import trio
from mycel.node.host import Host
from mycel.node.reach.relay_server import RelayServer
from mycel.node.tcp import TcpNetwork
from mycel.protocol.keys import OwnKey
from mycel.protocol.limits import Limits
from mycel.protocol.limits_reach import RelayLimits
from mycel.protocol.mesh import Access

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))

async def main():
    limits = Limits(connections=2048, connections_per_ip=2048, keepalive_s=60, silence_s=120, handshake_s=60)
    host = Host(TcpNetwork(), OwnKey(bytes(32)), listen=["/ip4/127.0.0.1/tcp/0"], limits=limits,
                default_access=Access.MEMBER)
    rates = dict(bytes_per_s=0, bytes_per_s_per_peer=0)
    server = RelayServer(host, RelayLimits(circuits_per_peer=256, **rates))
    async with trio.open_nursery() as nursery:
        await nursery.start(host.run)
        await nursery.start(server.run)
        server.serve(True)
        print(json.dumps(str(host.listen_addrs[0])), flush=True)
        while await trio.to_thread.run_sync(sys.stdin.readline):
            print(json.dumps({
                "reservations": server.reservations,
                "circuits": server.circuits,
                "forwarded": server.forwarded,
                "peak": peak(),
            }), flush=True)
        nursery.cancel_scope.cancel()

trio.run(main)
"""


class Relay:
    """The relay's process."""

    def __init__(self, process: trio.Process) -> None:
        self.process = process

    async def line(self):
        held = b""
        while not held.endswith(b"\n"):
            piece = await self.process.stdout.receive_some(1)
            assert piece, "the relay ended"
            held += piece
        return json.loads(held)

    async def ask(self):
        await self.process.stdin.send_all(b"\n")
        return await self.line()


async def ask_hop(host, peer, request):
    stream = await host.open_stream(peer, HOP)
    await stream.send(wire.write_hop(request))
    answer = wire.read_hop(await receive_prefixed(stream, 4096))
    assert answer.status == Status.OK, wire.meaning(answer.status)
    return stream


async def count_to_end(stream, total):
    count = 0
    while count < total:
        piece = await stream.receive_some()
        assert piece
        count += len(piece)


async def fill(stream, sent, index):
    """Send as much as goes, and note it."""
    block = memoryview(bytes(64 * KIB))
    while True:
        sent[index] += stream.offer(block)
        while not stream.has_room:  # noqa: ASYNC110
            await trio.sleep(0.1)


async def standstill(sent):
    """Return when nothing has moved for a while."""
    before = -1
    while before != (before := sum(sent)):  # noqa: ASYNC110
        await trio.sleep(3)


class Crowd:
    """Hosts that hold reservations or dial through them, all in this process."""

    def __init__(self, nursery: trio.Nursery, addr: str) -> None:
        self.nursery = nursery
        self.addr = addr
        self.arrived: list = []
        self.relay = ""

    async def host(self, number: int) -> Host:
        key = OwnKey(number.to_bytes(32, "big"))
        host = Host(TcpNetwork(), key, limits=LIMITS, default_access=Access.MEMBER)
        host.serve_stream(STOP, self.take)
        await self.nursery.start(host.run)
        self.relay = await host.connect([self.addr], timeout=60)
        return host

    async def take(self, stream) -> None:
        await receive_prefixed(stream, 4096)
        await stream.send(wire.write_stop(Message(Kind.STATUS, status=Status.OK)))
        self.arrived.append(stream)
        await trio.sleep_forever()


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read as Linux counts it")
async def test_a_relay_with_a_thousand_reservations_and_two_hundred_stuck_circuits_holds_its_bound():
    process = await trio.lowlevel.open_process(
        [sys.executable, "-c", RELAY], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        with trio.fail_after(300):
            await check(Relay(process))
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()


async def check(relay: Relay) -> None:
    addr = await relay.line()
    empty = (await relay.ask())["peak"]
    async with trio.open_nursery() as nursery:
        crowd = Crowd(nursery, addr)
        hosts: list[Host] = []

        async def reserve(numbers) -> None:
            for number in numbers:
                host = await crowd.host(number)
                await (await ask_hop(host, crowd.relay, Message(Kind.RESERVE))).aclose()
                hosts.append(host)

        async with trio.open_nursery() as dialling:
            for first in range(16):
                dialling.start_soon(reserve, range(1 + first, 1 + PEERS, 16))
        held = await relay.ask()
        assert held["reservations"] == PEERS
        assert held["peak"] - empty < PEERS * CONNECTION_BYTES

        callers = [await crowd.host(PEERS + 1 + number) for number in range(CALLERS)]
        near = [
            await ask_hop(callers[n % CALLERS], crowd.relay, Message(Kind.CONNECT, hosts[n].peer_id))
            for n in range(CIRCUITS)
        ]
        far = crowd.arrived
        sent = [0] * 2 * CIRCUITS
        async with trio.open_nursery() as filling:
            for index, stream in enumerate([*near, *far]):
                filling.start_soon(fill, stream, sent, index)
            await standstill(sent)
            filling.cancel_scope.cancel()
        stuck = await relay.ask()
        assert stuck["circuits"] == CIRCUITS
        # every direction is stuck: a window is full at the reader who does not read, and another at the relay
        assert min(sent) > 256 * KIB
        assert sum(sent) - stuck["forwarded"] > 2 * CIRCUITS * 128 * KIB
        assert stuck["peak"] - held["peak"] < CIRCUITS * CIRCUIT_BYTES + POOL_BYTES

        async with trio.open_nursery() as reading:  # nothing of it is lost
            for stream, count in zip([*far, *near], sent, strict=True):
                reading.start_soon(count_to_end, stream, count)
        nursery.cancel_scope.cancel()
