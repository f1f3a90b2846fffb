"""A classifier on arrays: a multilayer perceptron, trained by stochastic gradient descent, in numpy.

Data: an .npz file with `x` of shape [examples, features] (anything more is flattened) and `y` [examples] of
whole numbers from 0. With `x_test` and `y_test` in it, those judge; otherwise the training data do.

Settings: `features` and `classes`; `hidden` ("128,64": the widths between; "" for none); `rate` 0.1,
`momentum` 0.9, `batch` 32, `epochs` 1, `steps` 0 (at most so many; 0: whole epochs), `decay` 0 (weight
decay), `scale` 1 (what x is multiplied by), and FedProx's `proximal_mu` 0. The start is He's (2015), from the
job's seed.
"""

from __future__ import annotations

import itertools
import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from mycel.compute.train.app import App, Judged, Task, Trained
from mycel.protocol.errors import UsageProblem

app = App()

Array = NDArray[np.float32]
Layers = list[tuple[Array, Array]]
"""(weights [in, out], bias [out]) of each layer."""


@app.start
def start(task: Task) -> dict[str, Array]:
    """A fresh perceptron."""
    hidden = str(task.settings.get("hidden", "")).replace(" ", "")
    try:
        widths = [int(task.settings["features"]), *(int(w) for w in hidden.split(",") if w)]
        widths.append(int(task.settings["classes"]))
    except (KeyError, ValueError) as error:
        raise UsageProblem(
            f"the classifier needs features, classes and hidden widths such as '64,32': {error}"
        ) from error
    rng = task.rng
    model: dict[str, Array] = {}
    for n, (wide, narrow) in enumerate(itertools.pairwise(widths)):
        model[f"{n}.weight"] = (rng.standard_normal((wide, narrow)) * np.sqrt(2.0 / wide)).astype(np.float32)
        model[f"{n}.bias"] = np.zeros(narrow, np.float32)
    return model


@app.train
def train(task: Task) -> Trained:
    """Some epochs over this node's data."""
    x, y, _, _ = data_of(task)
    layers, began = layers_of(task.arrays), [(w.copy(), b.copy()) for w, b in layers_of(task.arrays)]
    speeds = [(np.zeros_like(w), np.zeros_like(b)) for w, b in layers]
    rate, momentum = task.setting("rate", 0.1), task.setting("momentum", 0.9)
    decay, mu = task.setting("decay", 0.0), task.setting("proximal_mu", 0.0)
    batch, rng, loss, steps = max(1, int(task.setting("batch", 32))), task.rng, 0.0, 0
    most = int(task.setting("steps", 0)) or math.inf
    for _ in range(int(task.setting("epochs", 1))):
        order = rng.permutation(len(x))
        for at in range(0, len(x), batch):
            if steps == most:
                break
            rows = order[at : at + batch]
            cost, slopes = gradient(layers, x[rows], y[rows])
            loss, steps = loss + cost, steps + 1
            for layer, speed, slope, home in zip(layers, speeds, slopes, began, strict=True):
                for value, moving, down, first in zip(layer, speed, slope, home, strict=True):
                    moving *= np.float32(momentum)
                    moving += down + np.float32(decay) * value + np.float32(mu) * (value - first)
                    value -= np.float32(rate) * moving
    return task.done(task.arrays, examples=len(x), loss=loss / max(1, steps))


@app.evaluate
def evaluate(task: Task) -> Judged:
    """Accuracy and loss on what the file has for judging."""
    _, _, x, y = data_of(task)
    scores = forward(layers_of(task.arrays), x)[-1]
    likely = log_softmax(scores)
    right = float((scores.argmax(axis=1) == y).mean()) if len(y) else 0.0
    loss = float(-likely[np.arange(len(y)), y].mean()) if len(y) else 0.0
    return task.judged(examples=len(y), accuracy=right, loss=loss)


def layers_of(arrays: dict[str, Any]) -> Layers:
    """The model's layers, in order; views, so that training changes the arrays."""
    return [(arrays[f"{n}.weight"], arrays[f"{n}.bias"]) for n in range(len(arrays) // 2)]


def forward(layers: Layers, x: Array) -> list[Array]:
    """Inputs of every layer and, last, the scores [rows, classes]."""
    values = [x]
    for n, (weight, bias) in enumerate(layers):
        out = values[-1] @ weight + bias
        values.append(out if n == len(layers) - 1 else np.maximum(out, 0))
    return values


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


def log_softmax(scores: Array) -> Array:
    """Logarithms of probabilities, row by row."""
    shifted = scores - scores.max(axis=1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def data_of(task: Task) -> tuple[Array, NDArray[np.int64], Array, NDArray[np.int64]]:
    """(x, y, x to judge by, y to judge by), read once per file."""
    key = f"classifier:{task.data}:{task.setting('scale', 1.0)}"
    if key not in task.cache:
        found = read_npz(task.data)
        if "x" not in found or "y" not in found:
            raise UsageProblem(f"{task.data.name} lacks x or y; write it by numpy.savez(file, x=..., y=...)")
        scale = np.float32(task.setting("scale", 1.0))

        def rows(x: NDArray[Any], y: NDArray[Any]) -> tuple[Array, NDArray[np.int64]]:
            if len(x) != len(y) or not len(x):
                raise UsageProblem(f"{task.data.name} has {len(x)} examples and {len(y)} labels")
            return x.reshape(len(x), -1).astype(np.float32) * scale, y.astype(np.int64).reshape(-1)

        own = rows(found["x"], found["y"])
        judge = rows(found["x_test"], found["y_test"]) if "x_test" in found and "y_test" in found else own
        task.cache[key] = (*own, *judge)
    x, y, x_test, y_test = task.cache[key]
    layers = layers_of(task.arrays)
    features, classes = len(layers[0][0]), len(layers[-1][1])
    if x.shape[1] != features or not 0 <= y.min() <= y.max() < classes:
        raise UsageProblem(
            f"{task.data.name} has {x.shape[1]} features and labels {y.min()} to {y.max()}; "
            f"the model takes {features} and {classes} classes"
        )
    return x, y, x_test, y_test


def read_npz(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of an .npz file; nothing in it is unpickled. Raises `UsageProblem`."""
    found = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                with archive.open(name) as file:
                    found[name.removesuffix(".npy")] = npy.read_array(file, allow_pickle=False)
    except OSError as error:  # without the path, which is this node's own business
        raise UsageProblem(f"{path.name} cannot be read: {error.strerror}") from None
    except (ValueError, zipfile.BadZipFile) as error:
        raise UsageProblem(f"{path.name} cannot be read as .npz: {error}") from None
    return found
