"""Streams of a host: negotiation, flow control, cancellation, ends."""

from __future__ import annotations

import pytest
import trio

from mycel.protocol.errors import (
    ConnectionLost,
    LocalProtocolError,
    Refused,
    RemoteProtocolError,
    StreamClosed,
    StreamReset,
)
from mycel.protocol.limits import Limits
from mycel.protocol.mesh import Access


async def echo(stream):
    while data := await stream.receive_some():
        await stream.send(data)


async def count(stream):
    total = 0
    while data := await stream.receive_some():
        total += len(data)
    await stream.send(str(total).encode(), end=True)


def test_a_stream_carries_bytes_both_ways_and_ends_in_order(play):
    async def scenario(world):
        a, b, peer = await world.pair()
        b.serve_stream("/count", count)
        stream = await a.open_stream(peer, "/count")
        await stream.send(b"x" * 1_000_000)
        await stream.send(b"y" * 23)
        await stream.send_eof()
        assert await stream.receive_some() == b"1000023"
        assert await stream.receive_some() == b""
        with pytest.raises(StreamClosed):
            await stream.send(b"more")

    play(scenario)


def test_a_fresh_stream_costs_one_round_trip(play):
    async def scenario(world):
        a, b, peer = await world.pair()
        b.serve_stream("/echo", echo)
        began = trio.current_time()
        stream = await a.open_stream(peer, "/echo")
        await stream.send(b"hi")
        assert await stream.receive_exactly(2) == b"hi"
        assert trio.current_time() - began < 0.0201 + 0.0005  # 20 ms round trip

    play(scenario)


def test_a_connection_costs_two_round_trips_after_tcp_and_one_for_the_peer_to_know(play):
    async def scenario(world):
        a, b = await world.host("a"), await world.host("b")
        began = trio.current_time()
        await a.connect(b.listen_addrs)
        assert trio.current_time() - began < 0.041  # TCP 20 ms, negotiation with Noise 20 ms

    play(scenario)


def test_a_protocol_that_is_not_served_is_refused_by_name(play):
    async def scenario(world):
        a, _, peer = await world.pair()
        stream = await a.open_stream(peer, "/nobody")
        await stream.send(b"hello")
        with pytest.raises(Refused, match="/nobody"):
            await stream.receive_some()
        await trio.sleep(1)
        assert a.streams == 0

    play(scenario)


def test_a_stream_that_only_receives_is_opened_by_its_first_receive(play):
    async def scenario(world):
        a, b, peer = await world.pair()

        async def greet(stream):
            await stream.send(b"welcome", end=True)

        b.serve_stream("/greet", greet)
        stream = await a.open_stream(peer, "/greet")
        assert await stream.receive_exactly(7) == b"welcome"

    play(scenario)


def test_a_handlers_exception_ends_its_own_stream_only(play):
    async def scenario(world):
        a, b, peer = await world.pair()

        async def fail(stream):
            await stream.receive_some()
            raise KeyError("a bug")

        b.serve_stream("/fail", fail)
        b.serve_stream("/echo", echo)
        healthy = await a.open_stream(peer, "/echo")
        await healthy.send(b"1")
        assert await healthy.receive_exactly(1) == b"1"
        broken = await a.open_stream(peer, "/fail")
        await broken.send(b"x")
        with pytest.raises(StreamReset):
            await broken.receive_some()
        await healthy.send(b"2")
        assert await healthy.receive_exactly(1) == b"2"
        assert b.counters.handler_errors == {"/fail": 1}
        assert peer in a.peers

    play(scenario)


def test_a_receivers_exception_ends_its_own_stream_only(play):
    async def scenario(world):
        a, b, peer = await world.pair()

        async def fail(stream):
            stream.deliver_to(lambda data, error: 1 / 0)
            await trio.sleep_forever()

        b.serve_stream("/fail", fail)
        b.serve_stream("/echo", echo)
        broken = await a.open_stream(peer, "/fail")
        await broken.send(b"x")
        with pytest.raises(StreamReset):
            await broken.receive_some()
        healthy = await a.open_stream(peer, "/echo")
        await healthy.send(b"2")
        assert await healthy.receive_exactly(1) == b"2"
        assert b.counters.handler_errors["/fail"] >= 1

    play(scenario)


def test_a_cancelled_send_hurts_no_other_stream(play):
    async def scenario(world):
        a, b, peer = await world.pair()
        b.serve_stream("/echo", echo)

        async def stall(stream):
            await trio.sleep_forever()

        b.serve_stream("/stall", stall)
        others = [await a.open_stream(peer, "/echo") for _ in range(3)]
        for other in others:
            await other.send(b"before")
            assert await other.receive_exactly(6) == b"before"
        blocked = await a.open_stream(peer, "/stall")
        with trio.move_on_after(1) as patience:
            await blocked.send(bytes(50 << 20))
        assert patience.cancelled_caught
        for other in others:
            await other.send(b"after" * 50_000)
            assert await other.receive_exactly(250_000) == b"after" * 50_000
        blocked.reset()
        assert peer in a.peers

    play(scenario)


