"""Trainers beside the daemon: a long-lived process with the model's code and data cached, and how it is kept.

The process is started by the first work that needs it and lives from round to round: what costs seconds
(importing torch, reading data, building the model) is paid once. All built-in applications share one; each
bundle has one of its own, which ends with its job. A trainer that dies fails the work it was at, with its
last words, and the next work starts another, after a pause that grows.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TypeVar

import trio

from mycel.compute.child import Child
from mycel.compute.engine import EngineLost
from mycel.compute.process import WorkerOptions, start_process
from mycel.compute.supervise import RestartPolicy, plan_restart
from mycel.compute.train.trade import OPEN, START, WORK, Begun, Source, StartAsk, Trainer, WorkAsk, WorkDone

Result = TypeVar("Result")

SERVE = "mycel.compute.train.trainer_serve"
KEPT_MAX = 3
"""Trainer processes at once: the built-in applications', and two jobs' own."""


class ProcessTrainer(Child):
    """A `Trainer` in a process of its own. Made by `start_trainer`."""

    async def open(self, source: Source) -> None:
        await self.ask(OPEN, source)

    async def start(self, ask: StartAsk) -> Begun:
        return await self.ask(START, ask, limit_s=float("inf"))

    async def work(self, ask: WorkAsk, limit_s: float) -> WorkDone:
        return await self.ask(WORK, ask, limit_s=limit_s)


def start_trainer(options: WorkerOptions | None = None) -> ProcessTrainer:
    """Start a trainer process and return at once. `options.serve` must be `SERVE`. Raises `OSError`."""
    options = options or WorkerOptions(serve=SERVE)
    return ProcessTrainer(start_process(options), options)


@dataclass(slots=True)
class _Kept:
    """A running trainer."""

    trainer: Trainer
    opened: dict[str, None] = field(default_factory=dict)  # applications by name
    users: int = 0


class Trainers:
    """A node's trainers, by what they run."""

    def __init__(self, start: Callable[[], Trainer], policy: RestartPolicy | None = None) -> None:
        """`start` starts a trainer and returns at once."""
        self._start = start
        self._policy = policy or RestartPolicy()
        self._kept: dict[str, _Kept] = {}  # by `Source.key`, the one used last at the end
        self._losses: dict[str, list[float]] = {}

    async def start_model(self, source: Source, ask: StartAsk) -> Begun:
        """The first model of a job. Raises `ValueError`, `EngineLost`."""
        return await self._use(source, lambda trainer: trainer.start(ask))

    async def work(self, source: Source, ask: WorkAsk, limit_s: float) -> WorkDone:
        """Train or judge. Raises `ValueError` for the application's own failures, `EngineLost`."""
        return await self._use(source, lambda trainer: trainer.work(ask, limit_s))

    async def drop(self, source: Source) -> None:
        """End the process of a bundle whose job is over; the built-in applications' stays."""
        if source.is_bundle:
            await self._end(source.key)

    async def aclose(self) -> None:
        """End all."""
        for key in list(self._kept):
            await self._end(key)

    async def _use(self, source: Source, do: Callable[[Trainer], Awaitable[Result]]) -> Result:
        kept = await self._keep(source.key)
        kept.users += 1
        try:
            if source.name not in kept.opened:
                await kept.trainer.open(source)
                kept.opened[source.name] = None
            return await do(kept.trainer)
        except EngineLost:
            if self._kept.get(source.key) is kept:
                self._losses.setdefault(source.key, []).append(trio.current_time())
                await self._end(source.key)
            raise
        finally:
            kept.users -= 1

    async def _keep(self, key: str) -> _Kept:
        """The trainer for `key`, started where there is none. Raises `EngineLost` while it must rest."""
        kept = self._kept.pop(key, None)
        if kept is None:
            idle = [other for other, one in self._kept.items() if not one.users]
            if len(self._kept) >= KEPT_MAX and idle:
                await self._end(idle[0])
            self._check_rest(key)
            try:
                kept = _Kept(self._start())
            except OSError as error:
                raise EngineLost(f"no trainer process could be started: {error}") from error
        self._kept[key] = kept
        return kept

    def _check_rest(self, key: str) -> None:
        losses = self._losses.get(key)
        if not losses:
            return
        now = trio.current_time()
        pause = plan_restart(self._policy, losses, losses[-1])
        if pause is None:
            raise EngineLost(f"its trainer died {len(losses)} times: look at the reason first")
        if now < losses[-1] + pause:
            raise EngineLost(f"its trainer died, and is started again in {losses[-1] + pause - now:.1f} s")

    async def _end(self, key: str) -> None:
        kept = self._kept.pop(key, None)
        if kept is not None:
            await kept.trainer.aclose()
