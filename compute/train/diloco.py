"""Training one model on many peers that talk once in many steps.

`DiLoCo` (Douillard et al. 2023, arXiv 2311.08105): every peer takes `every` inner steps of its own optimizer
on its own data; then the way it went, averaged over all peers, moves the weights that they share
(`compute.train.outer`).

    diloco = DiLoCo(model, optimizer, peers, every=50)
    for batch in batches:
        loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        diloco.step()
    diloco.finish()

With `overlap` the average is under way while the next inner steps are taken, and is applied one outer step
late. A peer goes on from the shared weights plus its own last way, so that what it just learned is not lost
meanwhile (eager updates, Kale et al. 2025, arXiv 2502.12996). Its next way begins there, so nothing is
counted twice; shared weights and momentum see averages only, and remain the same on all peers.

Peers come, go and differ in speed. Who is slow, or came in the middle, need not take all inner steps: once
others wait, it goes to the border with those it has taken, and counts for as much. Whoever is new or missed a
step gets the shared state at a border; with `overlap` a newcomer does twice, since the average under way was
begun without it.

`DataParallel` averages gradients at every step instead.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from mycel.compute.train.flat import FlatModule
from mycel.compute.train.outer import Flat, Outer, OuterOptions, norm, staleness
from mycel.compute.train.peers import Peers, PeersGone, Pending
from mycel.protocol.errors import LocalProtocolError

TAG = "diloco"
GRADIENTS_TAG = "gradients"
BLOCK = 1024
"""Numbers in the largest block that a codec gives one scale."""


@dataclass(frozen=True, slots=True)
class DiLoCoOptions:
    """How often peers talk, and how."""

    every: int = 50
    """Inner steps between two outer ones (H in the paper)."""
    outer: OuterOptions = field(default_factory=OuterOptions)
    codec: str = "int8"
    """How ways are sent: "int8" or "int4" in blocks with a scale each, "" as float32."""
    overlap: bool = False
    """Go on while the average is under way, and apply it one outer step late."""
    eager: float = 0.5
    """With overlap: the share of its own last way that a peer goes on from, before the average is in."""

    def __post_init__(self) -> None:
        if self.every < 1 or not 0 <= self.eager <= 1:
            raise LocalProtocolError(f"every {self.every} must be 1 or more, eager {self.eager} in [0, 1]")


@dataclass(frozen=True, slots=True)
class OuterStep:
    """What an outer step did."""

    number: int
    """Outer steps that the shared weights have taken."""
    contributors: int
    """Peers in the average that was applied; 0 where overlap has none to apply yet."""
    length: float
    """Of the average way."""
    weight: float
    """What it counted, below 1 where it came too late."""


@dataclass(slots=True)
class _Late:
    """An average under way."""

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
        options: DiLoCoOptions | None = None,
    ) -> None:
        """Takes the others' weights where there are others: the majority's. Raises as `Peers.sync`."""
        self.options = options or DiLoCoOptions()
        self.peers = peers
        self._flat = FlatModule(module)
        self._outer = Outer(self._flat.read(), self.options.outer)
        self._inner = 0
        self._late: _Late | None = None
        self._start: Flat = self._outer.weights
        self._agree()
        self._go_on_from(self._outer.weights.copy())

    @property
    def outer_steps(self) -> int:
        """Outer steps that the shared weights have taken."""
        return self._outer.steps

    def state(self) -> dict[str, Flat]:
        """The shared state: "weights" and "momentum", not copied."""
        return {"weights": self._outer.weights, "momentum": self._outer.momentum}

    def load_state(self, weights: Flat, momentum: Flat, steps: int) -> None:
        """Go on from a checkpoint. All peers do so before their first step, or one does and founds the
        group."""
        self._outer.weights[:], self._outer.momentum[:], self._outer.steps = weights, momentum, steps
        self._go_on_from(self._outer.weights.copy())

    def step(self) -> OuterStep | None:
        """After every inner step. What the outer step did where one was due, None otherwise.

        Raises `PeersGone`; the weights are then this peer's own, and a later `step` tries again.
        """
        self._inner += 1
        if self._inner < self.options.every and not self.peers.is_awaited(TAG):
            return None
        return self._border()

    def finish(self) -> OuterStep | None:
        """After the last inner step: what is left is averaged and applied; the module holds the shared
        weights."""
        last = self._border() if self._inner else None
        if self._late is not None:
            last = self._apply_late()
        self._go_on_from(self._outer.weights.copy())
        return last

    # --- a border

    def _border(self) -> OuterStep:
        """Send this peer's way, and apply the average that is there: its own, or with overlap the one
        before."""
        way = self._start - self._flat.read()
        row = self._pack(way)
        self._inner = 0
        if self.options.overlap:
            done = self._apply_late() or OuterStep(self._outer.steps, 0, 0.0, 1.0)
            self._agree()
            pending = self.peers.begin_all_reduce(row, op="sum", tag=TAG, codec=self.options.codec)
            self._late = _Late(row, pending, self._outer.weights.copy())
            way *= np.float32(-self.options.eager)
            way += self._outer.weights
            self._go_on_from(way)
            return done
        try:
            reduced = self.peers.all_reduce(row, op="sum", tag=TAG, codec=self.options.codec)
        except PeersGone:
            self._inner = self._taken(row)
            raise
        done = self._move(row, reduced.contributors, self._outer.weights)
        self._agree()
        self._go_on_from(self._outer.weights.copy())
        return done

    def _apply_late(self) -> OuterStep | None:
        if self._late is None:
            return None
        late = self._late
        reduced = late.pending.wait()
        self._late = None
        return self._move(late.row, reduced.contributors, late.begun_at)

    def _move(self, row: Flat, contributors: int, begun_at: Flat) -> OuterStep:
        """Apply the summed `row` of ways, which began when the shared weights were `begun_at`."""
        share = self._share(row)
        if not share > 0.0:  # nobody took a step
            return OuterStep(self._outer.steps, contributors, 0.0, 1.0)
        way = row[: self._flat.count]
        way /= np.float32(share)
        length, weight = norm(way), 1.0
        if begun_at is not self._outer.weights:
            weight = staleness(norm(self._outer.weights - begun_at), length, self.options.outer.penalty)
        self._outer.step(way, weight)
        return OuterStep(self._outer.steps, contributors, length, weight)

    def _agree(self) -> None:
        """The border: who wants in is let in, and who differs gets the others' state."""
        steps = np.array([self._outer.steps], np.int64)
        self.peers.sync({**self.state(), "steps": steps}, self._outer.steps)
        self._outer.steps = int(steps[0])

    def _go_on_from(self, start: Flat) -> None:
        self._start = start
        self._flat.write(start)

    # --- the row that is sent: the way, and behind it, in a block of its own, how many steps it took

    def _pack(self, way: Flat) -> Flat:
        """The way times the share of its steps, then zeros to a block's end, then the share.

        A block with one number in it survives any quantization to a relative error of float32's own size.
        """
        share = np.float32(self._inner / self.options.every)
        blocks = -(-len(way) // BLOCK)
        row = np.zeros((blocks + 1) * BLOCK, np.float32)
        np.multiply(way, share, out=row[: len(way)])
        row[blocks * BLOCK] = share
        return row

    def _share(self, row: Flat) -> float:
        return float(row[len(row) - BLOCK])

    def _taken(self, row: Flat) -> int:
        return round(self._share(row) * self.options.every)


class DataParallel:
    """Averages gradients over the peers at every step: `average()` between `backward()` and the optimizer's
    step.

    All peers begin with the majority's weights and take the same steps, so they remain equal as long as their
    optimizers are of one kind and setting. A newcomer would need the optimizers' state: it cannot come later.
    """

    def __init__(self, module: torch.nn.Module, peers: Peers, *, codec: str = "") -> None:
        """Raises as `Peers.sync`."""
        self.peers = peers
        self.codec = codec
        self._flat = FlatModule(module)
        weights = self._flat.read()
        peers.sync({"weights": weights}, 0)
        self._flat.write(weights)

    def average(self) -> int:
        """Replace the gradients by their average; how many peers are in it. Raises `PeersGone`."""
        row = self._flat.read_gradients()
        reduced = self.peers.all_reduce(row, tag=GRADIENTS_TAG, codec=self.codec)
        self._flat.write_gradients(row)
        return reduced.contributors
