"""What every `Mesh` must do: the light one of simnet, and the real host over both networks."""

from __future__ import annotations

import hashlib
import random

import pytest
import trio
import trio.testing

from mycel.protocol.errors import (
    ConnectionLost,
    DialError,
    LocalProtocolError,
    Refused,
    RemoteProtocolError,
    StreamClosed,
    StreamReset,
)
from mycel.protocol.mesh import Access, PathKind, PeerDown, PeerUp

ECHO = "/test/echo/1"
MIB = 1 << 20


async def echo(stream):
    while data := await stream.receive_some():
        await stream.send(data)
    await stream.send_eof()


async def until(holds):
    """Wait for what comes in its own time."""
    while True:
        if holds():
            return
        await trio.sleep(0.01)


async def connected(place):
    """a connected to b, both sides knowing it."""
    peer = await place.a.connect(place.b.listen_addrs)
    await until(lambda: place.a.peer_id in place.b.peers)
    return peer


async def stream_pair(place, protocol="/test/pair/1"):
    """Both ends of a fresh stream from a to b, with one byte across to make it known. Ends with the test."""
    ends, done = [], trio.Event()

    async def keep(stream):
        assert await stream.receive_exactly(1) == b"!"
        ends.append(stream)
        done.set()
        await trio.sleep_forever()

    place.b.serve_stream(protocol, keep)
    near = await place.a.open_stream(place.b.peer_id, protocol)
    await near.send(b"!")
    await done.wait()
    return near, ends[0]


def test_connecting_makes_both_sides_know_each_other(play_mesh):
    async def scenario(place):
        a, b = place.a, place.b
        async with a.events() as a_news, b.events() as b_news:
            assert await a.connect(b.listen_addrs) == b.peer_id
            assert await anext(a_news) == PeerUp(b.peer_id, Access.MEMBER)
            assert await anext(b_news) == PeerUp(a.peer_id, Access.MEMBER)
        there, here = a.peers[b.peer_id], b.peers[a.peer_id]
        assert (there.peer, here.peer) == (b.peer_id, a.peer_id)
        assert (there.inbound, here.inbound) == (False, True)
        assert (there.path, here.path) == (PathKind.DIRECT, PathKind.DIRECT)
        assert there.access == here.access == Access.MEMBER
        assert there.since <= trio.current_time()
        assert all(str(addr).endswith(f"/p2p/{b.peer_id}") for addr in b.listen_addrs)

    play_mesh(scenario)


def test_connecting_again_returns_at_once(play_mesh):
    async def scenario(place):
        await connected(place)
        before = place.a.peers[place.b.peer_id].since
        assert await place.a.connect(place.b.listen_addrs) == place.b.peer_id
        assert place.a.peers[place.b.peer_id].since == before
        assert len(place.a.peers) == len(place.b.peers) == 1

    play_mesh(scenario)


def test_dialling_each_other_at_once_leaves_both_connected(play_mesh):
    async def scenario(place):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(place.a.connect, place.b.listen_addrs)
            nursery.start_soon(place.b.connect, place.a.listen_addrs)
        assert list(place.a.peers) == [place.b.peer_id]
        assert list(place.b.peers) == [place.a.peer_id]
        place.b.serve_stream(ECHO, echo)
        stream = await place.a.open_stream(place.b.peer_id, ECHO)
        await stream.send(b"works")
        assert await stream.receive_exactly(5) == b"works"

    play_mesh(scenario)


def test_nobody_there_is_a_dial_error_that_names_the_address(play_mesh):
    async def scenario(place):
        with pytest.raises(DialError) as caught:
            await place.a.connect([place.nobody])
        assert str(place.nobody) in str(caught.value)

    play_mesh(scenario)


def test_somebody_else_there_is_refused(play_mesh):
    async def scenario(place):
        text = str(place.b.listen_addrs[0]).rsplit("/", 1)[0]
        with pytest.raises((DialError, Refused)):
            await place.a.connect([f"{text}/{place.c.peer_id}"])
        assert place.b.peer_id not in place.a.peers

    play_mesh(scenario)


def test_one_good_address_of_several_is_enough(play_mesh):
    async def scenario(place):
        addrs = [f"{str(place.nobody).rsplit('/', 1)[0]}/{place.b.peer_id}", *place.b.listen_addrs]
        assert await place.a.connect(addrs) == place.b.peer_id

    play_mesh(scenario)


