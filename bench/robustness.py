"""Rules against liars: what accuracy is left when three of ten clients lie, rule by attack.

    python bench/run.py robustness          (make bench NAME=robustness) writes docs/robustness.md as well

Digits by ten clients as in bench/federated.py, in one process, with the rules and the application that jobs
use, one step on eight examples a round. The liars know what the honest ones send in the round and send, all
three, the same:

    sign flip   minus four times the honest mean
    gauss       normal noise, ten times as wide as the honest updates spread
    alie        the honest mean minus 1.5 of its standard deviations in each coordinate (Baruch et al. 2019)
    ipm         minus half of the honest mean (Xie et al. 2019)

each with workers that send their updates, and with workers that send momentum (0.9).
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from digits import PlainLoop, deal
from measure import report
from numpy.typing import NDArray

from mycel.compute.train.strategy import DEFAULT_ROBUST, RULES, Strategy, combine_all, make_strategy

CLIENTS, LIARS = 10, 3
ROUNDS = 300
LOCAL = {"rate": 0.2, "momentum": 0.0, "batch": 8, "steps": 1}
"""One step on eight examples a round: honest updates differ most then, and that is what liars hide in."""
WORST = 0.88
"""What the default rule must not fall below."""
PAGE = Path(__file__).resolve().parents[1] / "docs" / "robustness.md"
BEGIN, END = "<!-- table -->", "<!-- end of table -->"

Rows = NDArray[np.float32]
Attack = Callable[[Rows, np.random.Generator], Rows]
"""(Honest updates [honest, p], randomness) to what every liar sends [liars, p]."""


def alike(row: Rows) -> Rows:
    """Every liar sends the same."""
    return np.repeat(row[None].astype(np.float32), LIARS, axis=0)


ATTACKS: dict[str, Attack] = {
    "none": lambda honest, rng: honest[:LIARS] * 0 + honest.mean(axis=0),
    "sign flip": lambda honest, rng: alike(-4 * honest.mean(axis=0)),
    "gauss": lambda honest, rng: (rng.standard_normal((LIARS, honest.shape[1])) * 10 * honest.std()).astype(
        np.float32
    ),
    "alie": lambda honest, rng: alike(honest.mean(axis=0) - 1.5 * honest.std(axis=0)),
    "ipm": lambda honest, rng: alike(-0.5 * honest.mean(axis=0)),
}
RULE_NAMES = ("fedavg", *RULES)


def accuracy(paths: Sequence[Path], rule: str, attack: str, momentum: float, rounds: int) -> float:
    """On the held-out quarter, after all rounds; the mean of the last five."""
    settings = {} if rule == "fedavg" else {"liars": LIARS / CLIENTS}
    strategy: Strategy = make_strategy(rule, settings)
    loop = PlainLoop(paths, [f"client{n}" for n in range(CLIENTS)], seed=3)
    rng = np.random.default_rng(7)
    kept: dict[int, Rows] = {}
    last: list[float] = []
    for number in range(1, rounds + 1):
        loop.number = number
        honest = []
        for n in range(LIARS, CLIENTS):
            update, _ = loop.update(paths[n], f"client{n}", **LOCAL)
            kept[n] = momentum * kept.get(n, update) + (1 - momentum) * update
            honest.append(kept[n].astype(np.float32))
        rows = [*ATTACKS[attack](np.stack(honest), rng), *honest]
        loop.model = strategy.step(loop.model, combine_all(strategy, rows, [1.0] * CLIENTS))
        if not np.isfinite(loop.model).all() or np.abs(loop.model).max() > 1e6:
            return 0.1  # it diverged: as good as guessing
        if number > rounds - 5:
            last.append(loop.accuracy())
    return float(np.mean(last))


def table(found: dict[tuple[str, str, bool], float]) -> str:
    """The figures as a page's table, percent, without and with worker momentum."""
    lines = ["| rule | " + " | ".join(ATTACKS) + " |", "|---|" + "---|" * len(ATTACKS)]
    for rule in RULE_NAMES:
        name = f"**{rule}** (default)" if rule == DEFAULT_ROBUST else rule
        cells = [
            " / ".join(f"{100 * found[rule, attack, with_momentum]:.0f}" for with_momentum in (False, True))
            for attack in ATTACKS
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_page(text: str) -> None:
    """Put the table where docs/robustness.md has it."""
    page = PAGE.read_text(encoding="utf-8")
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


def main() -> None:
    """Measure, write and report."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="mycel-bench-"))
    found: dict[tuple[str, str, bool], float] = {}
    try:
        paths = deal(folder, CLIENTS)
        for rule in RULE_NAMES:
            for attack in ATTACKS:
                for with_momentum in (False, True):
                    momentum = 0.9 if with_momentum else 0.0
                    found[rule, attack, with_momentum] = accuracy(
                        paths, rule, attack, momentum, options.rounds
                    )
            best = [f"{attack} {100 * found[rule, attack, True]:.0f}" for attack in ATTACKS]
            print(f"{rule:17} with momentum: {', '.join(best)}", flush=True)
    finally:
        shutil.rmtree(folder)
    text = table(found)
    print(text, flush=True)
    worst = min(found[DEFAULT_ROBUST, attack, True] for attack in ATTACKS)
    if options.rounds == ROUNDS:
        write_page(text)
        if worst < WORST:
            raise SystemExit(f"{DEFAULT_ROBUST} with momentum falls to {worst:.3f}; the page says {WORST}")
    names = {True: "momentum", False: "plain"}
    report(
        "robustness",
        {"rounds": options.rounds, "worst_default": worst}
        | {f"{rule}.{attack}.{names[with_]}": value for (rule, attack, with_), value in found.items()},
    )


if __name__ == "__main__":
    main()
