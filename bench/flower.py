"""The same federated rounds by Flower: a SuperLink and ten SuperNodes on loopback, beside Mycel's.

Flower is not a dependency of this project. Where this interpreter has it, or the one that the environment
variable MYCEL_FLOWER_PYTHON names, its own programs are started as its documentation says: flower-superlink
and ten flower-supernode processes without TLS, with the defaults of everything else; `flwr run` hands over
the app in bench/flower_far.py. Same shares of digits, same first model, same batches from the same seeds,
same steps (`flower_digits`), same average: the accuracies must be those of the plain loop, or the figure is
thrown away.

What is counted: a round as Flower's server sees it, from the end of the one before to the average. Not
counted, in Flower's favour: starting everything, the first round (`flower_s_per_round_all` has it), judging,
which Mycel's clients do in every round and Flower's do not, and encryption, which Mycel's has and Flower's
runs without here. Flower gives no signs of life to outside, telemetry and its look for updates are off.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from shutil import copy
from typing import Any, NoReturn

import numpy as np
import psutil
from daemons import NotSo
from digits import SETTINGS, PlainLoop

from mycel.compute.train.rows import unflatten

FLOWER_PYTHON = "MYCEL_FLOWER_PYTHON"
HINT = (
    "python3 -m venv flower && flower/bin/pip install flwr==1.42.0 numpy, then "
    f"{FLOWER_PYTHON}=flower/bin/python make bench NAME=federated"
)
ROUNDS = 4
START_S, LIMIT_S = 90.0, 300.0
"""Until the SuperLink listens; for the rounds, of which two at least must be done by then."""
STOP_S = 10.0
HERE = Path(__file__).resolve().parent
PROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "digits"
version = "1.0.0"
description = "Digits by ten clients"
license = "Apache-2.0"
dependencies = ["flwr"]
[tool.flwr.app]
publisher = "bench"
[tool.flwr.app.components]
serverapp = "flower_far:server_app"
clientapp = "flower_far:client_app"
[tool.flwr.app.config]
"""


def find_flower(named: str | None) -> tuple[Path, str] | None:
    """(Python that has Flower, Flower's version): the one `named`, or this one; None where it has none.

    Raises `NotSo` where the one that is named has none.
    """
    if named is None and importlib.util.find_spec("flwr") is None:
        return None
    python = Path(named or sys.executable)
    command = [str(python), "-c", "from importlib.metadata import version; print(version('flwr'))"]
    try:
        return python, subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        raise NotSo(f"{FLOWER_PYTHON} = {named} has no Flower: {error}") from None


