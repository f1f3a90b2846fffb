"""What a round makes of its updates: a strategy is four hooks and says what memory it needs.

    configure   what clients are told in this round, beside the job's own settings
    weigh       what one update counts
    combine     robust strategies: rows in, one update out
    step        the new model from the old one and the combined update

An **update** is the model that a client ended with minus the one it began with. A **linear** strategy
combines by weighted mean: each update is added as it comes and let go (`Sum`), so the coordinator holds one
row however many clients there are, and sums may be made on the way, along a tree. A **robust** strategy must
see all updates at once: K x the model's memory, which it declares, and no tree, because whoever sums can lie
for all below.

With robust strategies workers send momentum instead of their bare updates unless told otherwise: liars hide
in the variance between honest updates, and momentum takes most of it away (Karimireddy et al. 2021, arXiv
2012.10333).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import msgspec
import numpy as np

from mycel.compute.train import robust
from mycel.compute.train.robust import Rows
from mycel.compute.train.rows import Flat
from mycel.compute.train.trade import Setting
from mycel.protocol.errors import UsageProblem

DEFAULT_ROBUST = "multi-krum"
WORKER_MOMENTUM = 0.9


class Weighed(msgspec.Struct, frozen=True):
    """What is known of an update when it is weighed."""

    examples: int
    """How many examples it was trained on, as its client says."""
    discount: float = 1.0
    """Below 1 where it was made from an older model, see `mycel.compute.train.rounds`."""


class Strategy(Protocol):
    """The four hooks. `state` are rows that must survive with the model; `step` may change them."""

    name: str
    is_linear: bool
    state: dict[str, Flat]

    def configure(self, number: int) -> Mapping[str, Setting]:
        """Settings that clients get in round `number`, over those of the job."""

    def weigh(self, update: Weighed) -> float:
        """What an update counts; only proportions matter. Robust strategies scale a row by it."""

    def combine(self, rows: Rows) -> Flat:
        """One update of shape [p] out of K rows of shape [p]. Not called for linear strategies."""

    def step(self, model: Flat, update: Flat) -> Flat:
        """The next model, a new row."""

    def memory_bytes(self, clients: int, model_bytes: int) -> int:
        """What the coordinator needs beside the model, with so many clients in a round."""


class FedAvg:
    """The mean, weighted by examples (McMahan et al. 2017, arXiv 1602.05629, algorithm 1).

    `rate` scales the step of the model; 1 is the paper's.
    """

    name = "fedavg"
    is_linear = True

    def __init__(self, rate: float = 1.0) -> None:
        _positive(rate=rate)
        self.rate = rate
        self.state: dict[str, Flat] = {}

    def configure(self, number: int) -> Mapping[str, Setting]:
        return {}

    def weigh(self, update: Weighed) -> float:
        return max(1, update.examples) * update.discount

    def combine(self, rows: Rows) -> Flat:
        mean: Flat = np.asarray(rows).mean(axis=0, dtype=np.float64).astype(np.float32)
        return mean

    def step(self, model: Flat, update: Flat) -> Flat:
        return add_scaled(model, update, self.rate)

    def memory_bytes(self, clients: int, model_bytes: int) -> int:
        return (3 + UPLOADS) * model_bytes  # the sum is two rows, and one is being added


UPLOADS = 4
"""Updates that a linear strategy's coordinator takes in at once; the others wait in the network's windows."""


class FedProx(FedAvg):
    """FedAvg whose clients are held near the model they began with (Li et al. 2020, arXiv 1812.06127).

    Clients add `mu` / 2 times the squared distance to their loss; the built-in applications do, others find
    it as the setting `proximal_mu`.
    """

    name = "fedprox"

    def __init__(self, mu: float = 0.01, rate: float = 1.0) -> None:
        super().__init__(rate)
        _positive(mu=mu)
        self.mu = mu

    def configure(self, number: int) -> Mapping[str, Setting]:
        return {"proximal_mu": self.mu}


class FedAdam(FedAvg):
    """The mean update as a gradient for Adam (Reddi et al. 2021, arXiv 2003.00295, algorithm 2).

    `tau` is what keeps the division tame where nothing moves yet. There is no bias correction, as in the
    paper.
    """

    name = "fedadam"

    def __init__(self, rate: float = 0.1, beta1: float = 0.9, beta2: float = 0.99, tau: float = 1e-3) -> None:
        super().__init__(rate)
        _positive(tau=tau)
        _share(beta1=beta1, beta2=beta2)
        self.beta1, self.beta2, self.tau = beta1, beta2, tau

    def step(self, model: Flat, update: Flat) -> Flat:
        first = self.state.get("first", np.zeros_like(update))
        second = self.state.get("second", np.full_like(update, self.tau**2))
        first = np.float32(self.beta1) * first + np.float32(1 - self.beta1) * update
        second = np.float32(self.beta2) * second + np.float32(1 - self.beta2) * update * update
        self.state = {"first": first, "second": second}
        return add_scaled(model, np.divide(first, np.sqrt(second) + self.tau, dtype=np.float32), self.rate)

    def memory_bytes(self, clients: int, model_bytes: int) -> int:
        return super().memory_bytes(clients, model_bytes) + 2 * model_bytes


Rule = Callable[[Rows, int], Flat]


class Robust:
    """A rule of `mycel.compute.train.robust`, bearing a share of liars among the updates of a round.

    Examples do not count; a late update is shortened by its discount. `momentum` is the workers' (0: none).
    """

    is_linear = False

    def __init__(
        self, name: str, liars: float = 0.3, momentum: float = WORKER_MOMENTUM, rate: float = 1.0
    ) -> None:
        _positive(rate=rate)
        _share(momentum=momentum)
        if not 0 <= liars < 0.5:
            raise UsageProblem(f"liars = {liars}: a robust rule bears a share below 0.5 of a round's updates")
        self.name = name
        self.liars, self.momentum, self.rate = liars, momentum, rate
        self.state: dict[str, Flat] = {}
        self._rule: Rule = RULES[name]

    def configure(self, number: int) -> Mapping[str, Setting]:
        return {"worker_momentum": self.momentum} if self.momentum else {}

    def weigh(self, update: Weighed) -> float:
        return update.discount

    def combine(self, rows: Rows) -> Flat:
        return self._rule(rows, self.liars_of(len(rows)))

    def liars_of(self, count: int) -> int:
        """How many of `count` updates are borne: the share, rounded up where that is still a minority."""
        return min(int(np.ceil(self.liars * count - 1e-9)), (count - 1) // 2)

    def step(self, model: Flat, update: Flat) -> Flat:
        return add_scaled(model, update, self.rate)

    def memory_bytes(self, clients: int, model_bytes: int) -> int:
        looked_at = clients * robust.LOOK_BYTES * min(robust.COLUMNS, model_bytes // 4)
        return (clients + 2) * model_bytes + looked_at


RULES: dict[str, Rule] = {
    "multi-krum": robust.multi_krum,
    "trimmed-mean": robust.trimmed_mean,
    "geometric-median": robust.geometric_median,
    "flag": robust.flag,
}
LINEAR: dict[str, type[FedAvg]] = {"fedavg": FedAvg, "fedprox": FedProx, "fedadam": FedAdam}


def make_strategy(name: str, settings: Mapping[str, float] | None = None) -> Strategy:
    """The strategy of that name; "robust" is the default robust one. Raises `UsageProblem`."""
    given = dict(settings or {})
    name = DEFAULT_ROBUST if name == "robust" else name
    if name not in LINEAR and name not in RULES:
        raise UsageProblem(f"no strategy {name!r}; there are: {', '.join(['robust', *LINEAR, *RULES])}")
    try:
        return LINEAR[name](**given) if name in LINEAR else Robust(name, **given)
    except TypeError as error:
        raise UsageProblem(f"strategy {name!r}: {error}") from error


class Sum:
    """A weighted mean in the making: rows are added one by one and not kept. Two rows of memory."""

    def __init__(self, size: int) -> None:
        self._total = np.zeros(size, np.float64)
        self.weight = 0.0

    def add(self, row: Flat, weight: float) -> None:
        """Take in `weight` times a row; a chunk at a time, so that nothing of its size is made beside it."""
        for at in range(0, len(row), robust.COLUMNS):
            part = slice(at, at + robust.COLUMNS)
            self._total[part] += row[part] * np.float64(weight)
        self.weight += weight

    def mean(self) -> Flat:
        """The mean so far, [size]; zeros where nothing was added."""
        mean: Flat = (self._total / (self.weight or 1.0)).astype(np.float32)
        return mean


def combine_all(strategy: Strategy, rows: Sequence[Flat], weights: Sequence[float]) -> Flat:
    """What a strategy makes of all updates of a round at once."""
    if strategy.is_linear:
        total = Sum(len(rows[0]))
        for row, weight in zip(rows, weights, strict=True):
            total.add(row, weight)
        return total.mean()
    scaled = [
        row if weight == 1.0 else row * np.float32(weight) for row, weight in zip(rows, weights, strict=True)
    ]
    return strategy.combine(scaled)


def add_scaled(model: Flat, update: Flat, rate: float) -> Flat:
    """`model` + `rate` * `update`, a new row."""
    moved: Flat = model + np.float32(rate) * update
    return moved


def _positive(**settings: float) -> None:
    for name, value in settings.items():
        if not value > 0:
            raise UsageProblem(f"{name} = {value}: it must be above 0")


def _share(**settings: float) -> None:
    for name, value in settings.items():
        if not 0 <= value < 1:
            raise UsageProblem(f"{name} = {value}: it must be in [0, 1)")
