"""What every `Mesh` must do: the light one of simnet, and the real host over both networks."""

from __future__ import annotations

import pytest
import trio

from mycel.protocol.errors import ConnectionLost, DialError, LocalProtocolError, Refused, StreamReset
from mycel.protocol.mesh import Access, PathKind, PeerDown, PeerUp

ECHO = "/test/echo/1"


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
        await place.connect()
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
        place.b.serve_stream(ECHO, place.echo)
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


def test_a_protocol_that_nobody_serves(play_mesh):
    async def scenario(place):
        await place.connect()
        stream = await place.a.open_stream(place.b.peer_id, "/test/nothing/1")
        with pytest.raises((StreamReset, Refused)):
            await stream.receive_some()

    play_mesh(scenario)


def test_a_protocol_has_one_handler(play_mesh):
    async def scenario(place):
        place.a.serve_stream(ECHO, place.echo)
        with pytest.raises(LocalProtocolError, match="served already"):
            place.a.serve_stream(ECHO, place.echo)

    play_mesh(scenario)


def test_what_a_node_begins_and_ceases_to_serve_is_told(play_mesh):
    async def scenario(place):
        await place.connect()
        place.b.serve_stream(ECHO, place.echo)
        await place.until(lambda: ECHO in place.a.peers[place.b.peer_id].protocols)
        place.b.stop_serving(ECHO)
        await place.until(lambda: ECHO not in place.a.peers[place.b.peer_id].protocols)
        place.b.stop_serving(ECHO)
        with pytest.raises((Refused, StreamReset)):
            stream = await place.a.open_stream(place.b.peer_id, ECHO)
            await stream.send(b"hello?")
            await stream.receive_some()
        place.b.serve_stream(ECHO, place.echo)

    play_mesh(scenario)


def test_strangers_get_what_strangers_may_have(play_mesh):
    async def scenario(place):
        called = []

        async def handler(stream):
            called.append(stream.protocol)
            await place.echo(stream)

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


def test_disconnecting_ends_streams_and_is_news_at_both_sides(play_mesh):
    async def scenario(place):
        a, b = place.a, place.b
        await place.connect()
        near, far = await place.streams()
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
        await place.connect()
        async with place.a.events() as news:
            before = trio.current_time()
            place.kill_b()
            down = await anext(news)
            assert isinstance(down, PeerDown)
            assert down.reason in ("reset", "closed", "left")
            assert trio.current_time() - before < 0.5

    play_mesh(scenario)


def test_a_node_that_falls_silent_is_missed_within_three_seconds(play_mesh):
    async def scenario(place):
        if place.silence_b is None:
            pytest.skip("loopback cannot be made silent")
        await place.connect()
        near, _ = await place.streams()
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
        await place.connect()
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
        await place.connect()
        await place.until(lambda: place.a.rtt(place.b.peer_id) is not None)
        assert 0 < place.a.rtt(place.b.peer_id) < 2.0

    play_mesh(scenario)


def test_calendar_and_randomness(play_mesh):
    async def scenario(place):
        assert place.a.wall() > 1_700_000_000
        draws = {bytes(place.a.entropy(16)) for _ in range(10)} | {bytes(place.b.entropy(16))}
        assert len(draws) == 11

    play_mesh(scenario)
