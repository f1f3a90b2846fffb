"""Groups over the simulated mesh: whole stacks (calls, lanes, ring) that die, fall silent and come back.

Arrays hold what their peer's number says, so that a wrong sum shows; every survivor's bytes are compared.
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import trio

from mycel.compute.collective.outcome import Fenced, OperationRefused, Outcome
from mycel.compute.collective.policy import Policy
from mycel.compute.collective.service import Group
from mycel.protocol.errors import UsageProblem
from mycel.protocol.mesh import PeerId
from mycel.simnet import clock


def simulated(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Run an async test in virtual time."""

    @functools.wraps(test)
    def run(**given: Any) -> None:
        clock.run(lambda: test(**given), seed=1)

    return run


ANY = Policy(quorum="any")


class Calls:
    """One operation called by several peers at once."""

    def __init__(self) -> None:
        self.outcomes: dict[int, Outcome] = {}
        self.errors: dict[int, Exception] = {}
        self.arrays: dict[int, Any] = {}
        self.took: dict[int, float] = {}

    async def reduce(self, peer: Any, items: int = 1000, **how: Any) -> None:
        array = self.arrays[peer.number] = peer.array(items)
        before = trio.current_time()
        try:
            with peer.scope():
                self.outcomes[peer.number] = await peer.group.all_reduce(array, **how)
        except (OperationRefused, Fenced) as error:
            self.errors[peer.number] = error
        self.took[peer.number] = trio.current_time() - before


def same_bytes(calls: Calls, peers: list[Any]) -> float:
    """The peers' common value, which every item of every one of them has."""
    first = calls.arrays[peers[0].number]
    for peer in peers:
        assert calls.arrays[peer.number].tobytes() == first.tobytes()
    assert (first == first[0]).all()
    return float(first[0])


@simulated
async def test_operations_end_alike_on_all(swarm: Any) -> None:
    async with swarm() as world:
        peers = await world.gather(3)
        calls = Calls()
        async with trio.open_nursery() as nursery:
            for peer in peers:
                nursery.start_soon(calls.reduce, peer)
        assert same_bytes(calls, peers) == 2.0
        ids = {peer.mesh.peer_id for peer in peers}
        assert all(set(calls.outcomes[p.number].contributors) == ids for p in peers)
        assert [calls.outcomes[p.number].attempts for p in peers] == [1, 1, 1]


@simulated
async def test_parts_are_scattered_gathered_and_broadcast(swarm: Any) -> None:
    async with swarm() as world:
        peers = await world.gather(3)
        got: dict[int, Any] = {}

        async def work(peer: Any) -> None:
            outcome, part = await peer.group.reduce_scatter(np.arange(10, dtype=np.float64), op="sum")
            index = outcome.contributors.index(peer.mesh.peer_id)
            again, whole = await peer.group.all_gather(np.full(2, index, np.int32), tag="g")
            told = np.full(3, peer.number, np.int64)
            await peer.group.broadcast(told, peers[1].mesh.peer_id, tag="b")
            await peer.group.barrier()
            got[index] = (part.tolist(), whole.tolist(), told.tolist())
            assert again.contributors == outcome.contributors

        async with trio.open_nursery() as nursery:
            for peer in peers:
                nursery.start_soon(work, peer)
        sums = [0.0, 3.0, 6.0, 9.0, 12.0, 15.0, 18.0, 21.0, 24.0, 27.0]
        assert [got[0][0], got[1][0], got[2][0]] == [sums[:4], sums[4:7], sums[7:]]
        assert all(got[i][1] == [0, 0, 1, 1, 2, 2] and got[i][2] == [2, 2, 2] for i in range(3))


