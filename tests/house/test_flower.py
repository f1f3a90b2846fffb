"""What bench federated has Flower's clients do is what Mycel's do, to the last bit."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from mycel.compute.train.app import Task
from mycel.compute.train.apps import classifier
from mycel.compute.train.trade import seed_of

BENCH = Path(__file__).resolve().parents[2] / "bench"
SETTINGS = {"features": 64, "classes": 10, "hidden": "24,16", "scale": 1 / 16, "rate": 0.05,
            "momentum": 0.9, "batch": 32, "epochs": 2}  # fmt: skip


@pytest.fixture(scope="module")
def digits() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_flower_digits", BENCH / "flower_digits.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rng = np.random.default_rng(5)
    path = tmp_path / "digits.npz"
    x = rng.integers(0, 17, (135, 64)).astype(np.float32)
    np.savez(path, x=x, y=rng.integers(0, 10, 135), x_test=x[:50], y_test=rng.integers(0, 10, 50))
    return path


def test_flowers_clients_do_the_same_work(digits: ModuleType, data: Path) -> None:
    first = classifier.start(Task({}, SETTINGS, Path(), 0, 7))
    task = Task({name: array.copy() for name, array in first.items()}, SETTINGS, data, 3, seed_of(7, 3, "me"))
    trained = classifier.train(task)

    arrays = [first[name].copy() for name in sorted(first)]
    x, y = digits.examples(str(data), SETTINGS["scale"])
    loss = digits.train(digits.layers_of(arrays), x, y, SETTINGS, digits.seed_of(7, 3, "me"))
    for name, array in zip(sorted(first), arrays, strict=True):
        assert np.array_equal(array, trained.arrays[name]), name
        assert not np.array_equal(array, first[name]), name
    assert loss == trained.metrics["loss"]
    judged = classifier.evaluate(Task(dict(trained.arrays), SETTINGS, data, 3, 0))
    right = digits.accuracy(digits.layers_of(arrays), str(data), SETTINGS["scale"])
    assert right == judged.metrics["accuracy"]
