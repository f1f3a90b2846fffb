"""Peers that break the rules: dropped with a reason, and the host goes on for everybody else."""

from __future__ import annotations

import random

import trio
from multiaddr import Multiaddr

from mycel.protocol import multistream, noise, yamux
from mycel.protocol.connection import Connection, Setup
from mycel.protocol.errors import PipeBroken
from mycel.protocol.keys import OwnKey
from mycel.protocol.limits import DEFAULT_LIMITS, Limits
from mycel.protocol.yamux import HEADER
from mycel.simnet.internet import BufferOptions
from mycel.simnet.network import SimNetwork


async def echo(stream):
    while data := await stream.receive_some():
        await stream.send(data)


async def send_all(pipe, data):
    view = memoryview(data)
    while view:
        count = pipe.try_send(view)
        view = view[count:]
        if view:
            await pipe.wait_writable()


class Rogue:
    """A libp2p peer with good keys that writes its frames by hand."""

    def __init__(self, pipe, seed):
        rng = random.Random(seed)
        static = noise.Static(OwnKey(rng.randbytes(32)), rng.randbytes(32), muxers=(yamux.PROTOCOL,))
        self.connection = Connection(
            Setup(static, DEFAULT_LIMITS, []), self, expected=None, dialer=True, ephemeral=rng.randbytes(32)
        )
        self.pipe = pipe
        self.opened = False

    def on_open(self, remote):
        self.opened = True

    def on_channel(self, channel):
        pass

    def on_slot(self):
        pass

    def on_go_away(self, code):
        pass

    async def flush(self):
        while view := self.connection.outgoing():
            await send_all(self.pipe, bytes(view))
            self.connection.sent(len(view))

    async def shake_hands(self):
        buffer = bytearray(65536)
        while not self.opened:
            await self.flush()
            await self.pipe.wait_readable()
            count = self.pipe.try_recv_into(buffer)
            assert count
            self.connection.receive(memoryview(bytearray(buffer[:count])), 0.0)
        await self.flush()

    async def send_frames(self, plain):
        outlet = self.connection._outlet
        for start in range(0, len(plain), 60_000):
            piece = plain[start : start + 60_000]
            view, at = outlet.reserve(len(piece))
            view[at : at + len(piece)] = piece
            outlet.seal()
            await self.flush()

    async def listen_to_end(self):
        """Take what the host says until it hangs up."""
        buffer = bytearray(65536)
        with trio.fail_after(30):
            while (count := self.pipe.try_recv_into(buffer)) != 0:
                if count is None:
                    await self.pipe.wait_readable()
                else:
                    self.connection.receive(memoryview(bytearray(buffer[:count])), 0.0)


def test_garbage_from_many_pipes_disturbs_nobody(play):
    async def scenario(world):
        a, b, peer = await world.pair()
        b.serve_stream("/echo", echo)
        steady = await a.open_stream(peer, "/echo")
        network = SimNetwork(world.net.add("rogue"))
        rng = random.Random(3)
        starts = [
            b"",
            multistream.message(multistream.HEADER),
            multistream.proposal("/noise"),
            multistream.proposal("/noise") + b"\x00\x20" + bytes(32),
        ]
        for number in range(100):
            pipe = await network.dial(Multiaddr(str(b.listen_addrs[0])))
            try:
                await send_all(pipe, starts[number % 4] + rng.randbytes(rng.randrange(1, 3000)))
                await trio.sleep(0.02)
            except PipeBroken:
                pass
            finally:
                (pipe.reset if number % 2 else pipe.close)()
            await steady.send(b"still here")
            assert await steady.receive_exactly(10) == b"still here"
        await trio.sleep(7)
        assert b.connections == 1
        assert b.counters.lost["protocol"] > 60
        assert b.counters.handler_errors == {}

    play(scenario)


