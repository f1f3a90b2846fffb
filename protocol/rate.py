"""How fast something may go: a bucket that fills at a rate and from which bytes are taken.

Pure: the time comes in. Spending may overdraw the bucket; then nothing is to be spent until it is level
again. So pieces need not be cut to fit, and the rate holds all the same.
"""

from __future__ import annotations

import math

BURST_S = 0.1
"""Seconds of its rate that a bucket holds: what may go at once after a pause."""


class Bucket:
    """A rate in bytes per second; 0 means none."""

    __slots__ = ("_left", "_rate", "_since")

    def __init__(self, rate: float, now: float) -> None:
        self._rate = rate if rate > 0 else math.inf
        self._left = self._rate * BURST_S
        self._since = now

    def ready_at(self, now: float) -> float:
        """When something may be spent: `now` or later."""
        if math.isinf(self._rate):
            return now
        self._left = min(self._left + (now - self._since) * self._rate, self._rate * BURST_S)
        self._since = now
        return now if self._left > 0 else now + (1 - self._left) / self._rate

    def spend(self, count: int) -> None:
        """So many bytes went."""
        self._left -= count
