"""Facts of members that a node is not connected with, in virtual time."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio

from mycel.dht.board import SwarmBoard
from mycel.dht.hearsay import Hearsay
from mycel.dht.sheet import TTL_S
from mycel.protocol.board import Fact
from mycel.protocol.mesh import Access, PeerId
from mycel.protocol.rpc import Rpc
from mycel.simnet.mesh import MeshOptions, MeshWorld, SimMesh, mesh_world

Clock = trio.testing.MockClock
CHAIN = b"member"


@dataclass(frozen=True, slots=True)
class Place:
    mesh: SimMesh
    board: SwarmBoard
    hearsay: Hearsay

    def said_by(self, other: Place) -> dict[str, bytes | None]:
        return {fact.key: fact.value for fact in self.board.facts("") if fact.author == other.mesh.peer_id}

    async def until_said(self, other: Place, facts: dict[str, bytes], limit_s: float) -> float:
        """Virtual seconds until `other` is heard to say just this."""
        began = trio.current_time()
        with trio.fail_after(limit_s):
            async with self.board.watch("") as changes:
                while self.said_by(other) != facts:
                    await anext(changes)
        return trio.current_time() - began


@asynccontextmanager
async def places(
    count: int, edges: Sequence[tuple[int, int]], *, access: Sequence[Access] = (), chain: bytes = CHAIN
) -> AsyncIterator[tuple[MeshWorld, list[Place]]]:
    async with mesh_world(MeshOptions(seed=4)) as world, trio.open_nursery() as nursery:
        found = []
        for n in range(count):
            mesh = world.add(f"n{n}", access=access[n] if access else Access.MEMBER)
            board, rpc = SwarmBoard(mesh, may_state), Rpc(mesh)
            place = Place(mesh, board, Hearsay(mesh, rpc, board, lambda: chain))
            for service in (rpc, board, place.hearsay):
                await nursery.start(service.run)
            found.append(place)
        for a, b in edges:
            await found[a].mesh.connect(found[b].mesh.listen_addrs)
        yield world, found
        nursery.cancel_scope.cancel()


def may_state(author: PeerId, chain: bytes) -> bool:
    return chain == CHAIN


async def test_facts_travel_as_many_hops_as_it_takes_and_so_do_changes(autojump_clock: Clock) -> None:
    async with places(4, [(0, 1), (1, 2), (2, 3)]) as (_, (a, b, c, d)):
        a.board.publish("k", b"1")
        await d.until_said(a, {"k": b"1"}, 20)
        assert c.said_by(a) == b.said_by(a) == {"k": b"1"}
        a.board.publish("k", b"2")
        a.board.publish("l", b"2")
        await d.until_said(a, {"k": b"2", "l": b"2"}, 20)
        a.board.withdraw("k")
        await d.until_said(a, {"l": b"2"}, 20)
        await trio.sleep(5 * TTL_S)  # it goes on being said, and stays
        assert d.said_by(a) == {"l": b"2"}
        assert all(place.board.sheets.refused == {} for place in (a, b, c, d))


async def test_a_dead_authors_facts_end_at_once_next_to_it_and_soon_elsewhere(autojump_clock: Clock) -> None:
    async with places(5, [(0, 1), (0, 2), (1, 2), (1, 3), (2, 3), (3, 4)]) as (world, (a, b, c, d, e)):
        a.board.publish("k", b"1")
        await e.until_said(a, {"k": b"1"}, 20)
        world.kill(a.mesh)
        assert await b.until_said(a, {}, 5) < 1
        seen: list[Fact] = []
        async with b.board.watch("") as changes:
            with trio.move_on_after(3 * TTL_S):
                while True:
                    seen.append(await anext(changes))
        assert seen == []  # nobody brings it back
        assert [place.said_by(a) for place in (b, c, d, e)] == [{}] * 4


async def test_facts_of_a_member_whose_connection_ended_come_back_by_others(autojump_clock: Clock) -> None:
    async with places(3, [(0, 1), (0, 2), (1, 2)]) as (_, (a, b, _c)):
        a.board.publish("k", b"1")
        await b.until_said(a, {"k": b"1"}, 5)
        b.mesh.disconnect(a.mesh.peer_id, "test")
        await b.until_said(a, {}, 1)
        await b.until_said(a, {"k": b"1"}, 20)
        assert a.mesh.peer_id not in b.mesh.peers
        await b.mesh.connect(a.mesh.listen_addrs)
        a.board.publish("k", b"2")
        await b.until_said(a, {"k": b"2"}, 1)


async def test_where_everybody_is_connected_no_words_are_passed_on(autojump_clock: Clock) -> None:
    edges = [(a, b) for a in range(6) for b in range(a)]
    async with places(6, edges) as (_, found):
        for place in found:
            place.board.publish("k", b"1")
        before = [place.hearsay.words for place in found]  # of when they met one after the other
        await trio.sleep(60)
        assert [place.hearsay.words for place in found] == before
        assert all(len(place.board.facts("k")) == 6 for place in found)


async def test_submitters_hear_and_what_nonmembers_say_goes_no_further(autojump_clock: Clock) -> None:
    access = [Access.MEMBER, Access.MEMBER, Access.SUBMIT]
    async with places(3, [(0, 1), (1, 2)], access=access) as (_, (a, b, c)):
        a.board.publish("k", b"1")
        c.board.publish("k", b"2")
        await c.until_said(a, {"k": b"1"}, 20)
        await trio.sleep(30)
        assert (a.said_by(c), b.said_by(c)) == ({}, {})
    async with places(3, [(0, 1), (1, 2)], chain=b"stranger") as (_, (a, b, c)):
        a.board.publish("k", b"1")
        await trio.sleep(30)
        assert (b.said_by(a), c.said_by(a)) == ({"k": b"1"}, {})
        assert c.board.sheets.refused["foreign"] > 0
