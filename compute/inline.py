"""An `Engine` in this process: for tests and simnet. Torch runs in the caller's task and blocks it.

In simnet, where time is virtual, computing takes no time of its own: `cost` says how long a step should
take, and that long the caller sleeps after it. Torch is held to one thread, so that the same seed gives the
same bits whatever else the machine does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import msgspec
import trio

from mycel.compute.engine import (
    Done,
    EngineLost,
    EngineStats,
    ModelCard,
    ModelUnsupported,
    StageInfo,
    StageSpec,
    Work,
)
from mycel.compute.model.card import read_card
from mycel.compute.model.load import load_stage
from mycel.compute.model.memory import is_out_of_memory
from mycel.compute.model.stage import Stage
from mycel.compute.model.tokenizer_files import read_tokenizer_files
from mycel.protocol.errors import LocalProtocolError

T = TypeVar("T")


class InlineEngine:
    """At most one stage, in this process."""

    def __init__(
        self,
        *,
        cost: Callable[[Sequence[Work]], float] | None = None,
        load_s: float = 0.0,
        threads: int = 1,
    ) -> None:
        """`cost`: seconds that a step takes; `load_s`: seconds that loading takes; both on trio's clock."""
        self._cost = cost
        self._load_s = load_s
        self._threads = threads
        self._stage: Stage | None = None
        self._turn = trio.Lock()
        self._broken = trio.Event()
        self._why = ""

    async def describe(self, model: str) -> ModelCard:
        return await self._do(lambda: read_card(model))

    async def tokenizer_files(self, model: str) -> dict[str, bytes]:
        return await self._do(lambda: read_tokenizer_files(model))

    async def load(self, spec: StageSpec, progress: Callable[[float, str], None] | None = None) -> StageInfo:
        def load() -> StageInfo:
            self._close()
            own = msgspec.structs.replace(spec, threads=self._threads)
            try:
                self._stage = load_stage(own, progress)
            except ValueError as error:  # a span, dtype or device that is not to be had
                raise ModelUnsupported(str(error)) from error
            return self._stage.info

        return await self._do(load, self._load_s)

    async def step(self, works: Sequence[Work]) -> list[Done]:
        return await self._do(lambda: self._loaded.step(works), self._cost(works) if self._cost else 0.0)

    async def rewind(self, session: str, position: int) -> None:
        await self._do(lambda: self._loaded.rewind(session, position))

    async def forget(self, session: str) -> None:
        await self._do(lambda: None if self._stage is None else self._stage.forget(session))

    async def stats(self) -> EngineStats:
        return await self._do(
            lambda: EngineStats(0, 0, 0, 0, 0, 0.0) if self._stage is None else self._stage.stats()
        )

    async def wait_lost(self) -> EngineLost:
        await self._broken.wait()
        return EngineLost(self._why)

    def break_down(self, why: str) -> None:
        """Be as a worker that died: simulation's way to lose an engine. Calls in progress fail too."""
        if not self._broken.is_set():
            self._why = why
            self._close()
            self._broken.set()

    async def aclose(self) -> None:
        if not self._broken.is_set():
            self.break_down("it was closed")
        await trio.lowlevel.checkpoint()

    def _close(self) -> None:
        if self._stage is not None:
            self._stage.close()
            self._stage = None

    @property
    def _loaded(self) -> Stage:
        if self._stage is None:
            raise LocalProtocolError("no stage is loaded; call load first")
        return self._stage

    async def _do(self, what: Callable[[], T], seconds: float = 0.0) -> T:
        async with self._turn:
            if self._broken.is_set():
                raise EngineLost(self._why)
            try:
                result = what()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self.break_down(f"out of memory: {error}")
                raise EngineLost(self._why) from error
            with trio.move_on_after(seconds):
                await self._broken.wait()
            if self._broken.is_set():
                raise EngineLost(self._why)
            return result
