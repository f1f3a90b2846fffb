"""Courses of DiLoCo over groups, in virtual time: who dies, comes and dawdles, and what all share."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import trio

from mycel.compute.collective.policy import Policy
from mycel.compute.collective.state import SharedState
from mycel.compute.train.border import Border, BorderOptions
from mycel.compute.train.course import Passed, run_course
from mycel.compute.train.outer import OuterOptions
from mycel.simnet import clock

COUNT = 3000
BORDERS = 12
OPTIONS = BorderOptions(every=10, outer=OuterOptions(rate=0.7, momentum=0.5), codec="int8")


def simulated(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Run an async test in virtual time."""

    @functools.wraps(test)
    def run(**given: Any) -> None:
        clock.run(lambda: test(**given), seed=1)

    return run


class Learner:
    """A peer whose data say that all weights should be its own number; together they settle for the mean."""

    def __init__(self, peer: Any, step_s: float = 0.1) -> None:
        self.peer = peer
        self.step_s = step_s
        self.border = Border(np.full(COUNT, 9.0 * peer.number, np.float32), OPTIONS)
        self.passed: list[Passed] = []
        self.steps: list[int] = []
        self.bits: dict[int, bytes] = {}
        self.done = trio.Event()

    async def work(self, weights: Any, steps: int, done: int) -> tuple[Any, float]:
        await trio.sleep(steps * self.step_s)
        self.steps.append(steps)
        away = weights - np.float32(self.peer.number)
        return weights - away * np.float32(1 - 0.97**steps), float(np.abs(away).mean())

    def on_border(self, passed: Passed) -> None:
        self.passed.append(passed)
        self.bits[passed.step.number] = self.border.weights.tobytes()

    async def learn(self) -> None:
        with self.peer.scope():
            state = SharedState(self.peer.group, self.peer.rpc)
            await self.peer.is_running.wait()
            async with trio.open_nursery() as nursery:
                await nursery.start(state.run)
                await run_course(self.peer.group, state, self.border, self.work, BORDERS, self.on_border)
                self.done.set()
                await trio.sleep_forever()


def begin(world: Any, count: int, least: int, **options: Any) -> list[Learner]:
    """So many peers that begin at once; nothing moves before `least` are there."""
    learners = [Learner(world.start(Policy(admits="border", least=least)), **options) for _ in range(count)]
    for learner in learners:
        world.nursery.start_soon(learner.learn)
    return learners


async def finish(learners: list[Learner]) -> None:
    """Wait for their ends, then see that they held the same bits after every border that they share."""
    with trio.fail_after(300):
        for learner in learners:
            await learner.done.wait()
    for learner in learners:
        for number, bits in learner.bits.items():
            for other in learners:
                assert other.bits.get(number, bits) == bits, f"two states after border {number}"


@simulated
async def test_peers_that_want_different_things_settle_for_the_mean(swarm: Any) -> None:
    async with swarm() as world:
        learners = begin(world, 3, 3)
        await finish(learners)
        assert [passed.step.contributors for passed in learners[0].passed] == [3] * BORDERS
        assert abs(float(learners[0].border.weights.mean()) - 2.0) < 0.2  # of 1, 2 and 3
        losses = [passed.loss for passed in learners[0].passed]
        assert losses[-1] < 0.2 * losses[0]
        assert losses == [passed.loss for passed in learners[1].passed]


@simulated
async def test_one_dies_and_one_joins_midway(swarm: Any) -> None:
    async with swarm() as world:
        learners = begin(world, 3, 2)
        await trio.sleep(6.5)
        learners[0].peer.kill()
        await trio.sleep(3)
        learners += begin(world, 1, 2)
        await finish(learners[1:])
        members = [passed.step.contributors for passed in learners[1].passed]
        assert members[0] == 3
        assert 2 in members
        assert members[-1] == 3
        assert len(learners[3].passed) < BORDERS  # it began where the others were


@simulated
async def test_the_slow_are_not_waited_for_longer_than_a_piece_of_their_work(swarm: Any) -> None:
    async with swarm() as world:
        begun = trio.current_time()
        quick, slow = begin(world, 1, 2, step_s=0.1) + begin(world, 1, 2, step_s=1.0)
        await finish([quick, slow])
        took = trio.current_time() - begun
        assert took < BORDERS * 10 * 1.0 / 2  # half of what it takes at the slow one's pace
        assert sum(slow.steps) < sum(quick.steps) / 2
        assert abs(float(quick.border.weights.mean()) - quick.peer.number) < 0.4  # who did more counts more


@simulated
async def test_who_was_cut_off_takes_over_what_the_others_did(swarm: Any) -> None:
    async with swarm() as world:
        learners = begin(world, 3, 2)
        await trio.sleep(2.2)
        world.world.silence(learners[2].peer.mesh)
        await trio.sleep(6)
        world.world.unsilence(learners[2].peer.mesh)
        await finish(learners)
        assert learners[2].peer.group.fenced >= 1
        contributors = [passed.step.contributors for passed in learners[0].passed]
        assert 2 in contributors
        assert contributors[-1] == 3
