"""Federated applications: decorated functions that a client's worker process calls.

    app = mycel.App()

    @app.start
    def start(task):                       # the first model, the same from the same seed
        return Net(task.settings["width"]).state_dict()

    @app.train
    def train(task):
        net = task.load(Net(task.settings["width"]))
        loss = fit(net, read(task.data), task.settings["rate"])
        return task.done(net, examples=1000, loss=loss)

    @app.evaluate
    def evaluate(task):
        net = task.load(Net(task.settings["width"]))
        return task.judged(examples=200, accuracy=score(net, read(task.data)))

A model is a mapping of names to numpy arrays, or to torch tensors: `load` and `done` take a torch module as
it is. `task.cache` lives as long as the process, so what is read or built once need not be again; the process
lives as long as its job. Applications never see the network, other clients, or keys.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mycel.compute.train.rows import Arrays
from mycel.compute.train.trade import Setting
from mycel.protocol.errors import UsageProblem

Model = Mapping[str, Any]
"""Names to numpy arrays or torch tensors."""


@dataclass(frozen=True)
class Trained:
    """What training gives."""

    arrays: Arrays
    examples: int
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Judged:
    """What evaluation gives."""

    examples: int
    metrics: Mapping[str, float]


@dataclass
class Task:
    """One thing that an application is asked to do."""

    arrays: dict[str, NDArray[Any]]
    """The model as it came: names to arrays, the application's to change. Empty in `start`."""
    settings: Mapping[str, Setting]
    """The job's, with what the strategy says for this round."""
    data: Path
    """What this node's owner offers under the name that the job asks for. Does not exist in `start`."""
    number: int
    """The round, from 1."""
    seed: int
    """Another one for each round and client, the same when a round is repeated."""
    cache: dict[str, Any] = field(default_factory=dict)
    """The application's own, as long as this process lives."""

    @property
    def rng(self) -> np.random.Generator:
        """A generator of this task's seed, a fresh one each time."""
        return np.random.default_rng(self.seed)

    def setting(self, name: str, default: float) -> float:
        """A number of the settings. Raises `UsageProblem` where it is none."""
        value = self.settings.get(name, default)
        if isinstance(value, str | bool):
            raise UsageProblem(f"setting {name} = {value!r} must be a number")
        return value

    def load(self, module: Any) -> Any:
        """Put the model into a torch module, strictly; returns the module."""
        import torch

        module.load_state_dict({name: torch.from_numpy(array) for name, array in self.arrays.items()})
        return module

    def done(self, model: Any, *, examples: int, **metrics: float) -> Trained:
        """Training's result: the model (a mapping, or a torch module) and figures to report."""
        return Trained(as_arrays(model), count_of(examples), numbers(metrics))

    def judged(self, *, examples: int, **metrics: float) -> Judged:
        """Evaluation's result."""
        return Judged(count_of(examples), numbers(metrics))


class App:
    """An application's functions. Each is registered by the decorator of its name."""

    def __init__(self) -> None:
        self.starts: Callable[[Task], Any] | None = None
        self.trains: Callable[[Task], Trained] | None = None
        self.evaluates: Callable[[Task], Judged] | None = None

    def start(self, function: Callable[[Task], Any]) -> Callable[[Task], Any]:
        """Register what makes the first model."""
        self.starts = function
        return function

    def train(self, function: Callable[[Task], Trained]) -> Callable[[Task], Trained]:
        """Register what trains the model on this node's data."""
        self.trains = function
        return function

    def evaluate(self, function: Callable[[Task], Judged]) -> Callable[[Task], Judged]:
        """Register what judges the model by this node's data."""
        self.evaluates = function
        return function


def as_arrays(model: Any) -> dict[str, NDArray[Any]]:
    """A model as numpy arrays by name. Raises `UsageProblem` for what is none."""
    found = model.state_dict() if hasattr(model, "state_dict") else model
    if not isinstance(found, Mapping) or not found:
        what = type(model).__name__
        raise UsageProblem(f"a model is a mapping of names to arrays or a torch module, not {what}")
    return {str(name): _as_array(value) for name, value in found.items()}


def _as_array(value: Any) -> NDArray[Any]:
    if hasattr(value, "detach"):  # a torch tensor
        value = value.detach().cpu()
        value = (value.float() if value.is_floating_point() else value).numpy()
    return np.asarray(value)


def count_of(examples: Any) -> int:
    """How many examples, as a plain number. Raises `UsageProblem` for what is none."""
    try:
        count = int(examples)
    except (TypeError, ValueError) as error:
        raise UsageProblem(f"examples is how many there were, not {examples!r}") from error
    if count < 0:
        raise UsageProblem(f"examples is how many there were, not {examples!r}")
    return count


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Figures as plain floats. Raises `UsageProblem` for what is no number."""
    try:
        return {name: float(value) for name, value in metrics.items()}
    except (TypeError, ValueError) as error:
        raise UsageProblem(f"metrics are numbers by name, not {metrics!r}") from error
