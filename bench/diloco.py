"""DiLoCo against data-parallel training: a byte LM on Python's own sources, four workers, real processes.

    loss_vs_parallel     held-out loss of DiLoCo (a border every 50 steps, int8 with error feedback) over that
                         of averaging every step's gradients, after the same tokens
    loss_vs_alone        the same over one worker that trains by itself, on a quarter of the tokens
    bytes_vs_parallel    bytes on the loopback device during DiLoCo, everything counted, over those of
                         an fp32 ring all-reduce at every step (computed: 2 (n - 1) times the weights)
    async_vs_compute     wall time with overlap, each sum a second late, over the same steps without peers
    sync_vs_compute      the same without overlap, for comparison

All workers must end with the same bits, or the benchmark fails.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from daemons import Machine
from measure import report

from mycel.node.client import Client

WORKERS = 4
TRAINING = {
    "workers": WORKERS, "steps": 20_000, "batch": 64, "rate": 4e-3, "every": 50,
    "outer_rate": 0.7, "momentum": 0.8, "overlap": False, "delay_s": 0.0,
}  # fmt: skip
DELAYED = {**TRAINING, "steps": 400, "batch": 4096, "delay_s": 1.0}
"""Steps long enough that a second is less than fifty of them."""
PARALLEL_RATES = (4e-3, 8e-3)
"""The better one counts: what is compared with has the learning rate that suits it."""


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

    def ask(self, content: Mapping[str, Any], workers: int = WORKERS) -> list[dict[str, Any]]:
        """Ask the first so many at once; their answers."""
        for process in self._processes[:workers]:
            assert process.stdin is not None
            process.stdin.write(json.dumps(content) + "\n")
            process.stdin.flush()
        return self.hear(workers)

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


def main() -> None:
    """Measure and report."""
    workers = Workers()
    try:
        with swarm() as ticket:
            parallel = [
                workers.ask({**TRAINING, "rate": rate, "do": "parallel"}, 1)[0] for rate in PARALLEL_RATES
            ]
            best = min(one["loss"] for one in parallel)
            print(f"data-parallel: {', '.join(format(one['loss'], '.4f') for one in parallel)} nats a byte")
            alone = workers.ask({**TRAINING, "do": "alone"})
            one = sum(worker["loss"] for worker in alone) / WORKERS
            print(f"one worker by itself: {one:.4f}")
            together = diloco(workers, ticket, "quality", TRAINING)
            print(f"DiLoCo: {together['loss']:.4f} after {together['steps']} steps, {together['s']:.0f} s")
            per_step = 2 * (WORKERS - 1) * 4 * parallel[0]["weights"]  # of all workers together
            compute = max(worker["s"] for worker in workers.ask({**DELAYED, "do": "alone"}))
            late = diloco(workers, ticket, "late", {**DELAYED, "overlap": True})
            waiting = diloco(workers, ticket, "waiting", DELAYED)
            print(f"{DELAYED['steps']} steps: {compute:.1f} s alone, {late['s']:.1f} s with late sums, "
                  f"{waiting['s']:.1f} s where they are waited for")  # fmt: skip
            report(
                "diloco",
                {
                    "loss_vs_parallel": together["loss"] / best,
                    "loss_vs_alone": together["loss"] / one,
                    "loss": together["loss"],
                    "bytes_vs_parallel": together["bytes"] / (per_step * TRAINING["steps"]),
                    "async_vs_compute": late["s"] / compute,
                    "sync_vs_compute": waiting["s"] / compute,
                },
            )
    finally:
        workers.end()


if __name__ == "__main__":
    main()
