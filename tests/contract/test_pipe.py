"""What every `Pipe` must do, in both worlds and over streams: bytes, backpressure, ends and losses."""

from __future__ import annotations

import hashlib
import random

import pytest
import trio
import trio.testing

from mycel.protocol.errors import PipeBroken

MIB = 1 << 20


async def send_all(pipe, data):
    view = memoryview(data)
    while view:
        count = pipe.try_send(view)
        if not count:
            await pipe.wait_writable()
        view = view[count:]


async def read_some(pipe, size=65536):
    buffer = bytearray(size)
    while (count := pipe.try_recv_into(buffer)) is None:
        await pipe.wait_readable()
    return bytes(buffer[:count])


async def read_to_end(pipe):
    parts = []
    while part := await read_some(pipe, 1 << 18):
        parts.append(part)
    return b"".join(parts)


async def read_exactly(pipe, count):
    data = b""
    while len(data) < count:
        part = await read_some(pipe, count - len(data))
        assert part, "the stream ended early"
        data += part
    return data


async def write_for_ever(pipe):
    while True:
        pipe.try_send(b"anybody?")
        await trio.sleep(0.01)


async def fill(pipe):
    """Write until nothing fits any more, for long enough that nothing moves; returns the bytes written."""
    written = 0
    block = bytes(64 << 10)
    while True:
        count = pipe.try_send(block)
        written += count
        if not count:
            with trio.move_on_after(0.3) as scope:
                await pipe.wait_writable()
            if scope.cancelled_caught:
                return written


def test_bytes_go_both_ways_in_order(play_pipe):
    async def scenario(place):
        _, near, far = await place.connect()
        for number in range(50):
            assert near.try_send(b"ping %d" % number) > 0
            assert await read_some(far) == b"ping %d" % number
            assert far.try_send(bytearray(b"pong")) == 4
            assert await read_some(near) == b"pong"

    play_pipe(scenario)


def test_nothing_yet_is_none(play_pipe):
    async def scenario(place):
        _, near, far = await place.connect()
        assert near.try_recv_into(bytearray(10)) is None
        assert far.try_recv_into(memoryview(bytearray(10))) is None

    play_pipe(scenario)


def test_a_small_buffer_gets_the_front_and_keeps_the_rest(play_pipe):
    async def scenario(place):
        _, near, far = await place.connect()
        near.try_send(b"abcdefghij")
        buffer = bytearray(b"....")
        await far.wait_readable()
        assert far.try_recv_into(memoryview(buffer)[:3]) == 3
        assert buffer == b"abc."
        assert await read_exactly(far, 7) == b"defghij"

    play_pipe(scenario)


def test_taken_bytes_are_copied(play_pipe):
    async def scenario(place):
        _, near, far = await place.connect()
        data = bytearray(b"before")
        near.try_send(data)
        data[:] = b"after!"
        assert await read_exactly(far, 6) == b"before"

    play_pipe(scenario)


def test_large_transfers_both_ways_at_once_arrive_whole(play_pipe):
    async def scenario(place):
        _, near, far = await place.connect()
        rng = random.Random(3)
        data = {"near": rng.randbytes(16 * MIB), "far": rng.randbytes(16 * MIB)}
        got = {}

        async def send(pipe, name):
            view = memoryview(data[name])
            while view:
                part = view[: rng.randrange(1, 300_000)]
                await send_all(pipe, part)
                view = view[len(part) :]

        async def receive(pipe, name):
            digest = hashlib.sha256()
            left = 16 * MIB
            while left:
                part = await read_some(pipe, min(left, rng.randrange(1, 500_000)))
                assert part
                digest.update(part)
                left -= len(part)
            got[name] = digest.digest()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send, near, "near")
            nursery.start_soon(send, far, "far")
            nursery.start_soon(receive, near, "far")
            nursery.start_soon(receive, far, "near")
        assert got == {name: hashlib.sha256(part).digest() for name, part in data.items()}

    play_pipe(scenario)


def test_a_reader_who_pauses_stops_the_writer(play_pipe):
    async def scenario(place):
        _, near, far = await place.connect()
        written = await fill(near)
        assert 64 << 10 <= written <= 64 * MIB
        assert near.try_send(b"more") <= 4

        async def drain():
            left = written
            while left:
                left -= len(await read_some(far, min(left, 1 << 18)))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(near.wait_writable)
            nursery.start_soon(drain)
        assert near.try_send(b"again") > 0

    play_pipe(scenario)


def test_the_other_direction_flows_while_one_is_stuck(play_pipe):
    async def scenario(place):
        _, near, far = await place.connect()
        await fill(near)
        far.try_send(b"still here")
        assert await read_some(near) == b"still here"

    play_pipe(scenario)