@pytest.mark.parametrize("after", [0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.32, 0.34, 0.36, 0.4])
@simulated
async def test_a_death_at_any_moment_leaves_the_survivors_with_one_result(swarm: Any, after: float) -> None:
    """Arrival, reduce-scatter, all-gather, vote: a megabyte at 10 MB/s passes all of them in 0.4 s."""
    async with swarm(bytes_per_s=1e7) as world:
        peers = await world.gather(3)
        calls = Calls()
        async with trio.open_nursery() as nursery:
            for peer in peers:
                nursery.start_soon(calls.reduce, peer, 250_000)
            await trio.sleep(after)
            peers[2].kill()
        value = same_bytes(calls, peers[:2])
        done = calls.outcomes[1]
        assert calls.outcomes[2] == done
        assert value == (2.0 if peers[2].mesh.peer_id in done.contributors else 1.5)
        assert max(calls.took[1], calls.took[2]) < 0.5 + 0.3 + 0.5 + after


@simulated
async def test_two_of_five_die_at_once(swarm: Any) -> None:
    async with swarm(bytes_per_s=1e7) as world:
        peers = await world.gather(5)
        calls = Calls()
        async with trio.open_nursery() as nursery:
            for peer in peers:
                nursery.start_soon(calls.reduce, peer, 250_000)
            await trio.sleep(0.1)
            peers[1].kill()
            peers[3].kill()
        assert same_bytes(calls, [peers[0], peers[2], peers[4]]) == 3.0


@simulated
async def test_silence_costs_the_silent_peer_its_place_and_it_finds_out(swarm: Any) -> None:
    """SIGSTOP and SIGCONT, as the others see it."""
    async with swarm(bytes_per_s=1e7) as world:
        peers = await world.gather(3)
        calls, later = Calls(), Calls()
        async with trio.open_nursery() as nursery:
            for peer in peers:
                nursery.start_soon(calls.reduce, peer, 250_000)
            await trio.sleep(0.1)
            world.world.silence(peers[2].mesh)
            await trio.sleep(8)
            assert same_bytes(calls, peers[:2]) == 1.5
            assert calls.took[1] < 6.5
            world.world.unsilence(peers[2].mesh)
            for other in peers[:2]:
                await peers[2].mesh.connect(other.mesh.listen_addrs)
        assert isinstance(calls.errors[3], Fenced)
        assert (calls.arrays[3] == 3.0).all()
        await peers[2].group.gather_members(3)
        async with trio.open_nursery() as nursery:
            for peer in peers:
                nursery.start_soon(later.reduce, peer)
        assert same_bytes(later, peers) == 2.0


@simulated
async def test_a_connection_that_breaks_and_comes_back_costs_nobody_its_place(swarm: Any) -> None:
    async with swarm(bytes_per_s=1e7) as world:
        peers = await world.gather(3)
        calls = Calls()
        async with trio.open_nursery() as nursery:
            for peer in peers:
                nursery.start_soon(calls.reduce, peer, 250_000)
            await trio.sleep(0.1)
            peers[0].mesh.disconnect(peers[1].mesh.peer_id, "a router restarts")
        assert same_bytes(calls, peers) == 2.0
        assert not calls.errors
        assert max(calls.took.values()) < 2


class LateToSay:
    """A mesh whose peers say where they listen a moment after they are up, as they do over TCP."""

    def __init__(self, mesh: Any) -> None:
        self._mesh = mesh

    def __getattr__(self, name: str) -> Any:
        return getattr(self._mesh, name)

    @property
    def peers(self) -> dict[PeerId, Any]:
        now = trio.current_time()
        return {
            peer: info if now > info.since + 0.05 else replace(info, listen_addrs=())
            for peer, info in self._mesh.peers.items()
        }


@simulated
async def test_the_last_to_come_is_dialled_too_when_it_dies_and_not_waited_for(swarm: Any) -> None:
    async with swarm() as world:
        peers = [world.start() for _ in range(3)]
        for peer in peers:
            peer.group = Group(LateToSay(peer.mesh), peer.rpc, peer.mover, "demo")
        for peer in peers:
            await peer.group.gather_members(3)
        await trio.sleep(1)
        peers[2].kill()
        calls = Calls()
        async with trio.open_nursery() as nursery:
            for peer in peers[:2]:
                nursery.start_soon(calls.reduce, peer)
        assert same_bytes(calls, peers[:2]) == 1.5
        assert max(calls.took.values()) < 0.4


