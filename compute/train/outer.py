"""The outer optimizer of DiLoCo: what every peer does with the averaged pseudo-gradient, bit for bit alike.

A **pseudo-gradient** is where a peer's inner steps began minus where they ended. The average over all peers
takes one step of Nesterov's momentum (DiLoCo, Douillard et al. 2023, arXiv 2311.08105, algorithm 1):

    momentum <- mu * momentum + delta
    weights  <- weights - rate * (delta + mu * momentum)

Every operation is one multiplication or one addition of float32 at a time, which IEEE 754 rounds the same on
every machine: peers that saw the same averages hold the same weights, to the bit, and can tell by a hash.

Where the average comes one outer step late (`compute.train.border`, overlap), two things keep it from doing
harm, both in the spirit of CO2 (Sun et al. 2024, arXiv 2401.16265, section 3): an average is weighted down by
how far the weights have moved since it was computed (**staleness penalty**), and the momentum is kept from
growing past a bound (**momentum clipping**). Both are computed from numbers that all peers share.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mycel.protocol.errors import LocalProtocolError

Flat = NDArray[np.float32]
"""All weights of a model in one row, shape [count]."""

_CHUNK = 1 << 16
"""Elements taken at a time, so that what is worked on stays in the cache."""


@dataclass(frozen=True, slots=True)
class OuterOptions:
    """Settings of the outer optimizer. The defaults are DiLoCo's own.

    In runs of some hundred outer steps rate 1 with momentum 0.7 was better, and with overlap rate 0.7 with
    momentum 0.5: docs/architecture.md has the figures.
    """

    rate: float = 0.7
    momentum: float = 0.9
    clip: float = 0.0
    """The momentum's length may be this many times the average's; 0: it is not bounded."""
    penalty: float = 1.0
    """How strongly a late average is weighted down, see `staleness`; 0: not at all."""

    def __post_init__(self) -> None:
        if not (self.rate > 0 and 0 <= self.momentum < 1 and self.clip >= 0 and self.penalty >= 0):
            raise LocalProtocolError(
                f"outer optimizer: rate {self.rate} must be above 0, momentum {self.momentum} in [0, 1), "
                f"clip {self.clip} and penalty {self.penalty} 0 or more"
            )


class Outer:
    """Weights that all peers share, and the momentum they are moved with."""

    def __init__(self, weights: Flat, options: OuterOptions) -> None:
        """`weights` is copied."""
        self.options = options
        self.weights: Flat = np.array(weights, dtype=np.float32)
        self.momentum: Flat = np.zeros_like(self.weights)

    def step(self, delta: Flat, weight: float = 1.0) -> None:
        """Move by the average pseudo-gradient `delta`, shape [count], counted `weight` times.

        Raises `LocalProtocolError` for another shape, and for numbers that are not finite: nothing moves
        then.
        """
        if delta.shape != self.weights.shape:
            raise LocalProtocolError(f"a pseudo-gradient of shape {delta.shape}, not {self.weights.shape}")
        length = norm(delta) * weight
        if not math.isfinite(length):
            raise LocalProtocolError("the average pseudo-gradient has numbers that are not finite")
        rate, mu, share = np.float32(self.options.rate), np.float32(self.options.momentum), np.float32(weight)
        for at in range(0, len(delta), _CHUNK):
            part = slice(at, at + _CHUNK)
            step, momentum = delta[part] * share, self.momentum[part]
            momentum *= mu
            momentum += step
        if self.options.clip:
            self._clip(self.options.clip * length)
        for at in range(0, len(delta), _CHUNK):
            part = slice(at, at + _CHUNK)
            step = self.momentum[part] * mu
            step += delta[part] * share
            step *= rate
            self.weights[part] -= step

    def _clip(self, longest: float) -> None:
        length = norm(self.momentum)
        if length > longest:
            self.momentum *= np.float32(longest / length)


def norm(row: Flat) -> float:
    """The Euclidean length of `row`, the same on every machine.

    A library's own sum may add in another order elsewhere. Here rows of squares are added element by element
    in float64, and what is left is folded in halves: each is an addition that IEEE 754 leaves no choice in.
    """
    sums = np.zeros(_CHUNK, np.float64)
    for at in range(0, len(row), _CHUNK):
        part = row[at : at + _CHUNK].astype(np.float64)
        part *= part
        sums[: len(part)] += part
    while len(sums) > 1:
        half = len(sums) // 2
        sums = sums[:half] + sums[half:]
    return math.sqrt(float(sums[0]))


def staleness(moved: float, delta: float, penalty: float) -> float:
    """What a late average counts: 1 where the weights stand where it was computed, less the further they
    went.

    `moved` is the length of the way the weights went since, `delta` the length of the average itself. Weights
    that moved `r` times the average's own length make it count 1 / (1 + penalty * max(0, r - 1)): a move of
    one average is what a delay of one step is expected to bring.
    """
    if delta <= 0.0:
        return 1.0
    return 1.0 / (1.0 + penalty * max(0.0, moved / delta - 1.0))
