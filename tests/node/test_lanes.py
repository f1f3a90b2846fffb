"""Lanes over real sockets on loopback: what goes over them, what their end costs, and who is kept away."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import trio
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from mycel.compute.collective.attempt import Attempt, AttemptFailed, Rule
from mycel.compute.collective.gate import Doorway
from mycel.compute.collective.mover import RingMover
from mycel.node import lane_setup
from mycel.node.host import Host
from mycel.node.lane_ends import Cap, LaneSender, Waiting
from mycel.node.lane_threads import LaneThread
from mycel.node.lane_wire import HELLO_BYTES, Opener, Sealer, derive_keys
from mycel.node.lanes import LaneOptions, SocketLanes
from mycel.node.tcp import TcpNetwork
from mycel.protocol.errors import RemoteProtocolError
from mycel.protocol.keys import OwnKey
from mycel.protocol.lane import PART, Head, Parcel
from mycel.protocol.limits import LaneLimits
from mycel.protocol.mesh import Access
from mycel.protocol.rpc import Rpc

LIMITS = LaneLimits(chunk_bytes=128 * 1024, lanes_here=2)
ITEMS = 600_000
HEAD = Head(b"o" * 16, PART, 1, 2, 3, 100_000)


class Node:
    """A host with lanes and a mover."""

    def __init__(self, options: LaneOptions) -> None:
        self.host = Host(
            TcpNetwork(),
            OwnKey(os.urandom(32)),
            listen=["/ip4/127.0.0.1/tcp/0"],
            default_access=Access.MEMBER,
        )
        self.rpc = Rpc(self.host)
        self.lanes = SocketLanes(self.host, self.rpc, options)
        self.mover = RingMover(self.host, self.lanes, limits=LIMITS)

    async def run(self, *, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
        """All of it."""
        async with trio.open_nursery() as nursery:
            for service in (self.host.run, self.rpc.run, self.lanes.run, self.mover.run):
                await nursery.start(service)
            task_status.started()


class Some:
    """Nodes that know each other."""

    def __init__(self, nodes: list[Node]) -> None:
        self.nodes = nodes
        self.order = tuple(node.host.peer_id for node in nodes)
        self.number = 0
        chance = np.random.default_rng(0)
        self.inputs = [chance.standard_normal(ITEMS, np.float32) for _ in nodes]

    async def average(self) -> None:
        """An all-reduce that must be right everywhere."""
        self.number += 1
        attempt = Attempt("g", 1, b"lineage8", "t", self.number, self.order)
        arrays = [array.copy() for array in self.inputs]
        staged = {}

        async def one(at: int) -> None:
            staged[at] = await self.nodes[at].mover.all_reduce(attempt, arrays[at], Rule("float32"))

        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                for at in range(len(self.nodes)):
                    nursery.start_soon(one, at)
        for at in staged:
            staged[at].keep()
        assert len({array.tobytes() for array in arrays}) == 1
        assert np.allclose(arrays[0], sum(self.inputs) / len(self.nodes), atol=1e-5)

    def lanes(self, source: int, target: int) -> int:
        """Sockets from one to another."""
        return self.nodes[source].lanes.lanes_to(self.order[target])


@asynccontextmanager
async def open_some(*options: LaneOptions) -> AsyncIterator[Some]:
    nodes = [Node(option) for option in options]
    async with trio.open_nursery() as nursery:
        for at, node in enumerate(nodes):
            await nursery.start(node.run)
            for other in nodes[:at]:
                await node.host.connect(other.host.listen_addrs)
        yield Some(nodes)
        nursery.cancel_scope.cancel()


def option(**changes: Any) -> LaneOptions:
    return LaneOptions(**{"host": "127.0.0.1", "limits": LIMITS, **changes})


@pytest.fixture
def some() -> Callable[..., AbstractAsyncContextManager[Some]]:
    return open_some


@pytest.mark.parametrize("encryption", ["aes-128-gcm", "none"])
async def test_bulk_goes_over_lanes(some: Any, encryption: str) -> None:
    async with some(*[option(encryption=encryption)] * 3) as those:
        await those.average()
        assert [those.lanes(at, (at + 1) % 3) for at in range(3)] == [LIMITS.lanes] * 3
        for node in those.nodes:
            assert all(node.lanes.rate(peer) for peer in those.order if node.lanes.lanes_to(peer))


async def test_one_who_does_not_encrypt_gets_no_lanes(some: Any) -> None:
    async with some(option(), option(encryption="none")) as those:
        await those.average()
        assert those.lanes(0, 1) == those.lanes(1, 0) == 0


async def test_a_peer_whose_port_cannot_be_reached_dials_itself(
    some: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with some(option(), option()) as those:
        those.nodes[1].lanes._desk.port = 9  # nobody listens there
        await those.average()
        assert those.lanes(0, 1) == those.lanes(1, 0) == LIMITS.lanes


async def test_lanes_that_die_cost_themselves_only(some: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cut: list[LaneSender] = []
    seal = Sealer.seal

    def seal_and_cut(self: Sealer, head: Head, body: memoryview) -> tuple[bytes, memoryview]:
        for pair in those.nodes[0].lanes._pairs.values():
            for sender in pair.senders:
                is_due = len(sender._sent) >= 3 and len(cut) < most and sender not in cut
                if sender._sealer is self and is_due:
                    cut.append(sender)
                    sender.sock.shutdown(socket.SHUT_RDWR)
        return seal(self, head, body)

    async with some(option(), option()) as those:
        monkeypatch.setattr(Sealer, "seal", seal_and_cut)
        for most, left in ((1, 1), (2, 0)):
            await those.average()
            assert len(cut) == most
            with trio.fail_after(5):
                while those.lanes(0, 1) != left:  # noqa: ASYNC110
                    await trio.sleep(0.01)
        await those.average()  # without any, over the connection's streams


async def test_corrupted_bytes_are_noticed_and_nothing_comes_of_them(
    some: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    seal = Sealer.seal
    chance = np.random.default_rng(1)

    def seal_and_corrupt(self: Sealer, head: Head, body: memoryview) -> tuple[bytes, memoryview]:
        sealed_head, sealed = seal(self, head, body)
        hits = chance.integers(0, len(sealed), len(sealed) // 100)
        np.frombuffer(sealed, np.uint8)[hits] ^= 0x41  # one percent of the bytes
        return sealed_head, sealed

    single = option(limits=replace(LIMITS, lanes_here=1))  # so that each lane has something to carry
    async with some(single, single) as those:
        await those.average()
        assert those.lanes(0, 1) == those.lanes(1, 0) == 1
        monkeypatch.setattr(Sealer, "seal", seal_and_corrupt)
        await those.average()
        assert "is not what its sender sealed" in caplog.text
        with trio.fail_after(5):
            while those.lanes(0, 1) or those.lanes(1, 0):  # noqa: ASYNC110
                await trio.sleep(0.01)


async def test_a_stopped_node_is_noticed_at_once(some: Any) -> None:
    async with some(option(), option()) as those:
        await those.average()
        attempt = Attempt("g", 1, b"lineage8", "t", 99, those.order)
        array = those.inputs[0].copy()
        began = trio.current_time()
        async with trio.open_nursery() as nursery:

            async def go() -> None:
                await trio.sleep(0.1)
                those.nodes[0].host.disconnect(those.order[1], "gone")

            nursery.start_soon(go)
            with pytest.raises(AttemptFailed) as caught:
                await those.nodes[0].mover.all_reduce(attempt, array, Rule("float32"))
        assert caught.value.peer == those.order[1]
        assert trio.current_time() - began < 3
        assert np.array_equal(array, those.inputs[0])
        with trio.fail_after(5):
            while those.lanes(0, 1):  # noqa: ASYNC110 (keys end with the connection they came over)
                await trio.sleep(0.01)


async def test_strangers_at_the_port_are_sent_away(some: Any) -> None:
    async with some(option()) as those:
        for hello in (b"", b"GET / HTTP/1.1\r\n\r\n" + bytes(40), bytes(HELLO_BYTES)):
            stream = await trio.open_tcp_stream("127.0.0.1", those.nodes[0].lanes.port)
            async with stream:
                await stream.send_all(hello)
                with trio.fail_after(5), contextlib.suppress(trio.BrokenResourceError):  # reset: as good
                    await stream.send_eof()
                    assert await stream.receive_some() == b""


@pytest.mark.parametrize("lanes", [LIMITS.lanes, 0])
async def test_a_node_sends_no_more_than_its_cap(some: Any, lanes: int) -> None:
    rate = 8e6
    plain = {} if lanes else {"encryption": "none"}  # no lanes then: bulk goes over streams
    async with some(option(bytes_per_s=rate), option(bytes_per_s=rate, **plain)) as those:
        await those.average()  # sets up
        began = trio.current_time()
        await those.average()
        assert trio.current_time() - began > 0.8 * ITEMS * 4 / rate
        assert those.lanes(0, 1) == lanes


def test_a_capped_lane_whose_socket_is_full_waits_for_that_alone() -> None:
    """Else its thread would ask again and again, without a pause, until there is room."""
    near, far = socket.socketpair()
    with near, far:
        near.setblocking(False)
        waiting = Waiting()
        body = memoryview(bytes(4 << 20))
        waiting.put([Parcel("B", HEAD._replace(length=len(body)), lambda: body, Doorway())])  # type: ignore[arg-type]
        thread = LaneThread()
        lane = LaneSender(near, Sealer(None), waiting, Cap(1e12), thread, lambda lane: None)
        while lane.step():
            assert not lane.is_over
        assert lane.is_full
        assert lane.pause_s() is None
        thread.stop()


def test_cap_of_nothing_waits_for_nothing() -> None:
    assert Cap(0).reserve(1 << 40) == 0


@pytest.mark.parametrize("at", [0, 17, 30, 44, 50_000, -1])
def test_every_byte_of_a_frame_is_authenticated(at: int) -> None:
    key = AESGCM.generate_key(128)
    body = os.urandom(HEAD.length)
    frame = bytearray(b"".join(Sealer(key).seal(HEAD, memoryview(body))))
    assert open_frame(Opener(key), frame) == body
    frame[at] ^= 1
    with pytest.raises(RemoteProtocolError, match="is not what its sender sealed"):
        open_frame(Opener(key), frame)


def open_frame(opener: Opener, frame: bytearray) -> bytes:
    view = memoryview(bytearray(frame))
    head = opener.open_head(view[: opener.head_bytes])
    assert head == HEAD
    place = bytearray(head.length)
    opener.body(head, view[opener.head_bytes :]).open_into(memoryview(place))
    return bytes(place)


def test_frames_cannot_be_left_out_doubled_or_moved() -> None:
    key = AESGCM.generate_key(128)
    sealer, body = Sealer(key), os.urandom(HEAD.length)
    first = bytearray(b"".join(sealer.seal(HEAD, memoryview(body))))
    second = bytearray(b"".join(sealer.seal(HEAD, memoryview(body))))
    assert first != second
    opener = Opener(key)
    with pytest.raises(RemoteProtocolError):
        open_frame(opener, second)
    open_frame(opener, first)
    with pytest.raises(RemoteProtocolError):
        open_frame(opener, first)


def test_keys_are_of_one_lane_and_direction() -> None:
    shares = (b"a" * 32, b"b" * 32)
    keys = [
        derive_keys(shares, "A", "B", 0),  # type: ignore[arg-type]
        derive_keys(shares, "A", "B", 1),  # type: ignore[arg-type]
        derive_keys(shares, "B", "A", 0),  # type: ignore[arg-type]
        derive_keys(shares[::-1], "A", "B", 0),  # type: ignore[arg-type]
    ]
    assert len({key.cipher for key in keys}) == len({key.hello for key in keys}) == 4
    assert keys[0] == derive_keys(shares, "A", "B", 0)  # type: ignore[arg-type]
    assert keys[0].mark(b"dial", b"t") != keys[0].mark(b"take", b"t")


def test_shares_and_tokens_have_their_lengths() -> None:
    with pytest.raises(RemoteProtocolError):
        lane_setup.check_share(b"short")
