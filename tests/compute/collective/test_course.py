"""Courses of DiLoCo over groups, in virtual time: who dies, comes and dawdles, and what all share.

All is true with overlap as without: the tests that take `options` run both ways.
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import trio

from mycel.compute.collective.policy import Policy
from mycel.compute.collective.state import SharedState
from mycel.compute.train.border import Border, BorderOptions
from mycel.compute.train.course import Passed, run_course, stay
from mycel.compute.train.outer import OuterOptions
from mycel.protocol.errors import MycelError, UsageProblem
from mycel.simnet import clock

COUNT = 3000
BORDERS = 12
OPTIONS = BorderOptions(every=10, outer=OuterOptions(rate=0.7, momentum=0.5), codec="int8")
AHEAD = replace(OPTIONS, overlap=True)
both = pytest.mark.parametrize("options", [OPTIONS, AHEAD], ids=["waits", "overlaps"])


def simulated(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Run an async test in virtual time."""

    @functools.wraps(test)
    def run(**given: Any) -> None:
        clock.run(lambda: test(**given), seed=1)

    return run


class Learner:
    """A peer whose data say that all weights should be its own number; together they settle for the mean."""

    def __init__(self, peer: Any, step_s: float = 0.1, options: BorderOptions = OPTIONS) -> None:
        self.peer = peer
        self.step_s = step_s
        self.border = Border(np.full(COUNT, 9.0 * peer.number, np.float32), options)
        self.passed: list[Passed] = []
        self.steps: list[int] = []
        self.begun: list[int] = []
        """How many steps were done before each request."""
        self.bits: dict[int, bytes] = {}
        self.fails_after = 1 << 30
        self.failure: MycelError | None = None
        self.done = trio.Event()

    async def work(self, weights: Any, steps: int, done: int) -> tuple[Any, float]:
        await trio.sleep(steps * self.step_s)
        if done >= self.fails_after:
            raise UsageProblem("out of data")
        self.steps.append(steps)
        self.begun.append(done)
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
                course = (self.border, self.work, BORDERS, self.on_border)
                try:
                    await run_course(self.peer.group, state, *course)
                except MycelError as error:
                    self.failure = error
                self.done.set()
                await stay(state, self.border)


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


@both
@simulated
async def test_peers_that_want_different_things_settle_for_the_mean(
    swarm: Any, options: BorderOptions
) -> None:
    async with swarm() as world:
        learners = begin(world, 3, 3, options=options)
        await finish(learners)
        assert [passed.step.contributors for passed in learners[0].passed] == [3] * BORDERS
        assert abs(float(learners[0].border.weights.mean()) - 2.0) < 0.2  # of 1, 2 and 3
        losses = [passed.loss for passed in learners[0].passed]
        assert losses[-1] < 0.2 * losses[0]
        assert losses == [passed.loss for passed in learners[1].passed]


@both
@simulated
async def test_one_dies_and_one_joins_midway(swarm: Any, options: BorderOptions) -> None:
    async with swarm() as world:
        learners = begin(world, 3, 2, options=options)
        await trio.sleep(6.5)
        learners[0].peer.kill()
        await trio.sleep(3)
        learners += begin(world, 1, 2, options=options)
        await finish(learners[1:])
        members = [passed.step.contributors for passed in learners[1].passed]
        assert members[0] == 3
        assert 2 in members
        assert members[-1] == 3
        assert len(learners[3].passed) < BORDERS  # it began where the others were


@both
@simulated
async def test_the_slow_are_not_waited_for_longer_than_a_piece_of_their_work(
    swarm: Any, options: BorderOptions
) -> None:
    async with swarm() as world:
        begun = trio.current_time()
        (quick,) = begin(world, 1, 2, step_s=0.1, options=options)
        (slow,) = begin(world, 1, 2, step_s=1.0, options=options)
        await finish([quick, slow])
        took = trio.current_time() - begun
        assert took < BORDERS * 10 * 1.0 / 2  # half of what it takes at the slow one's pace
        assert sum(slow.steps) < sum(quick.steps) / 2
        assert abs(float(quick.border.weights.mean()) - quick.peer.number) < 0.4  # who did more counts more


@both
@simulated
async def test_who_was_cut_off_takes_over_what_the_others_did(swarm: Any, options: BorderOptions) -> None:
    async with swarm() as world:
        learners = begin(world, 3, 2, options=options)
        await trio.sleep(2.2)
        world.world.silence(learners[2].peer.mesh)
        await trio.sleep(6)
        world.world.unsilence(learners[2].peer.mesh)
        await finish(learners)
        assert learners[2].peer.group.fenced >= 1
        contributors = [passed.step.contributors for passed in learners[0].passed]
        assert 2 in contributors
        assert contributors[-1] == 3


@simulated
async def test_overlap_hides_a_slow_sum_and_all_steps_count(swarm: Any) -> None:
    """A sum takes almost as long as the steps to a border: with overlap it costs no time but the last."""
    took = {}
    for options in (OPTIONS, AHEAD):
        async with swarm() as world:
            learners = begin(world, 2, 2, options=options)
            for learner in learners:
                learner.peer.group.all_reduce = delayed(learner.peer.group.all_reduce, 0.4)
            began = trio.current_time()
            await finish(learners)
            took[options.overlap] = trio.current_time() - began
        for learner in learners:
            assert learner.begun == list(range(0, BORDERS * 10, 2)), "every step, each once"
            assert [passed.step.number for passed in learner.passed] == list(range(1, BORDERS + 1))
            assert abs(float(learner.border.weights.mean()) - 1.5) < 0.3
    assert took[False] > 1.8 * BORDERS
    assert took[True] < 1.35 * BORDERS


def delayed(reduce: Callable[..., Awaitable[Any]], seconds: float) -> Callable[..., Awaitable[Any]]:
    """A slow line: two of these to a border."""

    async def late(*given: Any, **named: Any) -> Any:
        await trio.sleep(seconds)
        return await reduce(*given, **named)

    return late


@both
@simulated
async def test_who_comes_after_the_last_border_gets_the_end_and_need_not_train(
    swarm: Any, options: BorderOptions
) -> None:
    async with swarm() as world:
        learners = begin(world, 2, 2, options=options)
        await finish(learners)
        (late,) = begin(world, 1, 2, options=options)
        await finish([*learners, late])
        assert late.steps == []
        assert late.border.steps == BORDERS
        assert late.border.weights.tobytes() == learners[0].border.weights.tobytes()


@both
@simulated
async def test_a_course_says_by_itself_why_its_worker_failed(swarm: Any, options: BorderOptions) -> None:
    async with swarm() as world:
        learners = begin(world, 2, 2, options=options)
        learners[0].fails_after = 60
        with trio.fail_after(60):
            await learners[0].done.wait()
        assert str(learners[0].failure) == "out of data"
