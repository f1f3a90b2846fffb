"""A trainer in this process: for tests and simnet, where computing takes virtual time.

Applications are the caller's own objects, or built in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import trio

from mycel.compute.engine import EngineLost
from mycel.compute.train.trade import Begun, Source, StartAsk, WorkAsk, WorkDone
from mycel.compute.train.workshop import Workshop
from mycel.protocol.errors import MycelError

Result = TypeVar("Result")


class InlineTrainer:
    """A workshop of this process. `cost` says how many seconds of trio's clock a piece of work takes."""

    def __init__(self, workshop: Workshop, cost: Callable[[WorkAsk], float] = lambda ask: 0.0) -> None:
        self._workshop = workshop
        self._cost = cost
        self._turn = trio.Lock()
        self._broken = trio.Event()
        self._why = ""

    async def open(self, source: Source) -> None:
        await self._do(lambda: self._workshop.open(source), 0.0)

    async def start(self, ask: StartAsk) -> Begun:
        return await self._do(lambda: self._workshop.start(ask), 0.0)

    async def work(self, ask: WorkAsk, limit_s: float) -> WorkDone:
        seconds = self._cost(ask)
        if seconds > limit_s:
            await trio.sleep(limit_s)
            self.break_down(f"it did not answer work within {limit_s:g} s")
        return await self._do(lambda: self._workshop.work(ask), seconds)

    async def wait_lost(self) -> EngineLost:
        await self._broken.wait()
        return EngineLost(self._why)

    def break_down(self, why: str) -> None:
        """Be as a process that died."""
        self._why = self._why or why
        self._broken.set()

    async def aclose(self) -> None:
        self.break_down("it was closed")
        await trio.lowlevel.checkpoint()

    async def _do(self, what: Callable[[], Result], seconds: float) -> Result:
        async with self._turn:
            with trio.move_on_after(seconds):
                await self._broken.wait()
            if self._broken.is_set():
                raise EngineLost(self._why)
            try:
                return what()
            except MycelError as error:
                raise ValueError(str(error)) from error
