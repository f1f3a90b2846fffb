"""Keeping an engine alive: a lost worker is started again and its stage loaded again, within bounds.

`Supervisor` is itself an `Engine`. While its worker is down, every call raises `EngineLost` at once: sessions
move to other peers instead of waiting here. What happens is reported as it happens (`Lost`, `Loading`,
`Ready`), so that whoever publishes this stage can withdraw it and offer it again. Each restart waits longer
than the one before; too many within a while end the tries, because what kills a worker five times (a model
that does not fit) kills it again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import trio

from mycel.compute.engine import (
    Done,
    Engine,
    EngineLost,
    EngineStats,
    ModelCard,
    ModelUnsupported,
    StageInfo,
    StageSpec,
    Work,
)


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """How often, and how fast, a worker is started again."""

    delays_s: tuple[float, ...] = (0.0, 1.0, 5.0, 20.0, 60.0)
    """Pause before the first restart, the second, ...; after the last there is none."""
    window_s: float = 900.0
    """A loss longer ago than this is forgotten."""


@dataclass(frozen=True, slots=True)
class Lost:
    """The worker died; a new one starts in `retry_s` seconds, or never (None)."""

    why: str
    retry_s: float | None


@dataclass(frozen=True, slots=True)
class Loading:
    """The stage is being loaded again."""

    fraction: float
    what: str


@dataclass(frozen=True, slots=True)
class Ready:
    """The stage is loaded again, with no sessions."""

    info: StageInfo


EngineEvent = Lost | Loading | Ready


def plan_restart(policy: RestartPolicy, losses: Sequence[float], now: float) -> float | None:
    """Seconds to wait before the next start, given the times of all losses (the last one is now's).

    None: no more starts.
    """
    recent = sum(1 for loss in losses if now - loss < policy.window_s)
    return policy.delays_s[recent - 1] if 0 < recent <= len(policy.delays_s) else None


class Supervisor:
    """An `Engine` over one worker after the other. `run` must be running while it is used."""

    def __init__(
        self,
        start: Callable[[], Engine],
        report: Callable[[EngineEvent], None],
        policy: RestartPolicy | None = None,
    ) -> None:
        """`start` starts a worker and returns at once; `report` is called with each event, in order."""
        self._start = start
        self._report = report
        self._policy = policy or RestartPolicy()
        self._engine: Engine | None = None
        self._spec: StageSpec | None = None
        self._why = "its supervisor is not running"
        self._down = trio.Event()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep a worker running until cancelled; returns when there is no use in starting another."""
        losses: list[float] = []
        task_status.started()
        while True:
            why = await self._run_one()
            losses.append(trio.current_time())
            delay = plan_restart(self._policy, losses, losses[-1])
            if delay is None:
                why += f"; no further start after {len(losses)} losses, look at the reason first"
            self._why = why
            self._report(Lost(why, delay))
            if delay is None:
                return
            await trio.sleep(delay)

    async def _run_one(self) -> str:
        """One worker's life. Returns why it ended."""
        try:
            engine = self._start()
        except OSError as error:
            return f"no worker process could be started: {error}"
        self._engine, self._down = engine, trio.Event()
        try:
            if self._spec is not None:
                self._report(Loading(0.0, "starting the worker again"))
                info = await engine.load(self._spec, lambda done, what: self._report(Loading(done, what)))
                self._report(Ready(info))
            return str(await engine.wait_lost())
        except (EngineLost, ModelUnsupported, OSError) as error:  # reloading failed
            return str(error)
        finally:
            self._engine = None
            self._down.set()
            with trio.CancelScope(shield=True):
                await engine.aclose()

    def _current(self) -> Engine:
        if self._engine is None:
            raise EngineLost(self._why)
        return self._engine

    async def describe(self, model: str) -> ModelCard:
        return await self._current().describe(model)

    async def tokenizer_files(self, model: str) -> dict[str, bytes]:
        return await self._current().tokenizer_files(model)

    async def load(self, spec: StageSpec, progress: Callable[[float, str], None] | None = None) -> StageInfo:
        self._spec = None
        info = await self._current().load(spec, progress)
        self._spec = spec
        return info

    async def step(self, works: Sequence[Work]) -> list[Done]:
        return await self._current().step(works)

    async def rewind(self, session: str, position: int) -> None:
        await self._current().rewind(session, position)

    async def forget(self, session: str) -> None:
        await self._current().forget(session)

    async def stats(self) -> EngineStats:
        return await self._current().stats()

    async def wait_lost(self) -> EngineLost:
        """Park until the worker that runs now dies; returns why."""
        await self._down.wait()
        return EngineLost(self._why)

    async def aclose(self) -> None:
        """End the worker that runs now; cancel `run` first, or it starts another."""
        if self._engine is not None:
            await self._engine.aclose()