@simulated
async def test_a_death_while_connections_are_made_again_is_survived(swarm: Any) -> None:
    async with swarm(bytes_per_s=1e7) as world:
        peers = await world.gather(3)
        calls = Calls()
        async with trio.open_nursery() as nursery:
            for peer in peers:
                nursery.start_soon(calls.reduce, peer, 250_000)
            await trio.sleep(0.1)
            for one, other in ((0, 1), (1, 2), (2, 0)):
                peers[one].mesh.disconnect(peers[other].mesh.peer_id, "a router restarts")
            await trio.sleep(0.05)
            peers[2].kill()
        assert same_bytes(calls, peers[:2]) in (1.5, 2.0)
        assert calls.outcomes[1] == calls.outcomes[2]


@simulated
async def test_a_part_without_majority_ends_nothing_and_takes_over_when_it_is_back(swarm: Any) -> None:
    async with swarm() as world:
        peers = await world.gather(5)
        few, many = peers[:2], peers[2:]
        world.world.cut([p.mesh for p in few], [p.mesh for p in many])
        await trio.sleep(4)
        calls = Calls()
        async with trio.open_nursery() as nursery:
            for peer in peers:
                nursery.start_soon(calls.reduce, peer)
            await trio.sleep(5)
            assert same_bytes(calls, many) == 4.0
            assert not calls.errors
            assert not set(calls.outcomes) & {peer.number for peer in few}
            told = [peer.group.waits_for for peer in few]
            assert all(told)
            assert any("majority is needed" in why for why in told)
            world.world.heal()
            for peer in few:
                for other in many:
                    await peer.mesh.connect(other.mesh.listen_addrs)
        for peer in few:
            assert isinstance(calls.errors[peer.number], Fenced)
            assert (calls.arrays[peer.number] == peer.number).all()
            await peer.group.gather_members(5)


@simulated
async def test_down_to_one_and_back(swarm: Any) -> None:
    async with swarm() as world:
        peers = await world.gather(3, ANY)
        calls = Calls()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(calls.reduce, peers[0])
            await trio.sleep(0.1)
            peers[1].kill()
            peers[2].kill()
        assert same_bytes(calls, peers[:1]) == 1.0
        again = [world.start(ANY, peer) for peer in peers[1:]]
        both = Calls()
        for peer in again:
            await peer.group.gather_members(3)
        async with trio.open_nursery() as nursery:
            for peer in (peers[0], *again):
                nursery.start_soon(both.reduce, peer)
        assert same_bytes(both, [peers[0], *again]) == 2.0


@simulated
async def test_a_newcomer_that_dies_while_it_comes_in_holds_nobody_up(swarm: Any) -> None:
    for after in (0.05, 0.15, 0.25, 0.3, 0.31, 0.32, 0.33, 0.34, 0.35, 0.4):
        async with swarm() as world:
            peers = await world.gather(2)
            fresh = world.start()
            await trio.sleep(after)
            fresh.kill()
            calls = Calls()
            async with trio.open_nursery() as nursery:
                for peer in peers:
                    nursery.start_soon(calls.reduce, peer)
            assert same_bytes(calls, peers) == 1.5
            assert max(calls.took.values()) < 0.4


@simulated
async def test_eight_reduces_under_way_while_a_member_dies_and_another_comes(swarm: Any) -> None:
    async with swarm(bytes_per_s=1e7) as world:
        peers = await world.gather(3)
        calls = [Calls() for _ in range(8)]
        async with trio.open_nursery() as nursery:
            for number, call in enumerate(calls):
                for peer in peers:
                    nursery.start_soon(
                        lambda c, p, n: c.reduce(p, 25_000 + n, tag=f"t{n}"), call, peer, number
                    )
            await trio.sleep(0.1)
            peers[0].kill()
        for call in calls:
            assert same_bytes(call, peers[1:]) in (2.0, 2.5)
        fresh = world.start()
        await fresh.group.gather_members(3)


