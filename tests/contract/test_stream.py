"""What every mesh's `Stream` must do: the light one of simnet, and the real host over both networks."""

from __future__ import annotations

import hashlib
import random

import pytest
import trio
import trio.testing

from mycel.protocol.errors import RemoteProtocolError, StreamClosed, StreamReset

ECHO = "/test/echo/1"
MIB = 1 << 20


def test_a_stream_carries_bytes_both_ways_and_ends(play_mesh):
    async def scenario(place):
        served = []

        async def handler(stream):
            served.append((stream.peer, stream.protocol))
            await place.echo(stream)

        await place.connect()
        place.b.serve_stream(ECHO, handler)
        stream = await place.a.open_stream(place.b.peer_id, ECHO)
        assert (stream.peer, stream.protocol) == (place.b.peer_id, ECHO)
        for size in (1, 100, 70_000):
            await stream.send(bytes(size))
            assert await stream.receive_exactly(size) == bytes(size)
        await stream.send_eof()
        assert await stream.receive_some() == b""
        assert served == [(place.a.peer_id, ECHO)]
        await stream.aclose()
        await stream.aclose()

    play_mesh(scenario)


def test_what_comes_byte_by_byte_is_received_as_one(play_mesh):
    async def scenario(place):
        await place.connect()
        near, far = await place.streams()
        said = bytes(n % 251 for n in range(1500))
        for n in range(len(said)):
            await near.send(said[n : n + 1])
        assert await far.receive_exactly(1200) == said[:1200]
        assert await far.receive_exactly(300) == said[1200:]

    play_mesh(scenario)


def test_large_transfers_both_ways_at_once_arrive_whole(play_mesh):
    async def scenario(place):
        await place.connect()
        near, far = await place.streams()
        rng = random.Random(1)
        data = rng.randbytes(6 * MIB)

        async def send(stream):
            view = memoryview(data)
            while view:
                part = view[: rng.randrange(1, 400_000)]
                await stream.send(part)
                view = view[len(part) :]
            await stream.send_eof()

        async def receive(stream):
            digest = hashlib.sha256()
            while part := await stream.receive_some(rng.randrange(1, 300_000)):
                digest.update(part)
            assert digest.digest() == hashlib.sha256(data).digest()

        async with trio.open_nursery() as nursery:
            for stream in (near, far):
                nursery.start_soon(send, stream)
                nursery.start_soon(receive, stream)

    play_mesh(scenario)


def test_a_reader_who_pauses_stops_the_writer(play_mesh):
    async def scenario(place):
        await place.connect()
        near, far = await place.streams()
        size = 48 * MIB
        sent = trio.Event()

        async def send():
            for _ in range(48):
                await near.send(bytes(MIB))
            sent.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            await trio.sleep(1.0)
            assert not sent.is_set()
            left = size
            while left:
                left -= len(await far.receive_some(left))
            await sent.wait()
        await place.until(lambda: near.try_send(b"room again"))
        assert await far.receive_exactly(10) == b"room again"

    play_mesh(scenario)


def test_try_send_is_all_or_nothing(play_mesh):
    async def scenario(place):
        await place.connect()
        near, far = await place.streams()
        sent = 0
        while near.try_send(sent.to_bytes(4, "big") + bytes(50_000)):
            sent += 1
            assert sent < 10_000
        assert sent > 0
        for number in range(sent):
            assert await far.receive_exactly(50_004) == number.to_bytes(4, "big") + bytes(50_000)
        with trio.move_on_after(0.3) as scope:
            await far.receive_some()
        assert scope.cancelled_caught  # nothing of the one that did not fit

    play_mesh(scenario)


def test_the_other_direction_stays_open_after_the_end_of_one(play_mesh):
    async def scenario(place):
        await place.connect()
        near, far = await place.streams()
        await near.send(b"question")
        await near.send_eof()
        with pytest.raises(StreamClosed):
            await near.send(b"more")
        with pytest.raises(StreamClosed):
            near.try_send(b"more")
        assert await far.receive_exactly(8) == b"question"
        assert await far.receive_some() == b""
        assert await far.receive_some() == b""
        await far.send(b"answer")
        assert await near.receive_exactly(6) == b"answer"

    play_mesh(scenario)


def test_a_stream_that_ends_early_is_the_peers_fault(play_mesh):
    async def scenario(place):
        await place.connect()
        near, far = await place.streams()
        await near.send(b"abc")
        await near.send_eof()
        with pytest.raises(RemoteProtocolError):
            await far.receive_exactly(10)

    play_mesh(scenario)


def test_a_reset_is_seen_by_readers_and_writers_at_both_ends(play_mesh):
    async def scenario(place):
        await place.connect()
        near, far = await place.streams()
        other_near, other_far = await place.streams("/test/other/1")
        async with trio.open_nursery() as nursery:

            async def wait():
                with pytest.raises(StreamReset):
                    await far.receive_some()

            nursery.start_soon(wait)
            await trio.sleep(0.05)
            near.reset()
        with pytest.raises(StreamReset):
            await far.send(b"x")
        with pytest.raises(StreamReset):
            await near.receive_some()
        with pytest.raises(StreamReset):
            await near.send(b"x")
        near.reset()
        await far.aclose()
        await other_near.send(b"unhurt")
        assert await other_far.receive_exactly(6) == b"unhurt"

    play_mesh(scenario)


