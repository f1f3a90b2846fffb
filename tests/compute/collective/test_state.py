"""Shared state: whoever differs gets what differs, checked, from several at once, whoever dies or lies."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest
import trio

from mycel.compute.collective.inventory import CHUNK_BYTES, differing, root_of, take_stock
from mycel.compute.collective.outcome import Fenced
from mycel.compute.collective.policy import Policy
from mycel.compute.collective.state import SharedState, StateLost, Synced
from mycel.protocol.errors import RemoteProtocolError, UsageProblem
from mycel.protocol.tensor import Tensor
from mycel.simnet import clock

BORDER = Policy(admits="border")


def simulated(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Run an async test in virtual time."""

    @functools.wraps(test)
    def run(**given: Any) -> None:
        clock.run(lambda: test(**given), seed=1)

    return run


def tensors(value: float, chunks: int = 3) -> dict[str, Any]:
    """Two tensors; the larger one has so many chunks."""
    big = np.full(chunks * CHUNK_BYTES // 4, value, np.float32)
    return {"big": big, "small": np.arange(7, dtype=np.int64)}


class Member:
    """A peer of the swarm with a state."""

    def __init__(self, peer: Any, state: dict[str, Any]) -> None:
        self.peer = peer
        self.state = state
        self.shared = SharedState(peer.group, peer.rpc)
        self.synced: list[Synced] = []
        self.error: Exception | None = None

    async def serve(self) -> None:
        with self.peer.scope():
            await self.shared.run()

    async def sync(self) -> None:
        with self.peer.scope():
            try:
                self.synced.append(await self.shared.sync(self.state))
            except (StateLost, RemoteProtocolError, Fenced) as error:
                self.error = error


async def enter(world: Any, states: list[dict[str, Any]]) -> list[Member]:
    """Members of one group; they come in together at their first border."""
    members = [Member(world.start(BORDER), state) for state in states]
    for member in members:
        world.nursery.start_soon(member.serve)
    await trio.sleep(2)
    return members


async def sync_all(members: list[Member]) -> None:
    async with trio.open_nursery() as nursery:
        for member in members:
            nursery.start_soon(member.sync)


def same_state(members: list[Member]) -> None:
    roots = {root_of(take_stock(member.state)) for member in members}
    assert len(roots) == 1


def test_only_differing_chunks_are_named() -> None:
    one, other = tensors(1.0), tensors(1.0)
    other["big"][CHUNK_BYTES // 4] = 2.0
    other["small"][0] = 9
    assert differing(take_stock(one), take_stock(other)) == [(0, 1), (1, 0)]
    assert root_of(take_stock(one)) != root_of(take_stock(other))
    assert root_of(take_stock(one)) == root_of(take_stock(tensors(1.0)))


def test_other_tensors_are_not_a_difference_but_an_error() -> None:
    with pytest.raises(RemoteProtocolError, match="other tensors"):
        differing(take_stock(tensors(1.0)), take_stock(tensors(1.0, chunks=4)))


@simulated
async def test_a_newcomer_gets_the_groups_state_from_several_while_they_go_on(swarm: Any) -> None:
    async with swarm(bytes_per_s=5e6) as world:
        members = await enter(world, [tensors(1.0, 5) for _ in range(3)])
        await sync_all(members)
        assert not any(member.synced[-1].behind for member in members)
        (fresh,) = await enter(world, [tensors(0.0, 5)])
        calls = world.calls_of(members, "state.get/demo")
        async with trio.open_nursery() as both:
            both.start_soon(fresh.sync)
            await sync_all(members)
            for member in members:  # they go on: the newcomer gets what was, not what is
                member.state["big"][:] = 7.0
            assert not fresh.synced
        assert fresh.synced[-1].replaced
        assert (fresh.state["big"] == 1.0).all()
        assert fresh.shared.fetched_bytes == 5 * CHUNK_BYTES  # the small tensor was equal
        served = [b - a for a, b in zip(calls, world.calls_of(members, "state.get/demo"), strict=True)]
        assert sum(count > 0 for count in served) > 1, f"chunks came from {served}"
        fresh.state["big"][:] = 7.0
        await sync_all([*members, fresh])
        same_state([*members, fresh])


@simulated
async def test_who_differs_from_the_majority_is_set_right(swarm: Any) -> None:
    async with swarm() as world:
        states = [tensors(1.0), tensors(1.0), tensors(1.0)]
        states[0]["big"][5] = 3.0
        members = await enter(world, states)
        await sync_all(members)
        same_state(members)
        assert [member.synced[-1].replaced for member in members] == [True, False, False]
        assert states[0]["big"][5] == 1.0
        assert members[0].shared.fetched_bytes == CHUNK_BYTES


@pytest.mark.parametrize("who", ["sender", "receiver"])
@pytest.mark.parametrize("after", [0.05, 0.3, 0.8])
@simulated
async def test_a_death_during_the_sync_leaves_the_rest_with_one_state(
    swarm: Any, who: str, after: float
) -> None:
    async with swarm(bytes_per_s=5e6) as world:
        members = await enter(world, [tensors(1.0, 5) for _ in range(3)])
        await sync_all(members)
        (fresh,) = await enter(world, [tensors(0.0, 5)])
        dead = members[0] if who == "sender" else fresh
        async with trio.open_nursery() as all_of_them:
            for member in [*members, fresh]:
                all_of_them.start_soon(member.sync)
            await trio.sleep(after)
            dead.peer.kill()
        rest = [member for member in [*members, fresh] if member is not dead]
        await sync_all(rest)
        same_state(rest)
        assert (rest[-1].state["big"] == 1.0).all()


@simulated
async def test_a_lying_sender_is_found_out_and_nothing_of_it_is_kept(swarm: Any) -> None:
    async with swarm() as world:
        members = await enter(world, [tensors(1.0) for _ in range(3)])
        await sync_all(members)
        (fresh,) = await enter(world, [tensors(0.0)])
        liar = members[0].shared
        honest = liar._on_get

        async def lie(call: Any, ask: Any) -> Any:
            chunk = await honest(call, ask)
            data = bytearray(chunk.data.data)
            data[len(data) // 2] ^= 1
            return type(chunk)(Tensor("uint8", (len(data),), bytes(data)))

        members[0].peer.rpc.stop_serving(liar._get)
        members[0].peer.rpc.serve(liar._get, lie)
        await sync_all([*members, fresh])
        same_state([*members, fresh])


@simulated
async def test_where_all_senders_lie_nothing_is_written(swarm: Any) -> None:
    async with swarm() as world:
        members = await enter(world, [tensors(1.0)])
        await sync_all(members)
        (fresh,) = await enter(world, [tensors(0.0)])
        liar = members[0].shared

        async def lie(call: Any, ask: Any) -> Any:
            chunk = await SharedState._on_get(liar, call, ask)
            return type(chunk)(Tensor("uint8", chunk.data.shape, bytes(chunk.data.nbytes)))

        members[0].peer.rpc.stop_serving(liar._get)
        members[0].peer.rpc.serve(liar._get, lie)
        await sync_all([*members, fresh])
        assert isinstance(fresh.error, StateLost)
        assert "not what its hash says" in str(fresh.error)
        assert (fresh.state["big"] == 0.0).all()
        members[0].peer.rpc.stop_serving(liar._get)
        members[0].peer.rpc.serve(liar._get, liar._on_get)
        await sync_all([*members, fresh])
        same_state([*members, fresh])
        assert (fresh.state["big"] == 1.0).all()


@simulated
async def test_of_two_parts_that_meet_again_the_state_of_the_longer_line_counts(swarm: Any) -> None:
    async with swarm() as world:
        policy = Policy("any", "border")
        members = [Member(world.start(policy), tensors(1.0)) for _ in range(3)]
        for member in members:
            world.nursery.start_soon(member.serve)
        await trio.sleep(2)
        await sync_all(members)
        few, many = members[:1], members[1:]
        world.world.cut([one.peer.mesh for one in few], [one.peer.mesh for one in many])
        await trio.sleep(6)
        for _ in range(5):  # it gets on faster, alone
            few[0].state["big"] += 1
            await sync_all(few)
        for member in many:
            member.state["big"] += 0.5
        await sync_all(many)
        world.world.heal()
        await trio.sleep(6)
        with trio.fail_after(60):
            await sync_all(members)
            while any(len(member.synced[-1].members) < 3 for member in members):
                await sync_all(members)
        same_state(members)
        assert few[0].state["big"][0] == many[0].state["big"][0] == 1.5
        assert any(synced.replaced for synced in few[0].synced[-2:])
        assert not any(synced.replaced for member in many for synced in member.synced[-2:])


@simulated
async def test_a_group_that_lets_newcomers_in_anywhere_has_no_shared_state(swarm: Any) -> None:
    async with swarm() as world:
        peer = world.start(Policy())
        with pytest.raises(UsageProblem, match="border"):
            SharedState(peer.group, peer.rpc)