class Deployment:
    """Flower's processes, their home and their log."""

    def __init__(self, python: Path, folder: Path) -> None:
        self.folder = folder
        self._bin = python.parent
        self._port = _free_port()
        self._log = folder / "flower.log"
        self._started: list[subprocess.Popen[bytes]] = []
        home = folder / "home"
        home.mkdir(parents=True)
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{self._port}"\n'
            "insecure = true\n"
        )
        self._environment = {
            **os.environ,
            "PATH": f"{self._bin}{os.pathsep}{os.environ['PATH']}",
            "FLWR_HOME": str(home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }

    def start(self, paths: Sequence[Path], names: Sequence[str]) -> None:
        """The SuperLink, and a SuperNode for each client. Raises `NotSo`."""
        self._spawn(
            "flower-superlink", "--insecure", "--disable-runtime-dependency-installation",
            "--host", "127.0.0.1", "--port", str(self._port),
        )  # fmt: skip
        deadline = time.monotonic() + START_S
        while not _listens(self._port):
            self.check(deadline, "the SuperLink listens")
            time.sleep(0.1)
        for path, name in zip(paths, names, strict=True):
            self._spawn(
                "flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{self._port}",
                "--port", str(_free_port()), "--node-config", f'data="{path}" name="{name}"',
            )  # fmt: skip

    def run(self, app: Path) -> None:
        """Hand over an app. Raises `NotSo`."""
        command = [str(self._bin / "flwr"), "run", str(app), "here"]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, env=self._environment, timeout=START_S
            )
        except subprocess.TimeoutExpired as error:
            raise NotSo(f"flwr run took more than {error.timeout:.0f} s") from None
        if done.returncode:
            raise NotSo(f"flwr run failed: {done.stdout[-2000:]}{done.stderr[-2000:]}")

    def check(self, deadline: float, what: str) -> None:
        """Raise `NotSo` where a process ended, or the time is up."""
        ended = [process.args for process in self._started if process.poll() is not None]
        if ended or time.monotonic() > deadline:
            words = "\n".join(self._log.read_text("utf-8", "replace").splitlines()[-30:])
            raise NotSo(f"{words}\nFlower: not in time: {what}; ended by themselves: {ended}")

    def stop(self) -> None:
        """End all that was started, and what that started in turn."""
        for process in self._started:
            if process.poll() is None:
                process.terminate()
        for process in self._started:
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        while family := self._family():
            for one in family:
                one.kill()
            psutil.wait_procs(family, timeout=STOP_S)

    def _family(self) -> list[psutil.Process]:
        """What runs with this deployment's home: Flower's programs start others, in sessions of their own."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("FLWR_HOME") == self._environment["FLWR_HOME"]:
                    found.append(process)
            except psutil.Error:  # it ended meanwhile, or is another user's
                continue
        return found

    def _spawn(self, program: str, *arguments: str) -> None:
        with open(self._log, "ab") as log:
            self._started.append(
                subprocess.Popen(
                    [str(self._bin / program), *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=self._environment,
                    cwd=self.folder,
                )
            )


def write_app(folder: Path, config: Mapping[str, str | int | float]) -> Path:
    """The app as a folder that Flower bundles."""
    app = folder / "app"
    app.mkdir(parents=True)
    for name in ("flower_far.py", "flower_digits.py"):
        copy(HERE / name, app)
    lines = [f"{key} = {json.dumps(value)}" for key, value in config.items()]
    (app / "pyproject.toml").write_text(PROJECT + "\n".join(lines) + "\n")
    return app


def measure_flower(
    folder: Path, paths: Sequence[Path], names: Sequence[str], seed: int, named: str | None
) -> dict[str, Any]:
    """Flower's seconds a round, by clients of these files and names; nothing where it is not installed, in
    the interpreter `named` or else in this one.

    Nothing either where it does not get through, as on a machine too busy to start a client's process within
    30 s: Flower then starts it again, for ever. Raises `NotSo` where its rounds end elsewhere than the plain
    loop's.
    """
    found = find_flower(named)
    if found is None:
        print(f"flower     is not here; {HINT}", flush=True)
        return {}
    python, version = found
    plain, accuracies = PlainLoop(paths, names, seed), []
    model = {name: array.copy() for name, array in unflatten(plain.model, plain.layout).items()}
    for _ in range(ROUNDS):
        plain.round()
        accuracies.append(plain.accuracy())
    try:
        told = run_flower(python, folder / "flower", paths, names, (model, seed))
    except NotSo as error:
        print(f"{error}\nflower     did not get through; no figure", flush=True)
        return {}
    apart = max(abs(one - other) for one, other in zip(told["accuracies"], accuracies, strict=False))
    if apart > 0.01:
        raise NotSo(f"Flower's clients did other work: {told['accuracies']}, the plain loop {accuracies}")
    figures = {
        "flower": version,
        "flower_rounds": len(told["seconds"]),
        "flower_s_per_round": statistics.fmean(told["seconds"][1:]),
        "flower_s_per_round_all": statistics.fmean(told["seconds"]),
        "flower_accuracy": told["accuracies"][-1],
        "plain_accuracy_then": accuracies[len(told["seconds"]) - 1],
    }
    print(f"flower     {figures['flower_s_per_round']:.1f} s a round by Flower {version}", flush=True)
    return figures


def run_flower(
    python: Path,
    folder: Path,
    paths: Sequence[Path],
    names: Sequence[str],
    first: tuple[Mapping[str, Any], int],
) -> dict[str, list[float]]:
    """Seconds of each round that was done, and accuracy after it: {"seconds": [...], "accuracies": [...]}.

    `first`: the first model's arrays by name, and the job's seed. Raises `NotSo`.
    """
    folder.mkdir()
    model, done = folder / "model.npz", folder / "report.json"
    np.savez(model, **first[0])
    config = {**SETTINGS, "seed": first[1], "clients": len(paths), "rounds": ROUNDS}
    places = {"model": str(model), "judge": str(paths[0]), "report": str(done)}
    app = write_app(folder, {**config, **places})
    deployment = Deployment(python, folder)
    with ExitStack() as stack:
        stack.callback(deployment.stop)
        stack.callback(signal.signal, signal.SIGTERM, signal.signal(signal.SIGTERM, _leave))
        deployment.start(paths, names)
        deployment.run(app)
        deadline = time.monotonic() + LIMIT_S
        told: dict[str, list[float]] = {"seconds": []}
        while (ended := len(told["seconds"])) < ROUNDS and (ended < 2 or time.monotonic() < deadline):
            deployment.check(deadline if ended < 2 else math.inf, "two rounds")
            time.sleep(0.2)
            if done.exists():
                told = json.loads(done.read_text())
    return told


def _leave(number: int, frame: object) -> NoReturn:
    sys.exit(128 + number)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(("127.0.0.1", port)) == 0
