"""Virtual time, and a schedule that replays.

A simulated run has one `VirtualTime` and one `Timeline`. The timeline holds what the world will do (bytes
arrive, a link heals) as plain callbacks; tasks hold what nodes do. When every task waits, trio asks the clock
to jump: it moves to whichever comes first, the next callback or the next deadline of a task, and runs
callbacks until one of them wakes a task. So a callback costs a heap operation, not a task switch, and a day
passes as fast as its events can be played.

Under any other clock (trio's own, or pytest-trio's `autojump_clock`) the timeline is played by a sleeping
task: slower, same world.

To replay a run from its seed, trio must schedule the same way each time. It has two private switches for
that, and the jump is private too. This module is the only place that touches them; tests/simnet/test_clock.py
fails loudly when a new trio moves them.
"""

from __future__ import annotations

import heapq
import random
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import outcome
import trio
import trio.testing
from trio._core import _run as trio_run

T = TypeVar("T")

STUCK_AFTER_S = 5.0
"""Real seconds in which nothing at all can happen before the run is declared stuck."""

INFINITY = float("inf")


BUSY_PASSES_MAX = 200_000
"""Passes of trio's loop in which tasks run and time stands still before that is declared a busy loop..."""
PLAYED_SHARE = 50
"""...of which those in which the world did something count for so much less: much may happen at one moment,
as when a third of 5 000 nodes fall silent."""


class WorldStuck(Exception):
    """The simulated program is deadlocked (nothing will ever happen) or spins (time will never pass)."""


class Timeline:
    """What the simulated world will do and when. Callbacks at one moment run in the order they were added."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Callable[..., object], tuple[Any, ...]]] = []
        self._count = 0
        self._sleep: trio.CancelScope | None = None
        self.played = 0

    def at(self, when: float, act: Callable[..., object], *args: Any) -> None:
        """Call `act(*args)` at trio time `when`, or as soon as possible where that is past."""
        self._count += 1
        heapq.heappush(self._heap, (when, self._count, act, args))
        if self._sleep is not None and when < self._sleep.deadline:
            self._sleep.deadline = when

    def after(self, seconds: float, act: Callable[..., object], *args: Any) -> None:
        """Call `act(*args)` that much later."""
        self.at(trio.current_time() + seconds, act, *args)

    @property
    def next_at(self) -> float:
        """When the next callback is due, infinity when there is none."""
        return self._heap[0][0] if self._heap else INFINITY

    def play_next(self) -> None:
        """Run the earliest callback."""
        _, _, act, args = heapq.heappop(self._heap)
        self.played += 1
        act(*args)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Play the timeline until cancelled."""
        virtual = VirtualTime.of_this_run()
        if virtual is not None:
            with virtual.play(self):
                task_status.started()
                await trio.sleep_forever()
        task_status.started()
        while True:
            while self.next_at <= trio.current_time():
                self.play_next()
            with trio.CancelScope(deadline=self.next_at) as self._sleep:
                await trio.sleep_forever()
            self._sleep = None


class VirtualTime(trio.abc.Instrument):
    """Time that stands still while anything runs and then jumps to the next thing that happens.

    `clock` goes to `trio.run(..., clock=...)`. It is trio's MockClock (trio lets no other class jump) with
    its reading and its jump replaced.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.clock = trio.testing.MockClock(autojump_threshold=0.0)
        replaced: Any = self.clock
        replaced.virtual_time = self
        replaced.current_time = lambda: self.now
        replaced._autojump = self._jump
        self._timeline: Timeline | None = None
        self._player: Any = None
        self._idle_since: float | None = None
        self._passes = 0
        self._passes_at = 0.0
        self._played = 0

    @staticmethod
    def of_this_run() -> VirtualTime | None:
        """The virtual time of the running trio loop, None when it runs on another clock."""
        return getattr(trio.lowlevel.current_clock(), "virtual_time", None)

    @contextmanager
    def play(self, timeline: Timeline) -> Iterator[None]:
        """Jump along the `timeline` of the calling task."""
        if self._timeline is not None:
            raise RuntimeError("this run plays a timeline already; a run has one world")
        self._timeline = timeline
        self._player = trio.lowlevel.current_task()
        try:
            yield
        finally:
            self._timeline = self._player = None

    def _jump(self) -> None:
        """Called by trio when no task can run: play the timeline until one can."""
        runner = trio_run.GLOBAL_RUN_CONTEXT.runner
        timeline = self._timeline
        if timeline is None:
            self._pass_to(runner.deadlines.next_deadline())
            return
        # Callbacks may be application code (a stream's receiver), which expects to be inside some task.
        trio_run.GLOBAL_RUN_CONTEXT.task = self._player
        try:
            while not runner.runq:
                deadline = runner.deadlines.next_deadline()
                due = timeline.next_at
                if due > deadline or due == INFINITY:
                    self._pass_to(deadline)
                    return
                self.now = max(self.now, due)
                self._idle_since = None
                timeline.play_next()
        except Exception as error:  # boundary: it must end the program that is simulated, not trio
            self._fail(error)
        finally:
            del trio_run.GLOBAL_RUN_CONTEXT.task

    def after_io_wait(self, timeout: float) -> None:
        """Called by trio once per pass of its loop: notice a program that spins while time stands still."""
        if self.now != self._passes_at:
            self._passes_at, self._passes = self.now, 0
        played = self._timeline.played if self._timeline is not None else 0
        self._passes += PLAYED_SHARE if played == self._played else 1
        self._played = played
        if self._passes > BUSY_PASSES_MAX * PLAYED_SHARE and self._player is not None:
            self._passes = 0
            names = sorted({task.name for task in trio_run.GLOBAL_RUN_CONTEXT.runner.runq})
            text = f"at {self.now:.3f} s time stands still while these tasks spin: {', '.join(names)}"
            self._fail(WorldStuck(text))

    def _fail(self, error: Exception) -> None:
        """Raise `error` in the task that plays the timeline, and so in the program that opened the world."""
        if self._player is not None and self._player._next_send_fn is None:
            trio.lowlevel.reschedule(self._player, outcome.Error(error))

    def _pass_to(self, deadline: float) -> None:
        """Move to a deadline; where there is none the world is stuck, unless a thread wakes a task soon."""
        if deadline != INFINITY:
            self.now = max(self.now, deadline)
            self._idle_since = None
            return
        now = time.monotonic()
        if self._idle_since is None:
            self._idle_since = now
        elif now - self._idle_since > STUCK_AFTER_S and self._player is not None:
            self._idle_since = None
            text = f"at {self.now:.3f} s every task waits and nothing will ever happen: a deadlock"
            self._fail(WorldStuck(text))
            return
        time.sleep(0.001)


@contextmanager
def replayable(seed: int) -> Iterator[None]:
    """Make every trio run inside schedule its tasks by `seed` alone."""
    private: Any = trio_run
    before = (private._ALLOW_DETERMINISTIC_SCHEDULING, private._r)
    private._ALLOW_DETERMINISTIC_SCHEDULING = True
    private._r = random.Random(seed)
    try:
        yield
    finally:
        private._ALLOW_DETERMINISTIC_SCHEDULING, private._r = before


def run(main: Callable[[], Awaitable[T]], seed: int) -> T:
    """`trio.run(main)` in virtual time, scheduled by `seed`: the same seed gives the same run."""
    with replayable(seed):
        virtual = VirtualTime()
        return trio.run(main, clock=virtual.clock, instruments=[virtual], strict_exception_groups=True)
