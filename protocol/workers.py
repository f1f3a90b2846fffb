"""Tasks that serve one job after another, because starting a task costs more than waking one.

A job that is cancelled takes its worker with it; any other leaves it free for the next.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from typing import Any, Protocol

import trio

IDLE_MAX = 64
"""Workers kept for the next job: a burst's beyond these end with their job."""


class Job(Protocol):
    """What a worker does."""

    deadline: float

    async def run(self) -> None:
        """Do it. Raises nothing but `trio.Cancelled`."""

    def on_cancelled(self) -> None:
        """`run` was cancelled, by `Worker.cancel` or at the deadline."""


class Worker:
    """One task and the scope it runs in."""

    __slots__ = ("_idle", "job", "scope", "task")

    def __init__(self, job: Job, idle: list[Worker]) -> None:
        self._idle = idle
        self.job: Job | None = job
        self.scope = trio.CancelScope(deadline=job.deadline)
        self.task: trio.lowlevel.Task | None = None

    def cancel(self, job: Job) -> None:
        """Cancel `job`; nothing happens where it is over."""
        if self.job is job:
            self.scope.cancel()

    async def serve(self) -> None:
        """Do the job, and those that come after."""
        idle = self._idle
        self.task = trio.lowlevel.current_task()
        with self.scope:
            while self.job is not None:
                await self.job.run()
                self.job = None
                if len(idle) >= IDLE_MAX:
                    return
                idle.append(self)
                await trio.lowlevel.wait_task_rescheduled(self._abort)
        if self.job is not None:
            self.job.on_cancelled()

    def _abort(self, _: object) -> trio.lowlevel.Abort:
        if self in self._idle:
            self._idle.remove(self)
        return trio.lowlevel.Abort.SUCCEEDED


class Workers:
    """A pool of them."""

    def __init__(self, spawn: Callable[..., Any]) -> None:
        """`spawn` starts a task that outlives the jobs."""
        self._spawn = spawn
        self._idle: list[Worker] = []
        self._context = contextvars.copy_context()

    def start(self, job: Job) -> Worker:
        """Do `job` in a task of its own, in a fresh context and a cancel scope with its deadline."""
        while self._idle:  # none of them is cancelled: a cancelled one has left at once
            worker = self._idle.pop()
            if worker.task is None:
                continue
            worker.job = job
            worker.scope.deadline = job.deadline
            worker.task.context = self._context.copy()
            trio.lowlevel.reschedule(worker.task)
            return worker
        worker = Worker(job, self._idle)
        self._spawn(worker.serve)
        return worker