def test_what_a_handler_raises_ends_its_own_stream_only(play_mesh):
    async def scenario(place):
        async def broken(stream):
            await stream.receive_exactly(1)
            raise ValueError("a bug in a handler")

        await place.connect()
        near, far = await place.streams()
        place.b.serve_stream("/test/broken/1", broken)
        stream = await place.a.open_stream(place.b.peer_id, "/test/broken/1")
        await stream.send(b"x")
        with pytest.raises(StreamReset):
            await stream.receive_some()
        await near.send(b"unhurt")
        assert await far.receive_exactly(6) == b"unhurt"
        assert place.a.peer_id in place.b.peers

    play_mesh(scenario)


def test_a_handler_that_returns_ends_its_stream_in_order(play_mesh):
    async def scenario(place):
        async def answer(stream):
            await stream.send(b"said and done")

        await place.connect()
        place.b.serve_stream("/test/answer/1", answer)
        stream = await place.a.open_stream(place.b.peer_id, "/test/answer/1")
        await stream.send(b"?")
        assert await stream.receive_exactly(13) == b"said and done"
        assert await stream.receive_some() == b""

    play_mesh(scenario)


def test_delivered_bytes_come_in_order_with_their_end(play_mesh):
    async def scenario(place):
        await place.connect()
        near, far = await place.streams()
        await near.send(b"before ")
        await trio.sleep(0.5)
        got, end = bytearray(), trio.Event()

        def receiver(data, error):
            assert error is None
            if data is None:
                end.set()
            else:
                got.extend(data)

        far.deliver_to(receiver)
        assert bytes(got) == b"before "
        for number in range(200):
            await near.send(b"%d " % number)
        await near.send_eof()
        await end.wait()
        assert got == b"before " + b"".join(b"%d " % number for number in range(200))

    play_mesh(scenario)


def test_a_receiver_can_answer_from_within_its_call(play_mesh):
    async def scenario(place):
        await place.connect()
        near, far = await place.streams()
        far.deliver_to(lambda data, error: far.try_send(bytes(data)) if data is not None else None)
        for number in range(20):
            await near.send(b"%03d" % number)
            assert await near.receive_exactly(3) == b"%03d" % number

    play_mesh(scenario)


def test_a_receiver_hears_of_loss(play_mesh):
    async def scenario(place):
        await place.connect()
        near, far = await place.streams()
        heard = []
        far.deliver_to(lambda data, error: heard.append((data, error)))
        near.reset()
        await place.until(lambda: heard)
        assert heard[0][0] is None
        assert isinstance(heard[0][1], StreamReset)

    play_mesh(scenario)


def test_what_a_receiver_raises_ends_its_own_stream_only(play_mesh):
    async def scenario(place):
        def receiver(data, error):
            if data is not None:
                raise ValueError("a bug in a receiver")

        await place.connect()
        near, far = await place.streams()
        other_near, other_far = await place.streams("/test/other/1")
        far.deliver_to(receiver)
        await near.send(b"x")
        with pytest.raises(StreamReset):
            await near.receive_some()
        await other_near.send(b"unhurt")
        assert await other_far.receive_exactly(6) == b"unhurt"

    play_mesh(scenario)


def test_withheld_credit_stops_the_writer_until_it_is_given(play_mesh):
    async def scenario(place):
        await place.connect()
        near, far = await place.streams()
        got = 0

        def receiver(data, error):
            nonlocal got
            got += len(data) if data is not None else 0

        far.deliver_to(receiver, credit=False)
        size = 4 * MIB
        sent = trio.Event()

        async def send():
            await near.send(bytes(size))
            sent.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            await trio.sleep(0.5)
            held = got
            assert 0 < held < size
            await trio.sleep(0.5)
            assert got == held
            assert not sent.is_set()
            credited = 0
            while not sent.is_set() or got < size:
                far.credit(got - credited)
                credited = got
                await trio.sleep(0.01)
        assert got == size

    play_mesh(scenario)


def test_a_cancelled_send_hurts_no_other_stream(play_mesh):
    async def scenario(place):
        await place.connect()
        near, far = await place.streams()
        stuck, _ = await place.streams("/test/stuck/1")
        for _ in range(5):
            with trio.move_on_after(0.05) as scope:
                await stuck.send(bytes(96 * MIB))
            assert scope.cancelled_caught
        stuck.reset()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(near.send, bytes(MIB))
            assert await far.receive_exactly(MIB) == bytes(MIB)

    play_mesh(scenario)


def test_two_tasks_at_one_end_are_a_bug(play_mesh):
    async def scenario(place):
        await place.connect()
        near, far = await place.streams()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(far.receive_some)
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(trio.BusyResourceError):
                await far.receive_some()
            nursery.cancel_scope.cancel()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(near.send, bytes(96 * MIB))
            await trio.sleep(0.2)
            with pytest.raises(trio.BusyResourceError):
                await near.send(b"x")
            with pytest.raises(trio.BusyResourceError):
                near.try_send(b"x")
            nursery.cancel_scope.cancel()

    play_mesh(scenario)


def test_many_streams_at_once(play_mesh):
    async def scenario(place):
        await place.connect()
        place.b.serve_stream(ECHO, place.echo)
        answers = []

        async def ask(number):
            stream = await place.a.open_stream(place.b.peer_id, ECHO)
            await stream.send(b"%d" % number)
            await stream.send_eof()
            answers.append(int(await stream.receive_some()))

        async with trio.open_nursery() as nursery:
            for number in range(300):
                nursery.start_soon(ask, number)
        assert sorted(answers) == list(range(300))

    play_mesh(scenario)