def test_a_cancelled_send_leaves_a_prefix_and_no_clean_end(play):
    async def scenario(world):
        a, b, peer = await world.pair()
        got = trio.Event()
        seen = bytearray()

        async def slow(stream):
            await trio.sleep(1)
            try:
                while data := await stream.receive_some():
                    seen.extend(data)
                seen.extend(b"clean end")
            finally:
                got.set()

        b.serve_stream("/slow", slow)
        stream = await a.open_stream(peer, "/slow")
        data = bytes(range(256)) * 8192
        with trio.move_on_after(0.5):
            await stream.send(data, end=True)
        await trio.sleep(1)
        stream.reset()
        await got.wait()
        assert len(seen) < len(data)
        assert data.startswith(bytes(seen))

    play(scenario)


def test_a_reader_that_pauses_stops_the_writer_and_nothing_is_lost(play):
    async def scenario(world):
        a, b, peer = await world.pair()
        sizes = []

        async def pause(stream):
            await trio.sleep(8)
            while data := await stream.receive_some():
                sizes.append(len(data))
            await stream.send(b"done", end=True)

        b.serve_stream("/pause", pause)
        stream = await a.open_stream(peer, "/pause")
        sent_after = None

        async def write():
            nonlocal sent_after
            await stream.send(bytes(4 << 20), end=True)
            sent_after = trio.current_time()

        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(write)
            await trio.sleep(4)
            assert sent_after is None
        assert sent_after is not None
        assert sent_after - began > 7.9
        assert await stream.receive_exactly(4) == b"done"
        assert sum(sizes) == 4 << 20

    play(scenario)


def test_two_tasks_on_one_side_of_a_stream_are_a_bug_that_shows(play):
    async def scenario(world):
        a, b, peer = await world.pair()

        async def hold(stream):
            await trio.sleep_forever()

        b.serve_stream("/hold", hold)
        stream = await a.open_stream(peer, "/hold")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.receive_some)
            nursery.start_soon(stream.send, bytes(1 << 20))
            await trio.sleep(0.1)
            with pytest.raises(trio.BusyResourceError):
                await stream.receive_some()
            with pytest.raises(trio.BusyResourceError):
                await stream.send(b"x")
            with pytest.raises(trio.BusyResourceError):
                stream.try_send(b"x")
            nursery.cancel_scope.cancel()

    play(scenario)


def test_try_send_says_when_the_window_has_no_room(play):
    async def scenario(world):
        a, b, peer = await world.pair()

        async def hold(stream):
            await trio.sleep_forever()

        b.serve_stream("/hold", hold)
        stream = await a.open_stream(peer, "/hold")
        assert stream.try_send(b"x" * 200_000)
        assert not stream.try_send(b"x" * 100_000)
        assert stream.try_send(b"x" * 1000)

    play(scenario)


def test_delivery_in_the_reader_answers_without_a_task_and_credit_can_be_withheld(play):
    async def scenario(world):
        a, b, peer = await world.pair()

        async def inline(stream):
            done = trio.Event()

            def take(data, error):
                if data is None:
                    done.set()
                else:
                    assert stream.try_send(bytes(data).upper())

            stream.deliver_to(take)
            await done.wait()

        held = []
        holding = trio.Event()

        async def hoard(stream):
            stream.deliver_to(lambda data, error: held.append(len(data)) if data else None, credit=False)
            await holding.wait()
            stream.credit(sum(held))
            await trio.sleep_forever()

        b.serve_stream("/inline", inline)
        b.serve_stream("/hoard", hoard)
        stream = await a.open_stream(peer, "/inline")
        await stream.send(b"abc")
        assert await stream.receive_exactly(3) == b"ABC"
        hoarded = await a.open_stream(peer, "/hoard")
        with trio.move_on_after(5) as patience:
            await hoarded.send(bytes(1 << 20))
        assert patience.cancelled_caught
        assert sum(held) <= 256 * 1024
        holding.set()
        await trio.sleep(1)
        hoarded.reset()

    play(scenario)


def test_half_closed_streams_do_not_leak(play):
    async def scenario(world):
        a, b, peer = await world.pair()

        async def leave(stream):
            await stream.receive_some()  # and never looks at the rest, nor waits for the end

        b.serve_stream("/leave", leave)
        streams = []
        for _ in range(50):
            stream = await a.open_stream(peer, "/leave")
            await stream.send(b"x")
            streams.append(stream)  # never closed here
        await trio.sleep(1)
        assert b.streams >= 50
        await trio.sleep(15)
        assert b.streams == 0
        assert a.streams == 0

    play(scenario)


