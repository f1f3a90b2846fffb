"""Membership and the gate: who may use what before and after it is settled."""

from __future__ import annotations

import pytest
import trio

from mycel.protocol.errors import ConnectionLost, DialError, Refused, StreamReset
from mycel.protocol.limits import Limits
from mycel.protocol.mesh import Access, PeerUp


class Exchange:
    """A membership of one message each way, slow and strict as told."""

    protocol = "/mycel/member/1"

    def __init__(self, *, seconds: float = 0.0, verdict: Access | Refused = Access.MEMBER) -> None:
        self.seconds = seconds
        self.verdict = verdict
        self.exchanges = 0

    async def prove(self, stream):
        await stream.send(b"p")
        answer = await stream.receive_exactly(1)
        await stream.aclose()
        if answer == b"n":
            raise Refused("the other side said no", reason="expired")
        return self._judge()

    async def answer(self, stream):
        await stream.receive_exactly(1)
        await trio.sleep(self.seconds)
        await stream.send(b"y" if isinstance(self.verdict, Access) else b"n", end=True)
        return self._judge()

    def _judge(self):
        self.exchanges += 1
        if isinstance(self.verdict, Refused):
            raise self.verdict
        return self.verdict


async def echo(stream):
    while data := await stream.receive_some():
        await stream.send(data)


def test_a_peer_is_up_once_its_membership_is_settled(play):
    async def scenario(world):
        a = await world.host("a", membership=Exchange(verdict=Access.ADMIN))
        b = await world.host("b", membership=Exchange(seconds=1.0, verdict=Access.SUBMIT))
        events = []
        world.nursery.start_soon(world.collect, b, events)
        peer = None

        async def connect():
            nonlocal peer
            peer = await a.connect(b.listen_addrs)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(connect)
            await trio.sleep(0.5)
            assert not a.peers
            assert not b.peers
        assert peer == b.peer_id
        await trio.sleep(0.1)
        assert a.peers[peer].access == Access.ADMIN
        assert b.peers[a.peer_id].access == Access.SUBMIT
        assert events == [PeerUp(a.peer_id, Access.SUBMIT)]

    play(scenario)


def test_streams_that_come_before_the_membership_wait_for_it(play):
    async def scenario(world):
        a = await world.host("a")  # asks for nothing: every peer is a member to it

        async def silent(stream):
            await trio.sleep_forever()

        a.serve_stream("/mycel/member/1", silent)  # so that it does not look foreign
        b = await world.host("b", membership=Exchange(seconds=1.0))
        b.serve_stream("/echo", echo)
        b.serve_stream("/open", echo, access=Access.STRANGER)
        peer = await a.connect(b.listen_addrs)
        free = await a.open_stream(peer, "/open")
        await free.send(b"x")
        assert await free.receive_exactly(1) == b"x"
        early = await a.open_stream(peer, "/echo")
        await early.send(b"early" * 1000)
        proof = await a.open_stream(peer, "/mycel/member/1")
        began = trio.current_time()
        await proof.send(b"p")
        assert await early.receive_exactly(5000) == b"early" * 1000
        assert 0.9 < trio.current_time() - began < 1.2

    play(scenario)


def test_a_peer_that_proves_nothing_becomes_a_stranger_after_the_deadline(play):
    async def scenario(world):
        a = await world.host("a")
        b = await world.host("b", membership=Exchange(), limits=Limits(membership_s=3.0))
        b.serve_stream("/echo", echo)

        async def silent(stream):
            await trio.sleep_forever()

        a.serve_stream("/mycel/member/1", silent)  # so that it does not look foreign
        peer = await a.connect(b.listen_addrs)
        early = await a.open_stream(peer, "/echo")
        began = trio.current_time()
        await early.send(b"x")
        with pytest.raises(StreamReset):
            await early.receive_some()
        assert 2.5 < trio.current_time() - began < 3.5
        assert b.peers[a.peer_id].access == Access.STRANGER
        assert b.counters.refused["access"] == 1

    play(scenario)


def test_a_foreign_peer_is_a_stranger_at_once_in_both_directions(play):
    async def scenario(world):
        foreign = await world.host("foreign")
        b = await world.host("b", membership=Exchange())
        began = trio.current_time()
        await foreign.connect(b.listen_addrs)
        await world.up(b, foreign.peer_id)
        assert trio.current_time() - began < 0.2
        assert b.peers[foreign.peer_id].access == Access.STRANGER
        b.disconnect(foreign.peer_id, "again, the other way")
        await trio.sleep(1)
        await b.connect(foreign.listen_addrs)
        assert b.peers[foreign.peer_id].access == Access.STRANGER
        assert await b.ping(foreign.peer_id) < 0.1

    play(scenario)


@pytest.mark.parametrize("refuser", ["dialer", "listener"])
def test_a_refused_peer_is_disconnected_and_both_sides_know_why(play, refuser):
    async def scenario(world):
        no = Refused("its chain ended yesterday", reason="expired")
        a = await world.host("a", membership=Exchange(verdict=no if refuser == "dialer" else Access.MEMBER))
        b = await world.host("b", membership=Exchange(verdict=no if refuser == "listener" else Access.MEMBER))
        with pytest.raises(Refused):
            await a.connect(b.listen_addrs)
        await trio.sleep(1)
        assert a.connections == b.connections == 0
        assert not a.peers
        assert not b.peers
        assert a.counters.lost == b.counters.lost == {"refused": 1}

    play(scenario)


def test_a_membership_that_never_answers_ends_with_the_deadline(play):
    async def scenario(world):
        a = await world.host("a", membership=Exchange())
        b = await world.host("b", membership=Exchange(seconds=100))
        began = trio.current_time()
        with pytest.raises((DialError, Refused), match="5 s"):
            await a.connect(b.listen_addrs, timeout=30)
        assert 4.9 < trio.current_time() - began < 5.5
        await trio.sleep(10)
        assert a.connections == b.connections == 0

    play(scenario)


def test_membership_is_settled_once_for_simultaneous_dials(play):
    async def scenario(world):
        a = await world.host("a", membership=Exchange(seconds=0.05))
        b = await world.host("b", membership=Exchange(seconds=0.05))
        b.serve_stream("/echo", echo)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(a.connect, b.listen_addrs)
            nursery.start_soon(b.connect, a.listen_addrs)
        stream = await a.open_stream(b.peer_id, "/echo")
        await stream.send(b"x", end=True)
        assert await stream.receive_exactly(1) == b"x"
        await trio.sleep(5)
        assert a.connections == b.connections == 1
        assert list(a.peers) == [b.peer_id]
        assert list(b.peers) == [a.peer_id]

    play(scenario)


def test_streams_that_wait_end_with_their_connection(play):
    async def scenario(world):
        a = await world.host("a")
        b = await world.host("b", membership=Exchange())

        async def silent(stream):
            await trio.sleep_forever()

        a.serve_stream("/mycel/member/1", silent)
        b.serve_stream("/echo", echo)
        peer = await a.connect(b.listen_addrs)
        stream = await a.open_stream(peer, "/echo")
        await stream.send(b"x")
        await trio.sleep(1)
        world.machine("b").crash()
        with pytest.raises(ConnectionLost):
            await stream.receive_some()
        assert b.connections == 0

    play(scenario)