@simulated
async def test_another_tensor_under_one_tag_is_refused_everywhere(swarm: Any) -> None:
    async with swarm() as world:
        peers = await world.gather(3)
        calls = Calls()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(calls.reduce, peers[0])
            nursery.start_soon(calls.reduce, peers[1])
            nursery.start_soon(calls.reduce, peers[2], 999)
        for peer in peers:
            assert isinstance(calls.errors[peer.number], OperationRefused)
            assert "float32[999]" in str(calls.errors[peer.number])
            assert (calls.arrays[peer.number] == peer.number).all()
        again = Calls()
        async with trio.open_nursery() as nursery:
            for peer in peers:
                nursery.start_soon(again.reduce, peer)
        assert same_bytes(again, peers) == 2.0


@simulated
async def test_who_is_cancelled_has_its_array_and_the_others_an_error(swarm: Any) -> None:
    async with swarm(bytes_per_s=1e7) as world:
        peers = await world.gather(3)
        calls = Calls()
        mine = peers[2].array(250_000)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(calls.reduce, peers[0], 250_000)
            nursery.start_soon(calls.reduce, peers[1], 250_000)
            with trio.move_on_after(0.15):
                await peers[2].group.all_reduce(mine)
            assert (mine == 3.0).all()
        for peer in peers[:2]:
            assert isinstance(calls.errors[peer.number], OperationRefused)
            assert (calls.arrays[peer.number] == peer.number).all()


@simulated
async def test_items_that_a_codec_cannot_carry_are_refused_by_name(swarm: Any) -> None:
    async with swarm() as world:
        peers = await world.gather(2)
        errors: list[str] = []

        async def work(peer: Any) -> None:
            array = peer.array(100_000)
            if peer.number == 2:
                array[7] = np.nan
            before = array.tobytes()
            with pytest.raises(OperationRefused) as caught:
                await peer.group.all_reduce(array, codec="int8")
            assert array.tobytes() == before
            errors.append(str(caught.value))

        async with trio.open_nursery() as nursery:
            for peer in peers:
                nursery.start_soon(work, peer)
        assert len(set(errors)) == 1
        assert peers[1].mesh.peer_id in errors[0]


@simulated
async def test_what_cannot_be_called_is_told_at_once(swarm: Any) -> None:
    async with swarm() as world:
        (peer,) = await world.gather(1)
        with pytest.raises(UsageProblem, match="contiguous"):
            await peer.group.all_reduce(np.zeros((4, 4), np.float32)[:, ::2])
        with pytest.raises(UsageProblem, match="items of 4 bytes"):
            await peer.group.all_reduce(np.zeros(4, np.float32), dtype="bfloat16")
        with pytest.raises(UsageProblem, match="characters"):
            await peer.group.all_reduce(np.zeros(4, np.float32), tag="x" * 1000)


@simulated
async def test_a_broadcast_whose_root_is_gone_is_refused(swarm: Any) -> None:
    async with swarm() as world:
        peers = await world.gather(3)
        gone = PeerId(peers[2].mesh.peer_id)
        peers[2].kill()

        async def work(peer: Any) -> None:
            with pytest.raises(OperationRefused, match="no member any more"):
                await peer.group.broadcast(np.zeros(4), gone)

        async with trio.open_nursery() as nursery:
            for peer in peers[:2]:
                nursery.start_soon(work, peer)


@simulated
async def test_who_leaves_in_order_is_not_waited_for(swarm: Any) -> None:
    async with swarm() as world:
        peers = await world.gather(3)
        calls = Calls()
        async with trio.open_nursery() as nursery:
            for peer in peers[:2]:
                nursery.start_soon(calls.reduce, peer)
            await trio.sleep(1)
            peers[2].stop()
        assert same_bytes(calls, peers[:2]) == 1.5
        assert max(calls.took.values()) < 1.3
