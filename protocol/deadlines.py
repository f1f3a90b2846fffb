"""Many deadlines and one alarm: who is due, without a cancel scope for each.

A heap of (time, number, waiter). What is settled before its time stays in the heap until it surfaces or until
the settled ones outnumber the waiting by far, so that adding and settling cost next to nothing.
"""

from __future__ import annotations

import heapq
import math
from typing import Protocol

import trio

from mycel.protocol.frame import NO_DEADLINE


class Waiter(Protocol):
    """What has a deadline."""

    is_settled: bool

    def expire(self) -> None:
        """The deadline has come."""


SPARE = 64
"""Settled entries that are never worth a clean-up."""


class Deadlines:
    """Deadlines of waiters, each with a number of its own."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Waiter]] = []
        self._waiting = 0

    def __len__(self) -> int:
        """Entries held, settled ones included."""
        return len(self._heap)

    @property
    def next_at(self) -> float:
        """When the alarm must ring: no later than the earliest deadline of a waiter; else infinity."""
        while self._heap and self._heap[0][2].is_settled:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else math.inf

    def add(self, when: float, number: int, waiter: Waiter) -> None:
        """Watch over `waiter`, which is not settled."""
        self._waiting += 1
        heapq.heappush(self._heap, (when, number, waiter))

    def settle(self, waiter: Waiter) -> None:
        """`waiter` needs its deadline no more."""
        if waiter.is_settled:
            return
        waiter.is_settled = True
        self._waiting -= 1
        if len(self._heap) > SPARE + 4 * self._waiting:
            self._heap = [entry for entry in self._heap if not entry[2].is_settled]
            heapq.heapify(self._heap)

    def due(self, now: float) -> list[Waiter]:
        """Waiters whose time has come, in order; they are settled by this."""
        found: list[Waiter] = []
        while self._heap and self._heap[0][0] <= now:
            waiter = heapq.heappop(self._heap)[2]
            if not waiter.is_settled:
                waiter.is_settled = True
                self._waiting -= 1
                found.append(waiter)
        return found


def remaining_ms(deadline: float) -> int:
    """What a deadline (trio time) leaves, as it travels: at least 1 ms, rounded up."""
    if deadline == math.inf:
        return NO_DEADLINE
    left_s = max(deadline - trio.current_time(), 0.0)  # minus infinity in a scope that is cancelled
    return min(max(math.ceil(left_s * 1000), 1), NO_DEADLINE - 1)
