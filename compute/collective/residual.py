"""What quantization lost of a tag's operations: added to the next one, so that over many nothing is lost."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from mycel.compute.collective.quantize import Floats
from mycel.compute.collective.stock import Stock

Key = tuple[str, str, int]
"""Group, tag, number of items. Items are the caller's, so who is in the group does not matter."""


@dataclass(frozen=True, slots=True, eq=False)
class Residual:
    """What was lost before, and what the operation under way leaves: float32, items of the whole array."""

    key: Key
    before: Floats
    after: Floats


class Residuals:
    """Residuals of the latest `most` tags."""

    def __init__(self, stock: Stock, most: int) -> None:
        self._stock = stock
        self._most = most
        self._lost: OrderedDict[Key, Floats] = OrderedDict()

    def borrow(self, key: Key) -> Residual:
        """For one operation; at the first one nothing was lost. Then `keep` or `drop`."""
        before = self._lost.pop(key, None)
        if before is None:
            before = np.zeros(key[2], np.float32)
        return Residual(key, before, self._stock.take(before.nbytes).view(np.float32))

    def keep(self, residual: Residual) -> None:
        """The operation was kept: what it lost is to be added to the next."""
        self._settle(residual.key, residual.after, residual.before)

    def drop(self, residual: Residual) -> None:
        """It was not."""
        self._settle(residual.key, residual.before, residual.after)

    def _settle(self, key: Key, lost: Floats, free: Floats) -> None:
        self._lost[key] = lost
        self._stock.give(free.view(np.uint8))
        while len(self._lost) > self._most:
            self._lost.popitem(last=False)