def test_hostile_frames_behind_a_good_handshake_disturb_nobody(play):
    async def scenario(world):
        a, b, peer = await world.pair()
        b.serve_stream("/echo", echo)
        steady = await a.open_stream(peer, "/echo")
        network = SimNetwork(world.net.add("rogue"))
        rng = random.Random(4)
        for number in range(60):
            pipe = await network.dial(Multiaddr(str(b.listen_addrs[0])))
            rogue = Rogue(pipe, number)
            await rogue.shake_hands()
            try:
                for _ in range(rng.randrange(1, 30)):
                    value = rng.choice([0, 1, 40, 1000, 0xFFFFFFFF])
                    flags = rng.choice([0, 1, 1, 2, 4, 5, 8])
                    name = rng.choice([b"", multistream.proposal("/echo"), rng.randbytes(40)])
                    stream = 2 * rng.randrange(8) + 1
                    plain = HEADER.pack(0, rng.randrange(4), flags, stream, value or len(name)) + name
                    await rogue.send_frames(plain)
                await trio.sleep(0.05)
            except PipeBroken:
                pass
            pipe.reset()
            await steady.send(b"still here")
            assert await steady.receive_exactly(10) == b"still here"
        await trio.sleep(10)
        assert b.connections == 1
        assert b.counters.handler_errors == {}

    play(scenario)


def test_a_peer_that_breaks_the_protocol_is_told_the_reason(play):
    async def scenario(world):
        b = await world.host("b")
        pipe = await SimNetwork(world.net.add("rogue")).dial(Multiaddr(str(b.listen_addrs[0])))
        rogue = Rogue(pipe, 1)
        await rogue.shake_hands()
        await trio.sleep(0.1)
        told = []
        rogue.on_channel = lambda channel: setattr(
            channel, "sink", lambda data, error: told.append(bytes(data or b""))
        )
        await rogue.send_frames(HEADER.pack(0, yamux.DATA, yamux.SYN, 1, 0x7FFFFFFF))
        await rogue.listen_to_end()
        assert b"protocol\n" in b"".join(told)
        assert b"more than any window" in b"".join(told)
        assert b.counters.lost == {"protocol": 1}

    play(scenario)


def test_a_peer_that_never_reads_is_dropped_and_holds_little(play):
    async def scenario(world):
        b = await world.host("b")
        b.serve_stream("/echo", echo)
        pipe = await SimNetwork(world.net.add("rogue")).dial(Multiaddr(str(b.listen_addrs[0])))
        rogue = Rogue(pipe, 1)
        await rogue.shake_hands()
        pings = HEADER.pack(0, yamux.PING, yamux.SYN, 0, 1) * 5000
        try:
            for _ in range(2000):
                await rogue.send_frames(pings)
                await trio.sleep(0.001)
        except PipeBroken:
            pass
        await trio.sleep(5)
        assert b.connections == 0
        assert b.counters.lost["protocol"] + b.counters.lost["silent"] == 1

    play(scenario, buffers=BufferOptions(send_max=1 << 20, receive_max=1 << 20))


def test_streams_that_never_name_a_protocol_end_with_the_deadline(play):
    async def scenario(world):
        b = await world.host("b", limits=Limits(negotiate_s=2.0))
        pipe = await SimNetwork(world.net.add("rogue")).dial(Multiaddr(str(b.listen_addrs[0])))
        rogue = Rogue(pipe, 1)
        await rogue.shake_hands()
        await trio.sleep(0.5)
        before = b.streams
        header = multistream.message(multistream.HEADER)
        for number in range(1, 100, 2):
            await rogue.send_frames(HEADER.pack(0, yamux.DATA, yamux.SYN, number, len(header)) + header)
        await trio.sleep(1)
        assert b.streams == before + 50
        for _ in range(8):  # a sign of life now and then, so that it is not silent
            await rogue.send_frames(HEADER.pack(0, yamux.PING, yamux.SYN, 0, 1))
            await trio.sleep(0.25)
        assert b.streams <= before
        assert b.counters.refused["negotiation"] == 50

    play(scenario)
