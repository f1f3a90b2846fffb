"""Questions on their way: peers that answer by halves, too much, or not at all, and lines that go."""

from __future__ import annotations

import pytest
import trio

from mycel.dht.kad.ask import contact_of
from mycel.dht.kad.message import KAD_PROTOCOL, Kind, Message, write
from mycel.dht.kad.service import Kademlia
from mycel.protocol.errors import LocalProtocolError, StreamReset
from mycel.protocol.limits import KadLimits
from mycel.simnet import clock
from mycel.simnet.mesh import MeshOptions, mesh_world

PING = Message(Kind.PING)
LIMITS = KadLimits(tick_s=1000.0)


@pytest.fixture
def ask():
    """`ask(serve)`: what comes of a ping to a peer whose streams `serve(stream, mesh)` handles, and when."""

    def run(serve):
        async def main():
            async with mesh_world(MeshOptions()) as world, trio.open_nursery() as nursery:
                asker, peer = world.add("asker"), world.add("peer")
                peer.serve_stream(KAD_PROTOCOL, lambda stream: serve(stream, peer))
                kad = Kademlia(asker, limits=LIMITS)
                await nursery.start(kad.run)
                await asker.connect(peer.listen_addrs)
                began = trio.current_time()
                answer = await kad.asker.ask(contact_of(asker.peers[peer.peer_id]), PING)
                took = trio.current_time() - began
                await trio.sleep(30)
                nursery.cancel_scope.cancel()
            return answer, took, kad.asker

        return clock.run(main, 0)

    return run


def test_an_answer_in_pieces_is_put_together(ask):
    async def serve(stream, mesh):
        raw = write(Message(Kind.PING, bytes(100)))
        for place in range(len(raw)):
            await stream.send(raw[place : place + 1])
            await trio.sleep(0.001)

    answer, _, asker = ask(serve)
    assert answer == Message(Kind.PING, bytes(100))
    assert asker.bytes == len(write(PING)) + len(write(answer))


@pytest.mark.parametrize("says", [b"", write(PING), write(PING) * 2])
def test_a_stream_that_never_ends_is_reset_in_time(ask, says):
    resets = []

    async def serve(stream, mesh):
        try:
            await stream.send(says)
            while True:
                await stream.send(b"")
                await trio.sleep(0.1)
        except StreamReset:
            resets.append(trio.current_time())
            raise

    answer, took, asker = ask(serve)
    assert answer == (PING if says else None)
    assert took < LIMITS.answer_s_max
    assert len(resets) == 1
    assert asker.unanswered == (not says)


@pytest.mark.parametrize("says", [write(Message(Kind.FIND_NODE)), b"\x03abc", b"\xff" * 10])
def test_what_is_no_answer_is_none(ask, says):
    async def serve(stream, mesh):
        await stream.send(says)

    answer, took, asker = ask(serve)
    assert answer is None
    assert took < 1
    assert asker.unanswered == 1


def test_who_hung_up_meanwhile_is_dialled_and_asked_once_more(ask):
    asked = []

    async def serve(stream, mesh):
        asked.append(stream.peer)
        if len(asked) == 1:
            mesh.disconnect(stream.peer, "unused")
        else:
            await stream.send(write(PING), end=True)

    answer, _, asker = ask(serve)
    assert answer == PING
    assert len(asked) == 2
    assert (asker.asked, asker.unanswered) == (1, 0)


async def test_without_a_running_service_nothing_is_asked(contact, autojump_clock):
    async with mesh_world(MeshOptions()) as world:
        kad = Kademlia(world.add())
        with pytest.raises(LocalProtocolError, match="is not running"):
            await kad.asker.ask(contact(1), PING)
        assert kad.asker.asked == 0
