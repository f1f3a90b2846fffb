"""Peers that send what no peer should, or nothing at all; and what becomes of lines in the long run."""

from __future__ import annotations

import random
from functools import partial
from types import NoneType

import msgspec
import pytest
import trio

from mycel.protocol.errors import ConnectionLost, DeadlineExceeded, RemoteProtocolError, StreamReset
from mycel.protocol.frame import HEAD, REQUEST, RESPONSE, pack
from mycel.protocol.limits import CallLimits
from mycel.protocol.mesh import Stream
from mycel.protocol.rpc import Call, Method, Rpc
from mycel.protocol.serve_line import ANSWER, LINE
from mycel.protocol.serve_single import SINGLE
from mycel.simnet.mesh import MeshOptions, mesh_world

LONG_S = 20.0
ECHO = Method("test.echo", dict[str, int], dict[str, int])
SLEEP = Method("test.sleep", float, NoneType)
UPLOAD = Method("test.upload", bytes, int)

over_sim_mesh = pytest.mark.parametrize("world", ["sim-mesh"], indirect=True)
over_sim_host = pytest.mark.parametrize("world", ["sim-host"], indirect=True)


async def echo(call: Call, request: dict[str, int]) -> dict[str, int]:
    return request


async def sleep(call: Call, seconds: float) -> None:
    await trio.sleep(seconds)


async def take(call: Call, data: bytes) -> int:
    return len(data)


