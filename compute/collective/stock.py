"""Working memory of operations, kept for the next: fresh pages cost more than adding what goes into them."""

from __future__ import annotations

import numpy as np

from mycel.compute.collective.quantize import Bytes


class Stock:
    """Lends arrays of bytes, and keeps at most `limit` bytes of those given back. In one thread only."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._free: list[Bytes] = []

    @property
    def free_bytes(self) -> int:
        """Bytes kept for later."""
        return sum(array.nbytes for array in self._free)

    def take(self, count: int) -> Bytes:
        """An array of `count` bytes that hold anything."""
        for at, array in enumerate(self._free):
            if array.nbytes == count:
                return self._free.pop(at)
        return np.empty(count, np.uint8)

    def give(self, array: Bytes) -> None:
        """Take back what `take` gave; what was kept longest goes where it becomes too much."""
        self._free.append(array)
        while self.free_bytes > self._limit:
            self._free.pop(0)