def test_no_stream_to_a_peer_that_is_not_connected(play_mesh):
    async def scenario(place):
        with pytest.raises(ConnectionLost, match="not connected"):
            await place.a.open_stream(place.b.peer_id, ECHO)

    play_mesh(scenario)


def test_a_stream_carries_bytes_both_ways_and_ends(play_mesh):
    async def scenario(place):
        served = []

        async def handler(stream):
            served.append((stream.peer, stream.protocol))
            await echo(stream)

        await connected(place)
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


def test_large_transfers_both_ways_at_once_arrive_whole(play_mesh):
    async def scenario(place):
        await connected(place)
        near, far = await stream_pair(place)
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
        await connected(place)
        near, far = await stream_pair(place)
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
        await until(lambda: near.try_send(b"room again"))
        assert await far.receive_exactly(10) == b"room again"

    play_mesh(scenario)


def test_try_send_is_all_or_nothing(play_mesh):
    async def scenario(place):
        await connected(place)
        near, far = await stream_pair(place)
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
        await connected(place)
        near, far = await stream_pair(place)
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
        await connected(place)
        near, far = await stream_pair(place)
        await near.send(b"abc")
        await near.send_eof()
        with pytest.raises(RemoteProtocolError):
            await far.receive_exactly(10)

    play_mesh(scenario)


def test_a_reset_is_seen_by_readers_and_writers_at_both_ends(play_mesh):
    async def scenario(place):
        await connected(place)
        near, far = await stream_pair(place)
        other_near, other_far = await stream_pair(place, "/test/other/1")
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


def test_a_protocol_that_nobody_serves(play_mesh):
    async def scenario(place):
        await connected(place)
        stream = await place.a.open_stream(place.b.peer_id, "/test/nothing/1")
        with pytest.raises((StreamReset, Refused)):
            await stream.receive_some()

    play_mesh(scenario)


def test_a_protocol_has_one_handler(play_mesh):
    async def scenario(place):
        place.a.serve_stream(ECHO, echo)
        with pytest.raises(LocalProtocolError, match="served already"):
            place.a.serve_stream(ECHO, echo)

    play_mesh(scenario)


def test_strangers_get_what_strangers_may_have(play_mesh):
    async def scenario(place):
        called = []

        async def handler(stream):
            called.append(stream.protocol)
            await echo(stream)

        place.strict.serve_stream("/test/members/1", handler)
        place.strict.serve_stream("/test/open/1", handler, access=Access.STRANGER)
        await place.a.connect(place.strict.listen_addrs)
        closed = await place.a.open_stream(place.strict.peer_id, "/test/members/1")
        with pytest.raises((StreamReset, Refused)):
            await closed.receive_some()
        public = await place.a.open_stream(place.strict.peer_id, "/test/open/1")
        await public.send(b"hello")
        assert await public.receive_exactly(5) == b"hello"
        assert called == ["/test/open/1"]
        assert place.strict.peers[place.a.peer_id].access == Access.STRANGER

    play_mesh(scenario)


def test_what_a_handler_raises_ends_its_own_stream_only(play_mesh):
    async def scenario(place):
        async def broken(stream):
            await stream.receive_exactly(1)
            raise ValueError("a bug in a handler")

        await connected(place)
        near, far = await stream_pair(place)
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

        await connected(place)
        place.b.serve_stream("/test/answer/1", answer)
        stream = await place.a.open_stream(place.b.peer_id, "/test/answer/1")
        await stream.send(b"?")
        assert await stream.receive_exactly(13) == b"said and done"
        assert await stream.receive_some() == b""

    play_mesh(scenario)


def test_delivered_bytes_come_in_order_with_their_end(play_mesh):
    async def scenario(place):
        await connected(place)
        near, far = await stream_pair(place)
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
        await connected(place)
        near, far = await stream_pair(place)
        far.deliver_to(lambda data, error: far.try_send(bytes(data)) if data is not None else None)
        for number in range(20):
            await near.send(b"%03d" % number)
            assert await near.receive_exactly(3) == b"%03d" % number

    play_mesh(scenario)


def test_a_receiver_hears_of_loss(play_mesh):
    async def scenario(place):
        await connected(place)
        near, far = await stream_pair(place)
        heard = []
        far.deliver_to(lambda data, error: heard.append((data, error)))
        near.reset()
        await until(lambda: heard)
        assert heard[0][0] is None
        assert isinstance(heard[0][1], StreamReset)

    play_mesh(scenario)