def hostile_bytes(rng: random.Random) -> bytes:
    """Noise, frames with impossible numbers, damaged frames, good frames with bad bodies, half a frame."""
    name = rng.choice([b"test.echo", b"test.sleep", b"nothing", b""])
    body = rng.choice([b"", b"\xc1", msgspec.msgpack.encode({"a": "b"}), rng.randbytes(30), b"\x91" * 2000])
    raws = [rng.randbytes(rng.randrange(9)) for _ in range(rng.randrange(3))]
    good = b"".join(
        pack(rng.randrange(6), rng.getrandbits(64), body, raws, name=name, deadline_ms=rng.getrandbits(12))
    )
    flipped = bytearray(good)
    flipped[rng.randrange(len(good))] ^= 1 << rng.randrange(8)
    head = HEAD.pack(*(rng.getrandbits(bits) for bits in (32, 8, 8, 16, 64, 32)))
    return rng.choice([rng.randbytes(rng.randrange(200)), head, bytes(flipped), good, good[: len(good) // 2]])


@over_sim_mesh
async def test_hostile_bytes_drop_their_sender_or_nothing(make_duo, autojump_clock):
    """300 bursts on the three protocols, from one seed; the far side answers others all the while."""
    rng = random.Random(5)
    async with make_duo() as duo:
        duo.far.serve(ECHO, echo)
        duo.far.serve(SLEEP, sleep)
        for number in range(300):
            if duo.peer not in duo.near_mesh.peers:
                await duo.join()
            stream = await duo.near_mesh.open_stream(duo.peer, rng.choice([LINE, SINGLE, ANSWER]))
            try:
                for _ in range(rng.randrange(1, 4)):
                    await stream.send(hostile_bytes(rng))
                if rng.random() < 0.5:
                    await stream.send_eof()
            except (StreamReset, ConnectionLost):
                pass
            await trio.sleep(0.05)
            if rng.random() < 0.3:
                stream.reset()
            assert await duo.far.call(duo.peer, ECHO, {"n": number}, deadline_s=LONG_S) == {"n": number}
        await trio.sleep(2 * LONG_S)
        if duo.peer not in duo.near_mesh.peers:
            await duo.join()
        assert await duo.near.call(duo.peer, ECHO, {"n": 1}, deadline_s=LONG_S) == {"n": 1}
        assert duo.far_mesh.handler_errors == 0


@over_sim_mesh
async def test_a_call_that_says_nothing_is_ended(make_duo, autojump_clock):
    async with make_duo() as duo:
        stream = await duo.near_mesh.open_stream(duo.peer, SINGLE)
        await stream.send(b"\0")
        began = trio.current_time()
        with pytest.raises(StreamReset):
            await stream.receive_some()
        assert trio.current_time() - began == pytest.approx(CallLimits().request_s, abs=0.1)


@over_sim_mesh
async def test_a_request_that_never_comes_whole_gives_its_budget_back(make_duo, autojump_clock):
    async with make_duo(far_limits=CallLimits(in_flight_bytes=1 << 20)) as duo:
        duo.far.serve(UPLOAD, take)
        stream = await duo.near_mesh.open_stream(duo.peer, SINGLE)
        await stream.send(HEAD.pack(1 << 20, REQUEST, 0, 0, 7, 3000) + bytes(100))
        await trio.sleep(0.1)
        began = trio.current_time()
        size = 1_000_000
        assert await duo.near.call(duo.peer, UPLOAD, bytes(size), deadline_s=LONG_S) == size
        assert 2.8 < trio.current_time() - began < 3.5  # it had to wait for the other's deadline


async def test_answers_that_are_no_answers_drop_the_server(autojump_clock):
    """A server of our own making answers with junk, with a request, with another's number, with nothing."""

    async def junk(stream: Stream) -> None:
        await stream.receive_some()
        await stream.send(b"\xff" * 64)
        await trio.sleep_forever()

    async def request(stream: Stream) -> None:
        await stream.receive_some()
        await stream.send(pack(REQUEST, 1)[0])
        await trio.sleep_forever()

    async def strange_number(stream: Stream) -> None:
        await stream.receive_some()
        await stream.send(pack(RESPONSE, 1 << 40, b"\x80")[0])
        await trio.sleep_forever()

    async def end(stream: Stream) -> None:
        await stream.receive_some()

    expected = [
        (junk, RemoteProtocolError, False),
        (request, RemoteProtocolError, False),
        (strange_number, DeadlineExceeded, True),
        (end, ConnectionLost, True),
    ]
    for handler, error, stays in expected:
        async with mesh_world(MeshOptions(seed=1)) as world, trio.open_nursery() as nursery:
            near, far = world.add("near"), world.add("far")
            far.serve_stream(LINE, handler)
            rpc = Rpc(near)
            await nursery.start(rpc.run)
            await near.connect(far.listen_addrs)
            with pytest.raises(error):
                await rpc.call(far.peer_id, ECHO, {}, deadline_s=LONG_S)
            await trio.sleep(1.0)
            assert (far.peer_id in near.peers) == stays
            nursery.cancel_scope.cancel()


@over_sim_host
async def test_lines_are_replaced_and_take_no_call_with_them(make_duo, autojump_clock):
    line_s = CallLimits().line_s
    async with make_duo() as duo:
        duo.far.serve(ECHO, echo)
        duo.far.serve(SLEEP, sleep)
        await trio.sleep(1.0)
        idle = duo.near_mesh.streams
        assert await duo.near.call(duo.peer, ECHO, {"n": 1}, deadline_s=LONG_S) == {"n": 1}
        assert duo.near_mesh.streams == idle + 1
        slow = Method("test.slow", int, bytes)

        async def answer_late(call: Call, size: int) -> bytes:
            await trio.sleep(3 * line_s)
            return bytes(size)

        duo.far.serve(slow, answer_late)
        async with trio.open_nursery() as nursery:
            for size in (10, 1_000_000):  # the large one comes on a stream of its own
                call = partial(duo.near.call, duo.peer, slow, size, deadline_s=4 * line_s)
                nursery.start_soon(call)
            for number in range(40):
                await duo.near.call(duo.peer, ECHO, {"n": number}, deadline_s=LONG_S)
                await trio.sleep(line_s / 10)
        await trio.sleep(2 * line_s)
        assert duo.near_mesh.streams == idle
        assert duo.far_mesh.streams == idle
        assert await duo.near.call(duo.peer, ECHO, {"n": 2}, deadline_s=LONG_S) == {"n": 2}


@over_sim_host
async def test_a_connection_given_up_for_another_closes_in_spite_of_calls(make_duo, autojump_clock):
    """Both sides dial again and again while calls run: in the end one connection is left, no call is lost."""
    async with make_duo() as duo:
        for rpc in (duo.near, duo.far):
            rpc.serve(ECHO, echo)
        answered = 0

        async def ask(rpc: Rpc, mesh, number: int) -> None:
            nonlocal answered
            (peer,) = mesh.peers
            await rpc.call(peer, ECHO, {"n": number}, deadline_s=LONG_S)
            answered += 1

        async with trio.open_nursery() as nursery:
            for number in range(100):
                nursery.start_soon(ask, duo.near, duo.near_mesh, number)
                nursery.start_soon(ask, duo.far, duo.far_mesh, number)
                if number % 40 == 10:
                    nursery.start_soon(duo.near_mesh._connector._attempt, duo.far_mesh.listen_addrs[0], [])
                    nursery.start_soon(duo.far_mesh._connector._attempt, duo.near_mesh.listen_addrs[0], [])
                await trio.sleep(1.0)
        assert answered == 200
        await trio.sleep(2 * CallLimits().line_s)
        assert duo.near_mesh.connections == duo.far_mesh.connections == 1
