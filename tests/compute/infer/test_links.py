"""Frames between peers: order, backpressure, losses, and peers that talk nonsense."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import trio

from mycel.compute.infer.frame import encode_frame
from mycel.compute.infer.links import Links
from mycel.compute.infer.messages import STAGE_PROTOCOL, CreditFrame, Frame, StepFrame
from mycel.protocol.errors import RemoteProtocolError
from mycel.protocol.mesh import PeerId
from mycel.protocol.tensor import Tensor
from mycel.simnet.mesh import MeshOptions, MeshWorld, mesh_world


class Recorder:
    """A receiver that keeps what it gets."""

    def __init__(self) -> None:
        self.frames: list[tuple[PeerId, Frame]] = []
        self.losses: list[tuple[PeerId, str]] = []
        self.ready: list[PeerId] = []
        self.congested = False

    def on_frame(self, peer: PeerId, frame: Frame) -> None:
        self.frames.append((peer, frame))

    def on_link_ready(self, peer: PeerId) -> None:
        self.ready.append(peer)

    def on_link_lost(self, peer: PeerId, kind: str, text: str) -> None:
        self.losses.append((peer, kind))

    @property
    def numbers(self) -> list[int]:
        return [frame.credit for _, frame in self.frames if isinstance(frame, CreditFrame)]


@asynccontextmanager
async def pair(
    window: int = 1 << 20,
) -> AsyncIterator[tuple[MeshWorld, tuple[Any, Links, Recorder], tuple[Any, Links, Recorder]]]:
    options = MeshOptions(latency_s_min=0.01, latency_s_max=0.01, window_bytes=window)
    async with mesh_world(options) as world, trio.open_nursery() as nursery:
        sides = []
        for name in "ab":
            mesh = world.add(name)
            links, recorder = Links(mesh), Recorder()
            links.attach(recorder)
            await nursery.start(links.run)
            sides.append((mesh, links, recorder))
        await sides[0][0].connect(sides[1][0].listen_addrs)
        yield world, sides[0], sides[1]
        nursery.cancel_scope.cancel()


def numbered(n: int) -> CreditFrame:
    return CreditFrame("s", 1, n)


def big(n: int, size: int) -> StepFrame:
    return StepFrame("s", 1, n, 1, None, Tensor("uint8", (1, size), bytes(size)))


async def test_frames_arrive_in_order_over_one_stream(autojump_clock: trio.testing.MockClock) -> None:
    async with pair() as (_, (a, links, _one), (b, _, other)):
        for n in range(100):
            links.send(b.peer_id, numbered(n))
            if n % 10 == 0:
                await trio.sleep(0.1)
        await trio.sleep(1)
        assert other.numbers == list(range(100))
        assert {peer for peer, _ in other.frames} == {a.peer_id}


async def test_frames_of_one_step_arrive_together(autojump_clock: trio.testing.MockClock) -> None:
    async with pair() as (_, (a, links, one), (b, _, other)):
        links.send(b.peer_id, numbered(0))
        await trio.sleep(1)
        pieces: list[int] = []
        count = len(other.frames)
        links.send_all([(b.peer_id, numbered(1)), (a.peer_id, numbered(2)), (b.peer_id, numbered(3))])
        assert one.numbers == [2]
        while other.numbers != [0, 1, 3]:
            await trio.sleep(0.001)
            if len(other.frames) != count:
                pieces.append(len(other.frames) - count)
                count = len(other.frames)
        assert pieces == [2]


async def test_a_frame_for_oneself_is_delivered_at_once(autojump_clock: trio.testing.MockClock) -> None:
    async with pair() as (_, (a, links, one), _):
        links.send(a.peer_id, numbered(7))
        assert one.numbers == [7]


async def test_a_congested_receiver_holds_the_sender(autojump_clock: trio.testing.MockClock) -> None:
    async with pair(window=100_000) as (_, (_, links, one), (b, others, other)):
        other.congested = True
        for n in range(50):
            links.send(b.peer_id, big(n, 20_000))
        await trio.sleep(10)
        assert len(other.frames) < 6
        assert links.waiting(b.peer_id) > 800_000
        other.congested = False
        others.relieve()
        await trio.sleep(10)
        assert len(other.frames) == 50
        assert links.waiting(b.peer_id) == 0
        assert one.ready[-1] == b.peer_id


async def test_a_broken_link_is_told_and_the_next_frame_opens_another(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with pair() as (_, (a, links, one), (b, _, other)):
        links.addrs[b.peer_id] = [str(addr) for addr in b.listen_addrs]
        links.send(b.peer_id, numbered(1))
        await trio.sleep(1)
        a.disconnect(b.peer_id, "cable")
        await trio.sleep(1)
        assert one.losses == [(b.peer_id, "link")]
        links.send(b.peer_id, numbered(2))
        await trio.sleep(1)
        assert other.numbers == [1, 2]


async def test_a_peer_that_is_gone_is_unreachable(autojump_clock: trio.testing.MockClock) -> None:
    async with pair() as (world, (_, links, one), (b, _, _)):
        links.addrs[b.peer_id] = [str(addr) for addr in b.listen_addrs]
        world.kill(b)
        await trio.sleep(1)
        links.send(b.peer_id, numbered(1))
        await trio.sleep(5)
        assert one.losses == [(b.peer_id, "unreachable")]


async def test_nonsense_ends_its_own_stream_only(autojump_clock: trio.testing.MockClock) -> None:
    async with pair() as (_, (a, links, _), (b, _, other)):
        stream = await a.open_stream(b.peer_id, STAGE_PROTOCOL)
        await stream.send(b"\xff" * 64)
        await trio.sleep(1)
        assert isinstance(b.last_handler_error, RemoteProtocolError)
        links.send(b.peer_id, numbered(1))
        await trio.sleep(1)
        assert other.numbers == [1]


async def test_a_second_stream_of_a_peer_takes_the_place_of_the_first(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with pair() as (_, (a, _, _), (b, _, other)):
        first = await a.open_stream(b.peer_id, STAGE_PROTOCOL)
        await first.send(encode_frame(numbered(1)))
        await trio.sleep(1)
        second = await a.open_stream(b.peer_id, STAGE_PROTOCOL)
        await second.send(encode_frame(numbered(2)))
        await trio.sleep(1)
        ended: list[Exception | None] = []
        first.deliver_to(lambda data, error: ended.append(error))
        await trio.sleep(1)
        assert ended
        await second.send(encode_frame(numbered(3)))
        await trio.sleep(1)
        assert other.numbers == [1, 2, 3]
