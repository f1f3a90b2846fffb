"""What a peer sends at a border between inner steps, and what it makes of the sum that comes back. Pure.

Between two borders a peer takes inner steps from `start` on; the way it went is `start` minus where it
arrived. What it sends is a row of float32: the way, weighed by the share of its inner steps that it took, and
behind it, in a block of its own, that share. So a sum of rows says by itself what it must be divided by, and
whoever is slow, or new, goes to the border with the steps it has, and counts for as much.

With `overlap` a sum comes one border late. The peer then goes on from the shared weights plus a part of its
own last way, so that what it just learned is not lost meanwhile (eager updates, Kale et al. 2025, arXiv
2502.12996). Its next way begins there, so nothing is counted twice; shared weights and momentum see sums
only, and remain the same on all peers.

`DiLoCo` of `compute.train.diloco` uses this in a training loop's thread, jobs of kind train in the daemon.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from mycel.compute.train.outer import Flat, Outer, OuterOptions, norm, staleness
from mycel.protocol.errors import LocalProtocolError

TAG = "diloco"
"""Under which rows are summed up."""
BLOCK = 1024
"""Numbers in the largest block that a codec gives one scale: one number alone in it keeps its precision."""


@dataclass(frozen=True, slots=True)
class BorderOptions:
    """How often peers talk, and how."""

    every: int = 50
    """Inner steps between two borders (H in the paper)."""
    outer: OuterOptions = field(default_factory=OuterOptions)
    codec: str | None = "int8"
    """How rows are sent: "int8" or "int4" in blocks with a scale each, None as float32."""
    overlap: bool = False
    """Go on while a sum is under way, and apply it at the next border."""
    eager: float = 0.5
    """With overlap: the part of its own last way that a peer goes on from, before the sum is in."""
    early: bool = True
    """Go to the border as soon as others wait there, with the steps taken so far. Off: after all `every`
    steps; then the slowest peer sets the pace, and everybody takes the same number of steps."""

    def __post_init__(self) -> None:
        if self.every < 1 or not 0 <= self.eager <= 1:
            raise LocalProtocolError(f"every {self.every} must be 1 or more, eager {self.eager} in [0, 1]")


@dataclass(frozen=True, slots=True)
class OuterStep:
    """What an outer step did."""

    number: int
    """Outer steps that the shared weights have taken."""
    contributors: int
    """Peers in the sum that was applied; 0 where overlap has none to apply yet."""
    length: float
    """Of the average way."""
    weight: float
    """What it counted, below 1 where it came too late."""


class Border:
    """The state that all peers share, and where this one goes on from."""

    def __init__(self, weights: Flat, options: BorderOptions) -> None:
        self.options = options
        self._outer = Outer(weights, options.outer)
        self._steps = np.zeros(1, np.int64)
        self.start: Flat = self._outer.weights.copy()
        """Where this peer's inner steps begin, shape [count]."""

    @property
    def weights(self) -> Flat:
        """The shared weights, shape [count]; not to be written."""
        return self._outer.weights

    @property
    def steps(self) -> int:
        """Outer steps that the shared weights have taken."""
        return int(self._steps[0])

    def state(self) -> dict[str, NDArray[np.float32] | NDArray[np.int64]]:
        """What all peers share, the arrays themselves: "weights", "momentum", and "steps" (one int64).

        Whoever writes into them calls `begin_again` after it.
        """
        return {"weights": self._outer.weights, "momentum": self._outer.momentum, "steps": self._steps}

    def begin_again(self) -> None:
        """Go on from the shared weights: they were replaced, or nothing of this peer's own is to be added."""
        self.start = self._outer.weights.copy()

    def way_to(self, arrived: Flat) -> Flat:
        """The way of this peer's inner steps, which ended at weights `arrived`, shape [count]."""
        return self.start - arrived

    def pack(self, way: Flat, inner_steps: int) -> Flat:
        """The row to send for a way of so many inner steps."""
        share = np.float32(inner_steps / self.options.every)
        blocks = -(-len(way) // BLOCK)
        row = np.zeros((blocks + 1) * BLOCK, np.float32)
        np.multiply(way, share, out=row[: len(way)])
        row[blocks * BLOCK] = share
        return row

    def apply(self, row: Flat, contributors: int, begun_at: Flat | None = None) -> OuterStep:
        """Move by a sum of rows. `begun_at`: the shared weights when it was begun, where they moved since.

        Raises `LocalProtocolError` for numbers that are not finite: nothing moves then.
        """
        share = float(row[len(row) - BLOCK])
        if not share > 0.0:  # nobody took a step
            return OuterStep(self.steps, contributors, 0.0, 1.0)
        way = row[: len(self.weights)]
        way /= np.float32(share)
        length, weight = norm(way), 1.0
        if begun_at is not None:
            weight = staleness(norm(self.weights - begun_at), length, self.options.outer.penalty)
        self._outer.step(way, weight)
        self._steps[0] += 1
        return OuterStep(self.steps, contributors, length, weight)

    def go_ahead(self, way: Flat) -> None:
        """Go on from the shared weights plus a part of this peer's own `way`, whose sum is under way."""
        self.start = way * np.float32(-self.options.eager)
        self.start += self.weights
