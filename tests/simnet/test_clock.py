"""Virtual time and the replayable schedule, and the private parts of trio they stand on."""

from __future__ import annotations

import random
import threading
import time
from collections import deque

import pytest
import trio
import trio.lowlevel
import trio.testing
from trio._core import _run as trio_run

from mycel.simnet import clock
from mycel.simnet.clock import Timeline, VirtualTime, WorldStuck


def test_trios_private_switches_are_where_we_need_them():
    """Fails loudly when a new trio moves what `mycel.simnet.clock` touches: then that module must follow."""
    assert isinstance(trio_run._ALLOW_DETERMINISTIC_SCHEDULING, bool)
    assert isinstance(trio_run._r, random.Random)
    assert callable(trio.testing.MockClock._autojump)
    seen = []

    async def main():
        runner = trio_run.GLOBAL_RUN_CONTEXT.runner
        seen.append(runner.clock_autojump_threshold)
        assert isinstance(runner.runq, deque)
        with trio.CancelScope(deadline=7.5):
            assert runner.deadlines.next_deadline() == 7.5
            await trio.lowlevel.checkpoint()
        assert trio_run.GLOBAL_RUN_CONTEXT.task is trio.lowlevel.current_task()

    trio.run(main, clock=VirtualTime().clock)
    assert seen == [0.0]


async def order_of_turns(tasks=8, turns=20):
    order = []

    async def take_turns(name):
        for _ in range(turns):
            order.append(name)
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        for name in range(tasks):
            nursery.start_soon(take_turns, name)
    return order


def test_the_schedule_follows_the_seed():
    first, again, other = (clock.run(order_of_turns, seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert sorted(first) == sorted(other)


def test_the_switches_are_put_back():
    before = trio_run._r, trio_run._ALLOW_DETERMINISTIC_SCHEDULING
    with pytest.raises(RuntimeError, match="boom"), clock.replayable(1):
        raise RuntimeError("boom")
    assert (trio_run._r, trio_run._ALLOW_DETERMINISTIC_SCHEDULING) == before


def play(main, seed=0):
    """Run `main(timeline)` in virtual time with a timeline playing."""

    async def outer():
        async with trio.open_nursery() as nursery:
            timeline = Timeline()
            await nursery.start(timeline.run)
            result = await main(timeline)
            nursery.cancel_scope.cancel()
            return result

    return clock.run(outer, seed)


def test_a_day_passes_in_no_time():
    async def main(timeline):
        await trio.sleep(86_400)
        return trio.current_time()

    before = time.monotonic()
    assert play(main) == 86_400.0
    assert time.monotonic() - before < 5


def test_callbacks_and_sleeping_tasks_take_their_turns_by_time():
    async def main(timeline):
        log = []

        def note(name):
            log.append((trio.current_time(), name))

        async def sleeper(seconds):
            await trio.sleep(seconds)
            note("task")

        for when in (3.0, 1.0, 1.0, 2.5):
            timeline.at(when, note, f"callback {len(log)}")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(sleeper, 2.0)
            nursery.start_soon(sleeper, 4.0)
        return [(at, name.split()[0]) for at, name in log], timeline.played

    log, played = play(main)
    assert log == [
        (1.0, "callback"),
        (1.0, "callback"),
        (2.0, "task"),
        (2.5, "callback"),
        (3.0, "callback"),
        (4.0, "task"),
    ]
    assert played == 4


def test_callbacks_of_one_moment_run_in_the_order_they_were_added():
    async def main(timeline):
        log = []
        for number in range(100):
            timeline.at(1.0, log.append, number)
        await trio.sleep(2)
        return log

    assert play(main) == list(range(100))


def test_a_callback_in_the_past_runs_now_and_time_does_not_go_back():
    async def main(timeline):
        await trio.sleep(5)
        seen = []
        timeline.at(1.0, lambda: seen.append(trio.current_time()))
        await trio.sleep(1)
        return seen

    assert play(main) == [5.0]


def test_a_callback_runs_inside_a_task():
    """A stream's receiver may ask trio who it is, or set an event."""

    async def main(timeline):
        event = trio.Event()
        tasks = []

        def act():
            tasks.append(trio.lowlevel.current_task().name)
            event.set()

        timeline.after(1.0, act)
        await event.wait()
        return tasks, trio.current_time()

    tasks, now = play(main)
    assert now == 1.0
    assert len(tasks) == 1


def test_what_a_callback_raises_ends_the_run():
    async def main(timeline):
        def act():
            raise ValueError("a bug in the world")

        timeline.at(1.0, act)
        await trio.sleep(10)

    with pytest.raises(ExceptionGroup) as caught:
        play(main)
    assert caught.group_contains(ValueError, match="a bug in the world")


def test_a_world_in_which_nothing_can_happen_says_so(monkeypatch):
    monkeypatch.setattr(clock, "STUCK_AFTER_S", 0.05)

    async def main(timeline):
        await trio.sleep(3)
        await trio.Event().wait()

    with pytest.raises(ExceptionGroup) as caught:
        play(main)
    assert caught.group_contains(WorldStuck, match=r"at 3\.000 s every task waits")


def test_a_program_that_spins_while_time_stands_still_is_named(monkeypatch):
    monkeypatch.setattr(clock, "BUSY_PASSES_MAX", 1000)

    async def spin_for_ever():
        while True:
            await trio.lowlevel.checkpoint()

    async def main(timeline):
        await trio.sleep(2)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(spin_for_ever)
            await trio.sleep(1)

    with pytest.raises(ExceptionGroup) as caught:
        play(main)
    assert caught.group_contains(WorldStuck, match=r"at 2\.000 s time stands still .*spin_for_ever")


def test_much_that_happens_at_one_moment_is_no_spin(monkeypatch):
    monkeypatch.setattr(clock, "BUSY_PASSES_MAX", 1000)
    seen = 0

    async def main(timeline):
        nonlocal seen
        ready = trio.Event()

        async def see_all():
            nonlocal ready, seen
            while seen < 3000:
                await ready.wait()
                ready = trio.Event()
                seen += 1

        async with trio.open_nursery() as nursery:
            nursery.start_soon(see_all)
            for _ in range(3000):
                timeline.at(2.0, lambda: ready.set())

    play(main)
    assert seen == 3000


def test_a_thread_can_still_wake_a_task(monkeypatch):
    monkeypatch.setattr(clock, "STUCK_AFTER_S", 30.0)

    async def main(timeline):
        release = threading.Timer(0.1, lambda: None)
        release.start()
        return await trio.to_thread.run_sync(release.join)

    assert play(main) is None


async def test_the_timeline_plays_under_any_clock(autojump_clock):
    log = []
    async with trio.open_nursery() as nursery:
        timeline = Timeline()
        await nursery.start(timeline.run)
        timeline.at(trio.current_time() + 5, log.append, "later")
        timeline.after(1, log.append, "soon")
        await trio.sleep(2)
        assert log == ["soon"]
        await trio.sleep(4)
        assert log == ["soon", "later"]
        nursery.cancel_scope.cancel()


def test_two_worlds_in_one_run_are_refused():
    async def main(timeline):
        with pytest.raises(RuntimeError, match="one world"):
            await Timeline().run()

    play(main)
