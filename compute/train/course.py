"""A course of DiLoCo in a daemon: inner steps by a trainer process, borders by the group.

What `mycel.compute.train.diloco` is for a script's own loop, this is for jobs: the same borders
(`mycel.compute.train.border`), with whoever takes the inner steps behind `Worker`. Inner steps are asked for
some at a time, so that a peer that is awaited at the border goes there soon.

With overlap a peer does not wait for the sum it gave its row to: it takes the next inner steps meanwhile, and
at the next border first applies that sum, then is brought to the others' state, then begins the next one. So
no sum is under way while newcomers are let in, and whoever comes in has all that was summed up so far. A
newcomer begins with a row of no steps, since whoever is in must be in every sum. The sum of the last border
is waited for without taking further steps, so that all steps count.

A peer that was left out takes over the others' state and goes on; what it did since the last border is lost.
After the last border the members stay (`stay`), so that whoever comes late gets the end's state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NoReturn, Protocol

import numpy as np
import trio
from numpy.typing import NDArray

from mycel.compute.collective.outcome import Fenced, Outcome
from mycel.compute.collective.service import Group
from mycel.compute.collective.state import BORDER_TAG, SharedState, Synced
from mycel.compute.train.border import TAG, Border, OuterStep
from mycel.compute.train.outer import Flat
from mycel.protocol.errors import MycelError

FIGURES_TAG = "diloco/figures"
CHUNKS = 5
"""Inner steps of a border are asked of the worker in so many pieces."""
STAY_S = 2.0
"""Between two borders after the last one: who comes late waits that long."""


class Worker(Protocol):
    """Whoever takes inner steps."""

    async def __call__(self, weights: Flat, steps: int, done: int) -> tuple[Flat, float]:
        """Take `steps` inner steps from `weights`, shape [count], after `done` earlier ones; (where they
        ended, the mean loss)."""


@dataclass(frozen=True, slots=True)
class Passed:
    """A border that was passed."""

    step: OuterStep
    loss: float
    """Mean over all peers' inner steps since the border before; NaN where nobody took one."""
    members: int
    """Peers in the group now."""


@dataclass(slots=True)
class _Sum:
    """What this peer gives to a border, and what comes back."""

    row: Flat
    figures: NDArray[np.float64]
    """(Loss times steps, steps)."""
    steps: int
    """Inner steps of this peer in it."""
    begun_at: Flat | None
    """The shared weights when it was begun, None where they do not move meanwhile."""
    over: trio.Event = field(default_factory=trio.Event)
    outcome: Outcome | None = None
    failure: MycelError | None = None

    async def carry_out(self, group: Group, codec: str | None) -> None:
        """Have both summed up; never raises what the group does, `result` does."""
        try:
            outcome = await group.all_reduce(self.row, op="sum", tag=TAG, codec=codec)
            await group.all_reduce(self.figures, op="sum", tag=FIGURES_TAG)
            self.outcome = outcome
        except Fenced:
            pass
        except MycelError as error:
            self.failure = error
        finally:
            self.over.set()

    async def result(self) -> Outcome | None:
        """How it went, None for a peer that was left out. Raises `OperationRefused`, `GroupClosed`."""
        await self.over.wait()
        if self.failure is not None:
            raise self.failure
        return self.outcome


async def run_course(
    group: Group,
    state: SharedState,
    border: Border,
    work: Worker,
    until: int,
    on_border: Callable[[Passed], None],
) -> None:
    """Take part until the shared weights have taken `until` outer steps.

    Raises `OperationRefused` where members do not fit together, `StateLost`, and what `work` raises.
    """
    course = _Course(group, state, border, work, until, on_border)
    if not border.options.overlap:
        await course.run()
        return
    failure: Exception | None = None
    async with trio.open_nursery() as nursery:
        try:
            await course.run_ahead(nursery)
        except Exception as error:  # boundary: the caller's own; a nursery would wrap it into a group
            failure = error
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


async def stay(state: SharedState, border: Border) -> NoReturn:
    """After the last border, until cancelled: let in who comes late. Raises as `SharedState.sync`."""
    while True:
        await trio.sleep(STAY_S)
        await _agree(state, border)


@dataclass(slots=True)
class _Course:
    """One peer's part."""

    group: Group
    state: SharedState
    border: Border
    work: Worker
    until: int
    on_border: Callable[[Passed], None]

    async def run(self) -> None:
        """Wait for each sum at its border."""
        await _agree(self.state, self.border)
        while self.border.steps < self.until:
            way, taken, loss = await self._inner_steps(self.border.steps)
            given = self._pack(way, taken, loss)
            await given.carry_out(self.group, self.border.options.codec)
            step = await self._apply(given)
            synced = await _agree(self.state, self.border)
            self._tell(given, step, synced)

    async def run_ahead(self, nursery: trio.Nursery) -> None:
        """Overlap: apply each sum one border late; `nursery` runs it meanwhile."""
        border = self.border
        nothing = np.zeros_like(border.weights)
        await _agree(self.state, border)
        late = self._pack(nothing, 0, 0.0)
        nursery.start_soon(late.carry_out, self.group, border.options.codec)
        while border.steps < self.until:
            begun = border.steps + (late.steps > 0)  # borders behind, or under way
            way, taken, loss = nothing, 0, 0.0
            if begun < self.until:
                way, taken, loss = await self._inner_steps(begun)
            step = await self._apply(late)
            synced = await _agree(self.state, border)
            self._tell(late, step, synced)
            if border.steps >= self.until:
                return
            if not synced.replaced and taken:
                border.go_ahead(way)
            late = self._pack(way, taken, loss)
            nursery.start_soon(late.carry_out, self.group, border.options.codec)

    async def _inner_steps(self, begun: int) -> tuple[Flat, int, float]:
        """(The way this peer went, steps it took, their mean loss); `begun`: borders before these steps."""
        border, every = self.border, self.border.options.every
        awaited = BORDER_TAG if border.options.overlap else TAG
        arrived, taken, total = border.start, 0, 0.0
        while taken < every and not (taken and border.options.early and self.group.is_awaited(awaited)):
            steps = min(max(1, every // CHUNKS), every - taken)
            arrived, loss = await self.work(arrived, steps, begun * every + taken)
            taken += steps
            total += loss * steps
        return border.way_to(arrived), taken, total / taken

    def _pack(self, way: Flat, taken: int, loss: float) -> _Sum:
        figures = np.array([loss * taken, taken], np.float64)
        begun_at = self.border.weights.copy() if self.border.options.overlap else None
        return _Sum(self.border.pack(way, taken), figures, taken, begun_at)

    async def _apply(self, given: _Sum) -> OuterStep | None:
        """The outer step of a sum; None where this peer was left out, or nobody took a step."""
        outcome = await given.result()
        if outcome is None:
            return None
        before = self.border.steps
        step = self.border.apply(given.row, len(outcome.contributors), given.begun_at)
        return step if self.border.steps > before else None

    def _tell(self, given: _Sum, step: OuterStep | None, synced: Synced) -> None:
        if step is not None:
            mean = float(given.figures[0] / given.figures[1]) if given.figures[1] else float("nan")
            self.on_border(Passed(step, mean, len(synced.members)))


async def _agree(state: SharedState, border: Border) -> Synced:
    """Be at a border until the state is the group's."""
    synced = await state.agree(border.state())
    border.begin_again()
    return synced