def test_close_delivers_what_was_taken_and_then_the_end(play_pipe):
    async def scenario(place):
        _, near, far = await place.connect()
        taken = near.try_send(bytes(100_000))
        near.close()
        assert len(await read_to_end(far)) == taken
        assert far.try_recv_into(bytearray(1)) == 0
        assert far.try_recv_into(bytearray(1)) == 0

    play_pipe(scenario)


def test_close_delivers_all_even_when_this_side_left_bytes_unread(play_pipe):
    """A kernel that is closed over unread bytes resets and forgets what it had not sent; a pipe must not."""

    async def scenario(place):
        _, near, far = await place.connect()
        far.try_send(bytes(50_000))
        await near.wait_readable()
        written = await fill(near)
        near.close()
        far.try_send(b"still talking")
        assert len(await read_to_end(far)) == written

    play_pipe(scenario)


def test_the_end_of_one_direction_leaves_the_other_until_the_peer_hears(play):
    async def scenario(place):
        _, near, far = await place.connect()
        near.close()
        assert await read_some(far) == b""
        # What is written now goes to a closed end: it may be taken, and soon the pipe is broken.
        with pytest.raises(PipeBroken):
            await write_for_ever(far)

    play(scenario)


def test_reset_breaks_the_other_end(play_pipe):
    async def scenario(place):
        _, near, far = await place.connect()
        near.reset()
        with trio.fail_after(5):
            await far.wait_readable()
        with pytest.raises(PipeBroken, match="reset"):
            far.try_recv_into(bytearray(1))
        with pytest.raises(PipeBroken):
            far.try_send(b"x")
        with pytest.raises(PipeBroken):
            far.try_recv_into(bytearray(1))

    play_pipe(scenario)


def test_reset_wakes_a_reader_and_a_writer_at_the_other_end(play_pipe):
    async def scenario(place):
        _, near, far = await place.connect()
        await fill(far)
        broken = []

        async def reader():
            await far.wait_readable()
            with pytest.raises(PipeBroken):
                far.try_recv_into(bytearray(1))
            broken.append("reader")

        async def writer():
            await far.wait_writable()
            with pytest.raises(PipeBroken):
                far.try_send(b"x")
            broken.append("writer")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(reader)
            nursery.start_soon(writer)
            await trio.testing.wait_all_tasks_blocked()
            near.reset()
        assert sorted(broken) == ["reader", "writer"]

    play_pipe(scenario)


@pytest.mark.parametrize("end", ["close", "reset"])
def test_ending_a_pipe_wakes_its_own_waiters(play_pipe, end):
    async def scenario(place):
        _, near, _ = await place.connect()
        await fill(near)
        woken = []

        async def waiter(wait, name):
            with pytest.raises(PipeBroken, match="on this side"):
                await wait()
            woken.append(name)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(waiter, near.wait_readable, "reader")
            nursery.start_soon(waiter, near.wait_writable, "writer")
            await trio.testing.wait_all_tasks_blocked()
            getattr(near, end)()
        assert sorted(woken) == ["reader", "writer"]

    play_pipe(scenario)


@pytest.mark.parametrize("end", ["close", "reset"])
def test_an_ended_pipe_raises_and_can_be_ended_again(play_pipe, end):
    async def scenario(place):
        _, near, _ = await place.connect()
        getattr(near, end)()
        near.close()
        near.reset()
        near.close()
        with pytest.raises(PipeBroken):
            near.try_send(b"x")
        with pytest.raises(PipeBroken):
            near.try_recv_into(bytearray(1))
        with pytest.raises(PipeBroken):
            await near.wait_readable()
        with pytest.raises(PipeBroken):
            await near.wait_writable()

    play_pipe(scenario)


def test_a_reader_is_woken_by_bytes_and_by_the_end(play_pipe):
    async def scenario(place):
        _, near, far = await place.connect()
        seen = []

        async def reader():
            while part := await read_some(far):
                seen.append(part)
                near.close() if len(seen) == 2 else near.try_send(b"two")
            seen.append("end")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(reader)
            await trio.testing.wait_all_tasks_blocked()
            near.try_send(b"one")
        assert seen == [b"one", b"two", "end"]

    play_pipe(scenario)


def test_two_waiters_for_one_direction_are_a_bug(play_pipe):
    async def scenario(place):
        _, near, _ = await place.connect()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(near.wait_readable)
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(trio.BusyResourceError):
                await near.wait_readable()
            nursery.cancel_scope.cancel()

    play_pipe(scenario)


def test_a_cancelled_wait_leaves_the_pipe_as_it_was(play_pipe):
    async def scenario(place):
        _, near, far = await place.connect()
        for _ in range(3):
            with trio.move_on_after(0.01) as scope:
                await far.wait_readable()
            assert scope.cancelled_caught
        near.try_send(b"hello")
        assert await read_some(far) == b"hello"

    play_pipe(scenario)
