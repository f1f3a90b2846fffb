"""A course of DiLoCo in a daemon: inner steps by a trainer process, borders by the group.

What `mycel.compute.train.diloco` is for a script's own loop, this is for jobs: the same borders
(`mycel.compute.train.border`), with whoever takes the inner steps behind `Worker`. Inner steps are asked for
some at a time, so that a peer that is awaited at the border goes there soon.

A peer that was left out takes over the others' state and goes on; what it did since the last border is lost.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from mycel.compute.collective.outcome import Fenced
from mycel.compute.collective.service import Group
from mycel.compute.collective.state import SharedState
from mycel.compute.train.border import TAG, Border, OuterStep
from mycel.compute.train.outer import Flat

FIGURES_TAG = "diloco/figures"
CHUNKS = 5
"""Inner steps of a border are asked of the worker in so many pieces."""


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
    await _agree(state, border)
    while border.steps < until:
        arrived, taken, loss = await _inner_steps(group, border, work)
        row = border.pack(border.way_to(arrived), taken)
        figures = np.array([loss * taken, taken], np.float64)
        try:
            outcome = await group.all_reduce(row, op="sum", tag=TAG, codec=border.options.codec)
            await group.all_reduce(figures, op="sum", tag=FIGURES_TAG)
        except Fenced:
            await _agree(state, border)
            continue
        step = border.apply(row, len(outcome.contributors))
        members = await _agree(state, border)
        mean = float(figures[0] / figures[1]) if figures[1] else float("nan")
        on_border(Passed(step, mean, members))


async def _inner_steps(group: Group, border: Border, work: Worker) -> tuple[Flat, int, float]:
    """(Where this peer arrived, steps it took, their mean loss)."""
    every = border.options.every
    arrived, taken, total = border.start, 0, 0.0
    while taken < every and not (taken and border.options.early and group.is_awaited(TAG)):
        steps = min(max(1, every // CHUNKS), every - taken)
        arrived, loss = await work(arrived, steps, border.steps * every + taken)
        taken += steps
        total += loss * steps
    return arrived, taken, total / taken


async def _agree(state: SharedState, border: Border) -> int:
    """Be at a border until the state is the group's; its members then."""
    while True:
        try:
            synced = await state.sync(border.state())
        except Fenced:  # it comes in again by itself, at the others' next border
            continue
        border.begin_again()
        return len(synced.members)
