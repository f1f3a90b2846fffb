"""Federated rounds between real processes: ten clients, their trainers, a coordinator, and what kills them.

    rounds      digits by ten clients, against a plain loop in one process over the same shares and seeds:
                rounds to 95 %, seconds a round, bytes between coordinator and clients over the ideal
                (every client, every round: the model once down, one update up, as float32)
    kills       the job again with longer rounds; kill -9 of three clients and the coordinator in mid-round. A
                second coordinator goes on: seconds from the last survivor's work to the round's end
    restart     every process killed in mid-round and started again: the round that is gone on with
    jobs        the kill and the restart as a job of ten daemons (bench/federated_jobs.py)
    flower      the rounds by Flower, where there is one (bench/flower.py says what counts); `vs_flower` is
                how many times longer its round takes than Mycel's of the same run

In `kills` and `restart` the second coordinator starts when the first one's connection ends, with a higher
epoch, and both keep the job in one folder: what rounds themselves take. In `jobs` electors, leases and blocks
stand for that.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from digits import SETTINGS, PlainLoop, deal
from federated_far import key_of
from federated_jobs import measure_jobs
from flower import FLOWER_PYTHON, measure_flower
from measure import report

CLIENTS = 10
TARGET = 0.95
ROUNDS = 20
SEED = 3
SLOW = {**SETTINGS, "epochs": 40, "rate": 0.002}
"""Rounds long enough to be killed in the middle of."""
KILL_IN = 5
"""The round in which is killed."""
LINE_S = 120.0
NAMES = [key_of(f"client{n}").peer_id for n in range(CLIENTS)]


class Far:
    """One of the processes, and the lines that it says."""

    def __init__(self, settings: dict[str, Any], *arguments: str) -> None:
        command = [sys.executable, str(Path(__file__).with_name("federated_far.py")), *arguments]
        environment = {**os.environ, "BENCH_SETTINGS": json.dumps(settings)}
        self.name = arguments[1]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.heard: list[dict[str, Any]] = []
        self._lines: queue.Queue[dict[str, Any] | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        said = self.until(lambda line: "addr" in line)
        self.addr, self.peer = said["addr"], said["peer"]

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(json.loads(line))
        self._lines.put(None)

    def until(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Its next line that is wanted. Ends the benchmark where none comes."""
        while True:
            try:
                line = self._lines.get(timeout=LINE_S)
            except queue.Empty:
                sys.exit(f"{self.name} says nothing more; it said {self.heard[-3:]}")
            if line is None:
                sys.exit(f"{self.name} ended; its error is above, it said {self.heard[-3:]}")
            self.heard.append(line)
            if wanted(line):
                return line

    def drain(self) -> list[dict[str, Any]]:
        """All that it has said."""
        while not self._lines.empty():
            line = self._lines.get()
            if line is not None:
                self.heard.append(line)
        return self.heard

    def tell(self, **what: Any) -> None:
        """Give it something to do."""
        assert self.process.stdin is not None
        print(json.dumps(what), file=self.process.stdin, flush=True)

    def kill(self) -> None:
        """kill -9, now."""
        self.process.kill()
        self.process.wait()


class Swarm:
    """Ten clients and some coordinators that are connected with them."""

    def __init__(
        self,
        stack: ExitStack,
        folder: Path,
        paths: Sequence[Path],
        settings: dict[str, Any],
        bosses: Sequence[str],
    ) -> None:
        self.clients = [
            Far(settings, "client", f"client{n}", str(path), ",".join(bosses)) for n, path in enumerate(paths)
        ]
        self.bosses = [Far(settings, "coordinator", name, str(folder)) for name in bosses]
        for far in [*self.clients, *self.bosses]:
            stack.callback(far.kill)
        for boss in self.bosses:
            boss.tell(connect=[far.addr for far in [*self.clients, *self.bosses] if far is not boss])
            boss.until(lambda line: "connected" in line)


def run_of(epoch: int, rounds: int = ROUNDS, quorum: int = 7) -> dict[str, Any]:
    """A job for a coordinator."""
    return {"epoch": epoch, "rounds": rounds, "quorum": quorum, "strategy": "fedavg", "seed": SEED}


def measure_rounds(folder: Path, paths: Sequence[Path]) -> dict[str, float]:
    """Rounds, seconds and bytes, beside the plain loop's."""
    plain = PlainLoop(paths, NAMES, SEED)
    accuracies, began = [], time.perf_counter()
    for _ in range(ROUNDS):
        plain.round()
        accuracies.append(plain.accuracy())
    plain_s = (time.perf_counter() - began) / ROUNDS
    with ExitStack() as stack:
        swarm = Swarm(stack, folder / "rounds", paths, SETTINGS, ["boss"])
        (boss,) = swarm.bosses
        boss.tell(run=run_of(1))
        done = boss.until(lambda line: "done" in line)
        judged = [line for line in boss.heard if "accuracy" in line]
    by_round = {line["round"]: line["accuracy"] for line in judged}
    ideal = 2 * CLIENTS * ROUNDS * plain.layout.nbytes
    figures = {
        "clients": CLIENTS,
        "parameters": plain.layout.size,
        "rounds": reached(by_round),
        "plain_rounds": reached(dict(enumerate(accuracies, 1))),
        "accuracy": by_round[ROUNDS],
        "plain_accuracy": accuracies[-1],
        "s_per_round": done["done"] / ROUNDS,
        "plain_s_per_round": plain_s,
        "bytes_vs_ideal": (done["sent"] + done["received"]) / ideal,
    }
    print(f"rounds     {figures['rounds']} to 95 % (plain loop {figures['plain_rounds']})", flush=True)
    print(
        f"           {figures['s_per_round'] * 1000:.1f} ms a round (plain loop {plain_s * 1000:.1f})",
        flush=True,
    )
    return figures


