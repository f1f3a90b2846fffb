"""The pushed board between simulated nodes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from mycel.dht.board import BOARD_PROTOCOL, SwarmBoard
from mycel.dht.facts import VALUE_BYTES_MAX
from mycel.protocol.board import Fact
from mycel.protocol.errors import LimitExceeded, RemoteProtocolError
from mycel.protocol.mesh import Access
from mycel.simnet.mesh import MeshOptions, MeshWorld, SimMesh, mesh_world


@asynccontextmanager
async def world_of(count: int) -> AsyncIterator[tuple[MeshWorld, list[tuple[SimMesh, SwarmBoard]]]]:
    async with mesh_world(MeshOptions(seed=3)) as world, trio.open_nursery() as nursery:
        nodes = []
        for n in range(count):
            mesh = world.add(f"n{n}")
            board = SwarmBoard(mesh)
            await nursery.start(board.run)
            nodes.append((mesh, board))
        yield world, nodes
        nursery.cancel_scope.cancel()


async def facts_when(board: SwarmBoard, count: int) -> list[tuple[str, bytes | None]]:
    """All facts once there are `count`."""
    async with board.watch("") as changes:
        while len(board.facts("")) != count:
            await changes.__anext__()
    return [(fact.key, fact.value) for fact in board.facts("")]


async def test_facts_reach_peers_that_connect_later_and_earlier(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with world_of(3) as (_, [(a, board_a), (b, board_b), (c, board_c)]):
        board_a.publish("stages/x", b"1")
        await a.connect(b.listen_addrs)
        assert await facts_when(board_b, 1) == [("stages/x", b"1")]
        board_a.publish("stages/y", b"2")
        assert await facts_when(board_b, 2) == [("stages/x", b"1"), ("stages/y", b"2")]
        await c.connect(a.listen_addrs)
        assert len(await facts_when(board_c, 2)) == 2
        assert board_a.facts("stages/x") == [Fact(a.peer_id, "stages/x", b"1")]


async def test_changes_and_withdrawals_are_seen(autojump_clock: trio.testing.MockClock) -> None:
    async with world_of(2) as (_, [(a, board_a), (b, board_b)]):
        await a.connect(b.listen_addrs)
        async with board_b.watch("k") as changes:
            board_a.publish("k", b"1")
            board_a.publish("other", b"1")
            assert await changes.__anext__() == Fact(a.peer_id, "k", b"1")
            board_a.publish("k", b"2")
            assert await changes.__anext__() == Fact(a.peer_id, "k", b"2")
            board_a.withdraw("k")
            board_a.withdraw("k")
            assert await changes.__anext__() == Fact(a.peer_id, "k", None)
        assert board_b.facts("k") == []


async def test_a_dead_authors_facts_end_and_come_back_with_it(autojump_clock: trio.testing.MockClock) -> None:
    async with world_of(2) as (world, [(a, board_a), (b, board_b)]):
        await a.connect(b.listen_addrs)
        board_a.publish("k", b"1")
        async with board_b.watch("") as changes:
            assert (await changes.__anext__()).value == b"1"
            world.cut([a], [b])
            assert await changes.__anext__() == Fact(a.peer_id, "k", None)
            world.heal()
            board_a.publish("k", b"2")
            await a.connect(b.listen_addrs)
            assert await changes.__anext__() == Fact(a.peer_id, "k", b"2")


async def test_a_peer_that_ended_the_stream_is_told_again(autojump_clock: trio.testing.MockClock) -> None:
    async with mesh_world(MeshOptions(seed=1)) as world, trio.open_nursery() as nursery:
        a, b = world.add("a"), world.add("b")
        board_a = SwarmBoard(a)
        await nursery.start(board_a.run)
        await a.connect(b.listen_addrs)  # b speaks no board yet
        board_a.publish("k", b"1")
        await trio.sleep(1)
        board_b = SwarmBoard(b)
        await nursery.start(board_b.run)
        assert await facts_when(board_b, 1) == [("k", b"1")]
        nursery.cancel_scope.cancel()


async def test_a_slow_watcher_gets_the_latest_word(autojump_clock: trio.testing.MockClock) -> None:
    async with world_of(1) as (_, [(_a, board)]), board.watch("") as changes:
        for n in range(1000):
            board.publish("k", str(n).encode())
        assert (await changes.__anext__()).value == b"999"


async def test_bounds_hold_on_both_sides(autojump_clock: trio.testing.MockClock) -> None:
    async with world_of(2) as (_world, [(a, board_a), (b, board_b)]):
        with pytest.raises(LimitExceeded):
            board_a.publish("k", bytes(VALUE_BYTES_MAX + 1))
        await a.connect(b.listen_addrs)
        await trio.sleep(1)
        for bad in ((2**31).to_bytes(4, "big"), (3).to_bytes(4, "big") + b"\xff\xff\xff"):
            errors = b.handler_errors
            b.last_handler_error = None
            stream = await a.open_stream(b.peer_id, BOARD_PROTOCOL)
            await stream.send(bad)
            await trio.sleep(3)
            assert b.handler_errors == errors + 1
            assert isinstance(b.last_handler_error, RemoteProtocolError)
        board_a.publish("k", b"1")  # and the board goes on
        assert await facts_when(board_b, 1) == [("k", b"1")]


async def test_strangers_are_told_nothing(autojump_clock: trio.testing.MockClock) -> None:
    async with mesh_world() as world, trio.open_nursery() as nursery:
        a = world.add("a")
        b = world.add("b", access=Access.STRANGER)
        boards = [SwarmBoard(a), SwarmBoard(b)]
        for board in boards:
            await nursery.start(board.run)
        boards[0].publish("k", b"1")
        boards[1].publish("k", b"2")
        await a.connect(b.listen_addrs)
        await trio.sleep(10)
        assert [fact.value for fact in boards[0].facts("")] == [b"1"]
        nursery.cancel_scope.cancel()
