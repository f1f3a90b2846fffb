"""DiLoCo against data-parallel training: a byte LM on Python's own sources, four workers, real processes.

    loss_vs_parallel     held-out loss of DiLoCo (a border every 50 steps, int8 with error feedback) over that
                         of averaging every step's gradients, after the same tokens; means of two seeds
    loss_vs_alone        the same over one worker that trains by itself, on a quarter of the tokens
    loss, loss_parallel  nats a byte, the two that the first compares
    bytes_vs_parallel    bytes on the loopback device during DiLoCo, everything counted, over those of
                         an fp32 ring all-reduce at every step (computed: 2 (n - 1) times the weights)
    async_vs_compute     wall time with overlap, each sum a second late, over the same steps without peers
    sync_vs_compute      the same without overlap, for comparison

All have the same model, inner optimizer (AdamW as torch sets it) and schedule (warm-up, cosine down to 2 %).
DiLoCo has one learning rate; of three for what it is compared with the one that ended best counts, in favour
of the other side. A seed gives first weights and batches. All workers must end with the same bits, or the
benchmark fails.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import mean
from typing import Any

import psutil
from daemons import Machine
from measure import report

from mycel.node.client import Client

WORKERS = 4
TRAINING = {
    "workers": WORKERS, "steps": 20_000, "batch": 64, "rate": 4e-3, "memory": 0.999, "every": 50,
    "outer_rate": 1.0, "momentum": 0.7, "overlap": False, "delay_s": 0.0, "seed": 0,
}  # fmt: skip
DELAYED = {**TRAINING, "steps": 400, "batch": 4096, "outer_rate": 0.7, "momentum": 0.5, "delay_s": 1.0}
"""Steps long enough that a second is less than fifty of them."""
SEEDS = (0, 1)
RATES = (4e-3, 8e-3, 16e-3)
"""Of what is compared with, each to be tried."""


class Workers:
    """The processes."""

    def __init__(self) -> None:
        far = str(Path(__file__).with_name("diloco_far.py"))
        self._processes = [
            subprocess.Popen(
                [sys.executable, far, str(number)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            for number in range(WORKERS)
        ]
        self.hear()

    def ask(self, content: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Ask all the same, at once; their answers."""
        return self.ask_each([content] * WORKERS)

    def ask_each(self, contents: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Ask the first so many, each its own, at once; their answers."""
        for process, content in zip(self._processes, contents, strict=False):
            assert process.stdin is not None
            process.stdin.write(json.dumps(content) + "\n")
            process.stdin.flush()
        return self.hear(len(contents))

    def hear(self, workers: int = WORKERS) -> list[dict[str, Any]]:
        """One line of each."""
        answers = []
        for process in self._processes[:workers]:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                sys.exit("a worker ended; what it said stands above")
            answers.append(json.loads(line))
        return answers

    def end(self) -> None:
        """End them."""
        for process in self._processes:
            process.kill()
            process.wait()


@contextmanager
def swarm() -> Iterator[str]:
    """A founder's daemon; the ticket to its swarm."""
    with tempfile.TemporaryDirectory(prefix="mycel-bench-") as folder:
        home = Path(folder) / "founder"
        machine = Machine(home, ["up", "--preset", "local"])
        machine.start()
        try:
            while not machine.is_up(0):
                time.sleep(0.1)
            yield str(Client(home).post("ticket", {"label": "bench"})["text"])
        finally:
            machine.stop()


def sent_on_loopback() -> int:
    """Bytes that the loopback device has carried."""
    return int(psutil.net_io_counters(pernic=True)["lo"].bytes_sent)


def diloco(workers: Workers, ticket: str, group: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """A run; the slowest worker's answer, and the bytes it took in all."""
    before = sent_on_loopback()
    told = workers.ask({**settings, "do": "together", "ticket": ticket, "group": group})
    if len({one["digest"] for one in told}) != 1:
        sys.exit(f"the workers of {group} hold different bits")
    return {**max(told, key=lambda one: one["s"]), "bytes": sent_on_loopback() - before}


def best(workers: Workers, do: str, seeds: Sequence[int]) -> tuple[float, int]:
    """What is compared with: (nats a byte at the best of the rates, mean of the seeds; weights)."""
    told = [
        workers.ask_each([{**TRAINING, "do": do, "seed": seed, "rate": rate} for rate in RATES])
        for seed in seeds
    ]
    means = [mean([one["loss"] for one in ones]) for ones in zip(*told, strict=True)]
    print(f"{do}: {', '.join(format(one, '.4f') for one in means)} nats a byte at rates {RATES}")
    return min(means), told[0][0]["weights"]


def main() -> None:
    """Measure and report."""
    workers = Workers()
    try:
        with swarm() as ticket:
            parallel, weights = best(workers, "parallel", SEEDS)
            alone, _ = best(workers, "alone", SEEDS[:1])
            runs = [diloco(workers, ticket, f"quality-{seed}", {**TRAINING, "seed": seed}) for seed in SEEDS]
            loss = mean([run["loss"] for run in runs])
            print("DiLoCo: " + ", ".join(f"{run['loss']:.4f} in {run['s']:.0f} s" for run in runs))
            per_step = 2 * (WORKERS - 1) * 4 * weights  # of all workers together
            compute = max(worker["s"] for worker in workers.ask({**DELAYED, "do": "alone"}))
            late = diloco(workers, ticket, "late", {**DELAYED, "overlap": True})
            waiting = diloco(workers, ticket, "waiting", DELAYED)
            print(f"{DELAYED['steps']} steps: {compute:.1f} s alone, {late['s']:.1f} s with late sums, "
                  f"{waiting['s']:.1f} s where they are waited for")  # fmt: skip
            report(
                "diloco",
                {
                    "loss_vs_parallel": loss / parallel,
                    "loss_vs_alone": loss / alone,
                    "loss": loss,
                    "loss_parallel": parallel,
                    "bytes_vs_parallel": mean([run["bytes"] for run in runs])
                    / (per_step * TRAINING["steps"]),
                    "async_vs_compute": late["s"] / compute,
                    "sync_vs_compute": waiting["s"] / compute,
                },
            )
    finally:
        workers.end()


if __name__ == "__main__":
    main()