def test_what_a_receiver_raises_ends_its_own_stream_only(play_mesh):
    async def scenario(place):
        def receiver(data, error):
            if data is not None:
                raise ValueError("a bug in a receiver")

        await connected(place)
        near, far = await stream_pair(place)
        other_near, other_far = await stream_pair(place, "/test/other/1")
        far.deliver_to(receiver)
        await near.send(b"x")
        with pytest.raises(StreamReset):
            await near.receive_some()
        await other_near.send(b"unhurt")
        assert await other_far.receive_exactly(6) == b"unhurt"

    play_mesh(scenario)


def test_withheld_credit_stops_the_writer_until_it_is_given(play_mesh):
    async def scenario(place):
        await connected(place)
        near, far = await stream_pair(place)
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
        await connected(place)
        near, far = await stream_pair(place)
        stuck, _ = await stream_pair(place, "/test/stuck/1")
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
        await connected(place)
        near, far = await stream_pair(place)
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
        await connected(place)
        place.b.serve_stream(ECHO, echo)
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


def test_disconnecting_ends_streams_and_is_news_at_both_sides(play_mesh):
    async def scenario(place):
        a, b = place.a, place.b
        await connected(place)
        near, far = await stream_pair(place)
        async with a.events() as a_news, b.events() as b_news:
            a.disconnect(b.peer_id, "had enough")
            at_a, at_b = await anext(a_news), await anext(b_news)
        assert isinstance(at_a, PeerDown)
        assert isinstance(at_b, PeerDown)
        assert (at_a.peer, at_b.peer) == (b.peer_id, a.peer_id)
        assert at_a.reason == at_b.reason == "closed"
        assert "had enough" in at_a.text
        assert not a.peers
        assert not b.peers
        for stream in (near, far):
            with pytest.raises(ConnectionLost):
                await stream.receive_some()
            with pytest.raises(ConnectionLost):
                await stream.send(b"x")
        with pytest.raises(ConnectionLost):
            await a.open_stream(b.peer_id, ECHO)
        await a.connect(b.listen_addrs)

    play_mesh(scenario)


def test_a_node_that_dies_is_missed_soon(play_mesh):
    async def scenario(place):
        await connected(place)
        async with place.a.events() as news:
            before = trio.current_time()
            place.kill_b()
            down = await anext(news)
            assert isinstance(down, PeerDown)
            assert down.reason in ("reset", "closed")
            assert trio.current_time() - before < 0.5

    play_mesh(scenario)


def test_a_node_that_falls_silent_is_missed_within_three_seconds(play_mesh):
    async def scenario(place):
        if place.silence_b is None:
            pytest.skip("loopback cannot be made silent")
        await connected(place)
        near, _ = await stream_pair(place)
        async with place.a.events() as news:
            await trio.sleep(5)
            before = trio.current_time()
            place.silence_b()
            with pytest.raises(ConnectionLost) as caught:
                await near.receive_some()
            assert caught.value.reason == "silent"
            down = await anext(news)
            assert isinstance(down, PeerDown)
            assert down.reason == "silent"
            assert trio.current_time() - before < 3.0

    play_mesh(scenario)


def test_signatures_are_by_their_author_over_their_data(play_mesh):
    async def scenario(place):
        await connected(place)
        await place.a.connect(place.c.listen_addrs)
        signature = place.b.sign(b"statement")
        assert len(signature) == 64
        assert place.a.verify(place.b.peer_id, b"statement", signature)
        assert place.b.verify(place.b.peer_id, b"statement", signature)
        assert not place.a.verify(place.b.peer_id, b"another", signature)
        assert not place.a.verify(place.c.peer_id, b"statement", signature)
        assert not place.a.verify(place.b.peer_id, b"statement", bytes(64))

    play_mesh(scenario)


def test_round_trips_are_measured(play_mesh):
    async def scenario(place):
        assert place.a.rtt(place.b.peer_id) is None
        await connected(place)
        await until(lambda: place.a.rtt(place.b.peer_id) is not None)
        assert 0 < place.a.rtt(place.b.peer_id) < 2.0

    play_mesh(scenario)


def test_calendar_and_randomness(play_mesh):
    async def scenario(place):
        assert place.a.wall() > 1_700_000_000
        draws = {bytes(place.a.entropy(16)) for _ in range(10)} | {bytes(place.b.entropy(16))}
        assert len(draws) == 11

    play_mesh(scenario)
