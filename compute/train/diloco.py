"""Training one model on many peers that talk once in many steps, in a training loop of one's own.

`DiLoCo` (Douillard et al. 2023, arXiv 2311.08105): every peer takes `every` inner steps of its own optimizer
on its own data; then the way it went, averaged over all peers, moves the weights that they share.

    diloco = DiLoCo(model, peers, BorderOptions(every=50))
    while diloco.outer_steps < 100:
        loss(model, next(batches)).backward()
        optimizer.step()
        optimizer.zero_grad()
        diloco.step()
    diloco.finish()

The optimizer and its schedule are one's own, set for the batch of one peer: Adam with betas[1] = 0.999 rather
than 0.95 where that is small (docs/architecture.md says what it makes).

Peers come, go and differ in speed: `compute.train.border` says how that is weighed. Whoever is new or missed
a step gets the shared state at a border, and is in every sum that is begun after it.

`diloco.save(path)` keeps what `DiLoCo(..., resume=path)` goes on from, on any number of peers.

`DataParallel` averages gradients at every step instead.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mycel.compute.collective.state import BORDER_TAG
from mycel.compute.train.border import TAG, Border, BorderOptions, OuterStep
from mycel.compute.train.checkpoint import load_checkpoint, write_checkpoint
from mycel.compute.train.flat import FlatModule
from mycel.compute.train.outer import Flat
from mycel.compute.train.peers import LeftOut, Peers, Pending

GRADIENTS_TAG = "gradients"


@dataclass(slots=True)
class _Late:
    """A sum under way."""

    row: Flat
    pending: Pending
    begun_at: Flat
    """The shared weights when it was begun."""


class DiLoCo:
    """One peer's part. Made at the same border as the others', or any time later by a newcomer."""

    def __init__(
        self,
        module: torch.nn.Module,
        peers: Peers,
        options: BorderOptions | None = None,
        *,
        resume: str | Path | None = None,
    ) -> None:
        """Takes the others' weights where there are others: the majority's. Raises as `Peers.sync`.

        `resume`: begin with what `save`, or a train job, wrote there, on however many peers. Raises
        `UsageProblem` for a file that is none or of another module.
        """
        self.options = options or BorderOptions()
        self.peers = peers
        self._flat = FlatModule(module)
        if resume is None:
            self._border = Border(self._flat.read(), self.options)
        else:
            self._border = load_checkpoint(Path(resume)).laid_out(self._flat.layout).border(self.options)
        self._inner = 0
        self._late: _Late | None = None
        self._agree()
        if self.options.overlap:  # nothing to add yet, but whoever is in must be in every sum
            self._begin(self._border.pack(np.zeros(self._flat.count, np.float32), 0))
        self._flat.write(self._border.start)

    @property
    def outer_steps(self) -> int:
        """Outer steps that the shared weights have taken."""
        return self._border.steps

    @property
    def weights(self) -> Flat:
        """The shared weights in one row, in the order of their names; not to be written."""
        return self._border.weights

    def save(self, path: str | Path) -> None:
        """Write the shared weights and the outer momentum as a safetensors file, whole or not at all.

        Inner steps since the last border are not in it, nor is the state of the inner optimizer.
        """
        path = Path(path)
        fresh = path.with_name(f".{path.name}.new")
        fresh.write_bytes(write_checkpoint(self._border, self._flat.layout))
        os.replace(fresh, path)

    def step(self) -> OuterStep | None:
        """After every inner step. What the outer step did where one was due, None otherwise.

        A peer that was left out (too slow, or cut off) takes over the others' state and goes on from there:
        the way it went since is lost. Raises as `Peers.all_reduce` for what cannot be added up.
        """
        self._inner += 1
        awaited = BORDER_TAG if self.options.overlap else TAG  # with overlap, its row is there already
        is_awaited = self.options.early and self.peers.is_awaited(awaited)
        if self._inner < self.options.every and not is_awaited:
            return None
        return self._meet()

    def finish(self) -> OuterStep | None:
        """At the end: apply the sum that is still under way, and have the module hold the shared weights.

        All peers end at the same border, since they see the same `outer_steps`; inner steps taken since are
        dropped.
        """
        last = self._apply_late()
        self._border.begin_again()
        self._flat.write(self._border.start)
        return last

    def _meet(self) -> OuterStep:
        """Send this peer's way and apply the sum that is there: this one, or with overlap the one before."""
        way = self._border.way_to(self._flat.read())
        row = self._border.pack(way, self._inner)
        self._inner = 0
        if self.options.overlap:
            done = self._apply_late()
            if not self._agree():
                self._border.go_ahead(way)
            self._begin(row)
        else:
            done = self._apply_now(row)
            self._agree()
        self._flat.write(self._border.start)
        return done or OuterStep(self.outer_steps, 0, 0.0, 1.0)

    def _apply_now(self, row: Flat) -> OuterStep | None:
        try:
            reduced = self.peers.all_reduce(row, op="sum", tag=TAG, codec=self.options.codec)
        except LeftOut:
            return None
        return self._border.apply(row, reduced.contributors)

    def _begin(self, row: Flat) -> None:
        pending = self.peers.begin_all_reduce(row, op="sum", tag=TAG, codec=self.options.codec)
        self._late = _Late(row, pending, self._border.weights.copy())

    def _apply_late(self) -> OuterStep | None:
        late, self._late = self._late, None
        if late is None:
            return None
        try:
            reduced = late.pending.wait()
        except LeftOut:
            return None
        return self._border.apply(late.row, reduced.contributors, late.begun_at)

    def _agree(self) -> bool:
        """The border: who wants in is let in, who differs gets the others' state; whether this one did."""
        changed = self.peers.sync(self._border.state())
        self._border.begin_again()
        return changed


class DataParallel:
    """Averages gradients over the peers at every step: `average()` between `backward()` and `step()`.

    All peers begin with the majority's weights and take the same steps, so they remain equal as long as their
    optimizers are of one kind and setting. A newcomer would need the optimizers' state: it cannot come later.
    """

    def __init__(self, module: torch.nn.Module, peers: Peers, *, codec: str | None = None) -> None:
        """Raises as `Peers.sync`."""
        self.peers = peers
        self.codec = codec
        self._flat = FlatModule(module)
        weights = self._flat.read()
        peers.sync({"weights": weights})
        self._flat.write(weights)

    def average(self) -> int:
        """Replace the gradients by their average; how many peers are in it. Raises `LeftOut`."""
        row = self._flat.read_gradients()
        reduced = self.peers.all_reduce(row, op="avg", tag=GRADIENTS_TAG, codec=self.codec)
        self._flat.write_gradients(row)
        return reduced.contributors
