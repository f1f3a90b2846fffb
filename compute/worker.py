"""The daemon's side of a worker: an `Engine` whose torch runs in a process of its own
(`mycel.compute.child`).

Calls take turns, a cancelled one loses nothing, and a worker that dies, speaks nonsense or does not answer is
an `EngineLost` with its last words.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mycel.compute.child import Child
from mycel.compute.engine import (
    Done,
    EngineStats,
    ModelCard,
    StageInfo,
    StageSpec,
    Work,
)
from mycel.compute.pipe import (
    DESCRIBE,
    FORGET,
    LOAD,
    REWIND,
    STATS,
    STEP,
    TOKENIZER_FILES,
    Nothing,
    Rewind,
)
from mycel.compute.process import WorkerOptions, start_process


class WorkerEngine(Child):
    """An `Engine` in a process of its own. Made by `start_worker`; `aclose` ends the process."""

    async def describe(self, model: str) -> ModelCard:
        return await self.ask(DESCRIBE, model, limit_s=float("inf"))

    async def tokenizer_files(self, model: str) -> dict[str, bytes]:
        return await self.ask(TOKENIZER_FILES, model, limit_s=float("inf"))

    async def load(self, spec: StageSpec, progress: Callable[[float, str], None] | None = None) -> StageInfo:
        return await self.ask(LOAD, spec, limit_s=float("inf"), progress=progress)

    async def step(self, works: Sequence[Work]) -> list[Done]:
        return await self.ask(STEP, list(works))

    async def rewind(self, session: str, position: int) -> None:
        await self.ask(REWIND, Rewind(session, position))

    async def forget(self, session: str) -> None:
        await self.ask(FORGET, session)

    async def stats(self) -> EngineStats:
        return await self.ask(STATS, Nothing())


def start_worker(options: WorkerOptions | None = None) -> WorkerEngine:
    """Start a worker process and return at once: its imports (2-4 s) go on while others work.

    Must be called in the thread that runs trio; the worker dies with that thread. Raises `OSError` when no
    process can be started.
    """
    options = options or WorkerOptions()
    return WorkerEngine(start_process(options), options)
