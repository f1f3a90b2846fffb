"""The same round as a job of ten daemons: submitted, its coordinator and three more killed, and all of them.

Here the coordinator holds a lease of electors, another takes over when it is lost, and models are blobs at
electors. The figures are what an observer sees, a daemon that lives: from kill -9 to the end of the round
that was under way (the lease runs out after two seconds, then the round is gone on with), and the round that
is gone on with after all ten were killed.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from daemons import Machine, NotSo

from mycel.node.client import Client, ControlError, NotRunning

ROUNDS = 12
KILL_AFTER, RESTART_AFTER = 3, 7
"""Rounds that are done when is killed."""
WAIT_S = 120.0


class JobSwarm:
    """Ten daemons, each with its share of the data."""

    def __init__(self, folder: Path, paths: Sequence[Path]) -> None:
        self.machines = [Machine(folder / f"node{n}", ["up", "--preset", "local"]) for n in range(len(paths))]
        self.homes = [folder / machine.name for machine in self.machines]
        for home, path in zip(self.homes, paths, strict=True):
            home.mkdir(mode=0o700, parents=True)
            (home / "config.toml").write_text(f'data = ["digits={path}"]\nassign = false\nthreads = 1\n')

    def found(self) -> None:
        """Start all as one swarm."""
        self.machines[0].start()
        self.wait("the founder is up", lambda: self.machines[0].is_up(0))
        command = [sys.executable, "-m", "mycel", "ticket", "--json", "--home", str(self.homes[0])]
        ticket = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)["text"]
        for n, home in enumerate(self.homes[1:], 1):
            joining = Machine(home, ["join", ticket, "--preset", "local"])
            joining.start()
            self.machines[n] = joining
        self.settle()

    def settle(self) -> None:
        """Wait until all are connected with all."""
        others = len(self.machines) - 1
        self.wait("all are connected", lambda: all(machine.is_up(others) for machine in self.machines))

    def again(self) -> None:
        """Start all again."""
        self.machines = [Machine(home, ["up", "--preset", "local"]) for home in self.homes]
        for machine in self.machines:
            machine.start()

    def kill(self, victims: Sequence[int]) -> None:
        """kill -9."""
        for n in victims:
            self.machines[n].signal(signal.SIGKILL)
        for n in victims:
            self.machines[n].wait()

    def view(self, n: int, job: str) -> dict[str, Any]:
        """The job as node n sees it; nothing where it does not answer."""
        try:
            found: dict[str, Any] = Client(self.homes[n], timeout_s=5.0).post("jobs/view", {"job": job})
        except (NotRunning, ControlError):
            return {"step": -1, "phase": ""}
        return found

    def wait(self, what: str, holds: Callable[[], bool]) -> None:
        """Ask until it is so. Raises `NotSo`."""
        deadline = time.monotonic() + WAIT_S
        while not holds():
            if time.monotonic() > deadline:
                raise NotSo(f"not within {WAIT_S:.0f} s: {what}")
            time.sleep(0.02)


def measure_jobs(folder: Path, paths: Sequence[Path], settings: dict[str, Any]) -> dict[str, float]:
    """Submit, kill four, kill all, and wait for the end."""
    swarm = JobSwarm(folder / "jobs", paths)
    try:
        swarm.found()
        keys = {"kind": "federate", "name": "digits", "app": "classifier", "data": "digits", "rounds": ROUNDS}
        ask = {"job": {**keys, "quorum": 6, "seed": 3, "settings": settings}, "files": {}}
        job = Client(swarm.homes[-1]).post("jobs/submit", ask)["id"]
        return _kill_and_restart(swarm, job)
    finally:
        for machine in swarm.machines:
            machine.stop()
        for machine in swarm.machines:
            machine.wait()


def _kill_and_restart(swarm: JobSwarm, job: str) -> dict[str, float]:
    observer = len(swarm.machines) - 1
    swarm.wait("the job is under way", lambda: swarm.view(observer, job)["step"] >= KILL_AFTER)
    before = swarm.view(observer, job)
    by_peer = {machine.peer: n for n, machine in enumerate(swarm.machines)}
    electors = [by_peer[peer] for peer in before["electors"]]
    free = [n for n in range(observer) if n not in electors]
    victims = [by_peer[before["coordinator"]], *free[:3]]
    time.sleep(0.1)
    swarm.kill(victims)
    killed = time.monotonic()
    step = swarm.view(observer, job)["step"]
    swarm.wait("the round ends", lambda: swarm.view(observer, job)["step"] > step)
    kill_to_round = time.monotonic() - killed
    after = swarm.view(observer, job)
    print(f"jobs       round {after['step']} ended {kill_to_round:.2f} s after four were killed", flush=True)
    swarm.wait("the job goes on", lambda: swarm.view(observer, job)["step"] >= RESTART_AFTER)
    swarm.kill([n for n in range(len(swarm.machines)) if n not in victims])
    swarm.again()
    swarm.wait("a node knows the job", lambda: swarm.view(observer, job)["step"] >= RESTART_AFTER)
    stood = swarm.view(observer, job)["step"]
    swarm.wait("the job is done", lambda: swarm.view(observer, job)["phase"] in ("done", "failed"))
    done = swarm.view(observer, job)
    command = [sys.executable, "-m", "mycel", "logs", job[:8], "--home", str(swarm.homes[observer])]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    went_on = [int(line.split()[-1]) for line in said if "going on after round" in line]
    if done["phase"] != "done" or not went_on:
        raise NotSo(f"the job is {done['phase']}: {done['text']}; it said {said[-8:]}")
    print(
        f"           stood at {stood} after all were killed, went on with round {went_on[-1] + 1}", flush=True
    )
    return {
        "job_kill_to_round_s": kill_to_round,
        "job_survivors_counted": after["metrics"]["clients"],
        "job_resumed_at": went_on[-1] + 1,
        "job_stood_at": stood,
        "job_epochs": done["epoch"],
        "job_accuracy": done["metrics"]["accuracy"],
    }
