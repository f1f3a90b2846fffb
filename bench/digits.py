"""The digits of scikit-learn, dealt out to clients, and a plain loop to compare with.

1797 pictures of 8 x 8, a quarter of them kept for judging. Every client's file has its share of the others
and all of those to judge by, so that what clients report together is the accuracy on the held-out quarter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mycel.compute.train.layout import Layout
from mycel.compute.train.rows import Flat, row_of
from mycel.compute.train.strategy import Sum
from mycel.compute.train.trade import Source, StartAsk, WorkAsk, seed_of
from mycel.compute.train.workshop import Workshop
from mycel.protocol.tensor import Tensor

APP = "classifier"
SETTINGS: dict[str, str | int | float | bool] = {
    "features": 64,
    "classes": 10,
    "hidden": "128,64",
    "scale": 1 / 16,
    "rate": 0.05,
    "momentum": 0.9,
    "batch": 32,
    "epochs": 2,
}
"""17 226 parameters."""


def deal(folder: Path, clients: int, seed: int = 0) -> list[Path]:
    """Write each client's file; the same seed deals the same."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = np.random.default_rng(seed).permutation(len(found.target))
    x, y = found.data[order].astype(np.float32), found.target[order].astype(np.int64)
    judged = len(y) // 4
    paths = []
    for n in range(clients):
        path = folder / f"digits{n}.npz"
        mine = slice(judged + n, None, clients)
        np.savez(path, x=x[mine], y=y[mine], x_test=x[:judged], y_test=y[:judged])
        paths.append(path)
    return paths


class PlainLoop:
    """Federated averaging as a loop in one process: the same application, files and seeds."""

    def __init__(self, paths: Sequence[Path], names: Sequence[str], seed: int) -> None:
        """`names`: the clients' ids, from which their seeds are made."""
        self._workshop = Workshop()
        self._workshop.open(Source(APP))
        begun = self._workshop.start(StartAsk(APP, SETTINGS, seed))
        self.layout: Layout = begun.layout
        self.model: Flat = row_of(begun.model.data, begun.layout).copy()
        self._paths, self._names, self._seed = paths, names, seed
        self.number = 0

    def round(self, keep: Callable[[int], bool] = lambda n: True) -> None:
        """Train each client `keep` takes, and average."""
        self.number += 1
        total = Sum(self.layout.size)
        for n, (path, name) in enumerate(zip(self._paths, self._names, strict=True)):
            if keep(n):
                update, examples = self.update(path, name)
                total.add(update, examples)
        self.model = self.model + total.mean()

    def update(self, path: Path, name: str, **settings: Any) -> tuple[Flat, int]:
        """One client's update of the model as it is."""
        own = seed_of(self._seed, self.number, name)
        done = self._workshop.work(self._ask(path, own, {**SETTINGS, **settings}, train=True))
        assert done.update is not None
        return row_of(done.update.data, self.layout), done.examples

    def accuracy(self) -> float:
        """On the held-out quarter."""
        done = self._workshop.work(self._ask(self._paths[0], 0, SETTINGS, train=False))
        return done.judged["accuracy"]

    def _ask(self, path: Path, seed: int, settings: dict[str, Any], *, train: bool) -> WorkAsk:
        model = Tensor("float32", (self.layout.size,), memoryview(self.model.data).cast("B"))
        layout, number, place = self.layout, self.number, str(path)
        return WorkAsk(APP, "plain", number, layout, model, settings, seed, place, train, not train)