def reached(by_round: dict[int, float]) -> int:
    """The first round after which the model is as good as wanted; 0: none."""
    return next((number for number in sorted(by_round) if by_round[number] >= TARGET), 0)


def measure_kills(folder: Path, paths: Sequence[Path]) -> dict[str, float]:
    """Three clients and the coordinator die in mid-round."""
    with ExitStack() as stack:
        undisturbed = Swarm(stack, folder / "calm", paths, SLOW, ["boss"]).bosses[0]
        undisturbed.tell(run=run_of(1))
        undisturbed.until(lambda line: "done" in line)
        calm = [line for line in undisturbed.heard if "accuracy" in line][-1]["accuracy"]
    with ExitStack() as stack:
        swarm = Swarm(stack, folder / "kills", paths, SLOW, ["boss", "standby"])
        boss, standby = swarm.bosses
        standby.tell(watch=boss.peer, run=run_of(2))
        boss.tell(run=run_of(1))
        boss.until(lambda line: line.get("round") == KILL_IN - 1 and "clients" in line)
        first = swarm.clients[0].until(lambda line: line.get("worked") == KILL_IN)  # some are done, some not
        for far in [boss, *swarm.clients[1:4]]:
            far.kill()
        closed = standby.until(lambda line: line.get("round") == KILL_IN and "clients" in line)
        standby.until(lambda line: "done" in line)
        survivors = [swarm.clients[0], *swarm.clients[4:]]
        works = [line for far in survivors for line in far.drain() if line.get("worked") == KILL_IN]
        accuracy = [line for line in standby.heard if "accuracy" in line][-1]["accuracy"]
    last = max(line["at"] for line in works)
    figures = {
        "after_kill_s": closed["at"] - last,
        "notice_s": next(line["took_over"] for line in standby.heard if "took_over" in line) - first["at"],
        "kill_to_round_s": closed["at"] - first["at"],
        "survivors_counted": closed["clients"],
        "works_of_that_round": len(works),
        "accuracy_after_kills": accuracy,
        "accuracy_undisturbed": calm,
    }
    print(
        f"kills      round ended {figures['after_kill_s']:.2f} s after the last survivor's work", flush=True
    )
    return figures


def measure_restart(folder: Path, paths: Sequence[Path]) -> dict[str, float]:
    """Everybody dies in mid-round and is started again."""
    with ExitStack() as stack:
        swarm = Swarm(stack, folder / "restart", paths, SLOW, ["boss"])
        swarm.bosses[0].tell(run=run_of(1))
        swarm.bosses[0].until(lambda line: line.get("round") == KILL_IN - 1 and "clients" in line)
        swarm.clients[0].until(lambda line: line.get("worked") == KILL_IN)
        for far in [*swarm.bosses, *swarm.clients]:
            far.kill()
    with ExitStack() as stack:
        swarm = Swarm(stack, folder / "restart", paths, SLOW, ["boss"])
        began = time.monotonic()
        swarm.bosses[0].tell(run=run_of(2))
        swarm.bosses[0].until(lambda line: "clients" in line)
        first = swarm.bosses[0].heard[-1]
        swarm.bosses[0].until(lambda line: "done" in line)
        accuracy = [line for line in swarm.bosses[0].heard if "accuracy" in line][-1]["accuracy"]
    print(f"restart    killed in round {KILL_IN}, went on with round {first['round']}", flush=True)
    return {
        "killed_in": KILL_IN,
        "resumed_at": first["round"],
        "restart_to_round_s": first["at"] - began,
        "accuracy_after_restart": accuracy,
    }


def main() -> None:
    """Measure and report."""
    named = os.environ.pop(FLOWER_PYTHON, None)  # no setting of a daemon, though it begins like one
    parts = {
        "rounds": measure_rounds,
        "flower": partial(measure_flower, names=NAMES, seed=SEED, named=named),
        "kills": measure_kills,
        "restart": measure_restart,
        "jobs": partial(measure_jobs, settings=SLOW),
    }
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="+", choices=list(parts), default=list(parts))
    chosen = parser.parse_args().only
    folder = Path(tempfile.mkdtemp(prefix="mycel-bench-"))
    figures: dict[str, float] = {}
    try:
        paths = deal(folder, CLIENTS)
        for part in chosen:
            figures |= parts[part](folder, paths)
    finally:
        shutil.rmtree(folder)
    if "s_per_round" in figures and "flower_s_per_round" in figures:
        figures["vs_flower"] = figures["flower_s_per_round"] / figures["s_per_round"]
        print(f"           {figures['vs_flower']:.0f} times Mycel's", flush=True)
    report("federated", figures)


if __name__ == "__main__":
    main()