def test_data_for_a_stream_that_was_closed_is_answered_with_a_reset(play):
    async def scenario(world):
        a, b, peer = await world.pair()

        async def leave(stream):
            await stream.receive_some()

        b.serve_stream("/leave", leave)
        stream = await a.open_stream(peer, "/leave")
        with pytest.raises(StreamReset):
            for _ in range(100):
                await stream.send(bytes(100_000))
                await trio.sleep(0.05)
        assert peer in a.peers

    play(scenario)


def test_what_came_before_a_peers_end_can_be_read_after_its_connection_is_gone(play):
    async def scenario(world):
        a, b, peer = await world.pair()

        async def answer(stream):
            await stream.send(b"the answer", end=True)

        b.serve_stream("/answer", answer)
        stream = await a.open_stream(peer, "/answer")
        await stream.send(b"?")
        await trio.sleep(1)
        b.disconnect(a.peer_id, "over")
        await trio.sleep(1)
        assert peer not in a.peers
        assert await stream.receive_exactly(10) == b"the answer"
        assert await stream.receive_some() == b""

    play(scenario)


def test_a_lost_connection_ends_every_stream_with_its_reason(play):
    async def scenario(world):
        a, b, peer = await world.pair()
        b.serve_stream("/echo", echo)
        stream = await a.open_stream(peer, "/echo")
        await stream.send(b"x")
        await stream.receive_exactly(1)
        world.machine("b").crash()
        with pytest.raises(ConnectionLost) as caught:
            await stream.receive_some()
        assert caught.value.reason == "reset"
        with pytest.raises(ConnectionLost):
            await stream.send(b"x")
        with pytest.raises(ConnectionLost):
            await a.open_stream(peer, "/echo")

    play(scenario)


def test_receive_exactly_says_how_much_was_missing(play):
    async def scenario(world):
        a, b, peer = await world.pair()

        async def short(stream):
            await stream.send(b"abc", end=True)

        b.serve_stream("/short", short)
        stream = await a.open_stream(peer, "/short")
        with pytest.raises(RemoteProtocolError, match="3 of 10"):
            await stream.receive_exactly(10)

    play(scenario)


def test_a_thousand_open_streams_work_and_open_waits_beyond_the_bound(play):
    async def scenario(world):
        a, b, peer = await world.pair(limits=Limits(streams=1000))
        b.serve_stream("/echo", echo)
        streams = []
        for number in range(1000):
            stream = await a.open_stream(peer, "/echo")
            await stream.send(number.to_bytes(4, "big"))
            streams.append(stream)
        for number, stream in enumerate(streams):
            assert await stream.receive_exactly(4) == number.to_bytes(4, "big")
        with trio.move_on_after(2) as patience:
            await a.open_stream(peer, "/echo")
        assert patience.cancelled_caught
        await streams[0].send_eof()
        with trio.fail_after(2):
            late = await a.open_stream(peer, "/echo")
            await late.send(b"late")
            assert await late.receive_exactly(4) == b"late"
        for stream in [*streams, late]:
            await stream.aclose()
        await trio.sleep(1)
        assert a.streams == b.streams == 0

    play(scenario)


def test_a_peer_that_opens_more_streams_than_allowed_gets_resets(play):
    async def scenario(world):
        a = await world.host("a")
        b = await world.host("b", limits=Limits(streams=10))
        peer = await a.connect(b.listen_addrs)

        async def hold(stream):
            await trio.sleep_forever()

        b.serve_stream("/hold", hold)
        await trio.sleep(1)
        refused = 0
        for _ in range(20):
            stream = await a.open_stream(peer, "/hold")
            await stream.send(b"x")
            await trio.sleep(0.1)
            try:
                with trio.move_on_after(0.1):
                    await stream.receive_some()
            except StreamReset:
                refused += 1
        assert refused == 10
        assert peer in a.peers

    play(scenario)


def test_a_protocol_has_one_handler(play):
    async def scenario(world):
        a = await world.host("a")
        a.serve_stream("/echo", echo)
        with pytest.raises(LocalProtocolError, match="/echo"):
            a.serve_stream("/echo", echo)

    play(scenario)


def test_streams_above_the_peers_role_are_reset(play):
    async def scenario(world):
        a, b, peer = await world.pair(default_access=Access.SUBMIT)
        for role in Access:
            b.serve_stream(f"/{role.name}", echo, access=role)
        for role in (Access.STRANGER, Access.SUBMIT):
            stream = await a.open_stream(peer, f"/{role.name}")
            await stream.send(b"x")
            assert await stream.receive_exactly(1) == b"x"
        for role in (Access.MEMBER, Access.ADMIN):
            stream = await a.open_stream(peer, f"/{role.name}")
            await stream.send(b"x")
            with pytest.raises(StreamReset):
                await stream.receive_some()
        assert b.counters.refused["access"] == 2

    play(scenario)
