"""The classifier's training once more, for Flower's clients, which run where Mycel is not installed.

Line by line what `mycel.compute.train.apps.classifier` does, without its checks: the same batches from the
same seeds, the same steps, the same numbers (tests/house/test_flower.py holds them to the last bit). So both
sides' clients do the same work. Needs numpy only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Layers = list[tuple[Array, Array]]
"""(weights [in, out], bias [out]) of each layer."""


def seed_of(seed: int, number: int, name: str) -> int:
    """A client's seed in a round, as Mycel derives it."""
    return int.from_bytes(hashlib.sha256(f"{seed} {number} {name}".encode()).digest()[:6], "big")


def layers_of(arrays: Sequence[Array]) -> Layers:
    """Layers of arrays in the order of their names: 0.bias, 0.weight, 1.bias, ..."""
    return [(arrays[at + 1], arrays[at]) for at in range(0, len(arrays), 2)]


def examples(path: str, scale: float, *, judge: bool = False) -> tuple[Array, NDArray[np.int64]]:
    """(x, y) of a client's file; `judge`: those to judge by."""
    with np.load(path) as found:
        x, y = (found["x_test"], found["y_test"]) if judge else (found["x"], found["y"])
    return x.reshape(len(x), -1).astype(np.float32) * np.float32(scale), y.astype(np.int64)


def train(layers: Layers, x: Array, y: NDArray[np.int64], settings: Mapping[str, Any], seed: int) -> float:
    """Some epochs of stochastic gradient descent with momentum, in place; the mean loss."""
    rng = np.random.default_rng(seed)
    speeds = [(np.zeros_like(w), np.zeros_like(b)) for w, b in layers]
    batch, total, steps = int(settings["batch"]), 0.0, 0
    for _ in range(int(settings["epochs"])):
        order = rng.permutation(len(x))
        for at in range(0, len(x), batch):
            rows = order[at : at + batch]
            loss, slopes = gradient(layers, x[rows], y[rows])
            total, steps = total + loss, steps + 1
            for layer, speed, slope in zip(layers, speeds, slopes, strict=True):
                for value, moving, down in zip(layer, speed, slope, strict=True):
                    moving *= np.float32(settings["momentum"])
                    moving += down
                    value -= np.float32(settings["rate"]) * moving
    return total / max(1, steps)


def gradient(layers: Layers, x: Array, y: NDArray[np.int64]) -> tuple[float, Layers]:
    """(Mean cross entropy, its gradient for each layer) on one batch."""
    values = forward(layers, x)
    likely = log_softmax(values[-1])
    picked = np.arange(len(y))
    back = np.exp(likely)
    back[picked, y] -= 1.0
    back /= np.float32(len(y))
    slopes: Layers = []
    for n in range(len(layers) - 1, -1, -1):
        slopes.append((values[n].T @ back, back.sum(axis=0)))
        if n:
            back = (back @ layers[n][0].T) * (values[n] > 0)
    return float(-likely[picked, y].mean()), slopes[::-1]


def forward(layers: Layers, x: Array) -> list[Array]:
    """Inputs of every layer and, last, the scores [rows, classes]."""
    values = [x]
    for n, (weight, bias) in enumerate(layers):
        out = values[-1] @ weight + bias
        values.append(out if n == len(layers) - 1 else np.maximum(out, 0))
    return values


def log_softmax(scores: Array) -> Array:
    """Logarithms of probabilities, row by row."""
    shifted = scores - scores.max(axis=1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def accuracy(layers: Layers, path: str, scale: float) -> float:
    """On the examples to judge by of a client's file."""
    x, y = examples(path, scale, judge=True)
    return float((forward(layers, x)[-1].argmax(axis=1) == y).mean())
