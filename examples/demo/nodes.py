"""The demo's daemons: real `mycel` processes on loopback, each with a home of its own.

Whatever happens, leaving `Swarm`'s block stops every process that it started.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mycel.node.client import Client, ControlError, NotRunning

START_S = 60.0
READY_S = 180.0
"""How long until all layers have a holder: each worker imports torch first."""
STOP_S = 8.0


class DemoFailed(Exception):
    """Something the demo shows is not true, or could not be shown."""


@dataclass(slots=True)
class Daemon:
    """One running node."""

    name: str
    home: Path
    process: subprocess.Popen[bytes]
    peer: str = ""
    api: str = ""
    is_killed: bool = False

    @property
    def control(self) -> Client:
        """Its control API."""
        return Client(self.home)

    def kill(self) -> None:
        """SIGKILL: no goodbye."""
        self.is_killed = True
        self.process.kill()

    def last_words(self) -> str:
        """The end of what it wrote to its standard error."""
        log = self.home.with_suffix(".log")
        return "\n".join(log.read_text("utf-8", "replace").splitlines()[-8:])


class Swarm:
    """Daemons of one swarm. A context manager."""

    def __init__(self, options: list[str]) -> None:
        """`options` are given to every daemon."""
        self._options = options
        self._folder = Path(tempfile.mkdtemp(prefix="mycel-demo-"))
        self.daemons: list[Daemon] = []

    def __enter__(self) -> Swarm:
        return self

    def __exit__(self, *_: object) -> None:
        for daemon in self.daemons:
            if daemon.process.poll() is None:
                daemon.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + STOP_S
        for daemon in self.daemons:
            try:
                daemon.process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                daemon.process.kill()
                daemon.process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def start(self, name: str, *command: str) -> Daemon:
        """Start `mycel COMMAND ...` as node `name`; `await_up` says when it is there.

        A node that was killed comes back under its name, in its place.
        """
        home = self._folder / name
        environment = {key: value for key, value in os.environ.items() if not key.startswith("MYCEL_")}
        with open(home.with_suffix(".log"), "wb") as log:
            process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "mycel",
                    *command,
                    "--home",
                    str(home),
                    "--label",
                    name,
                    *self._options,
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                env=environment,
            )
        daemon = Daemon(name, home, process)
        names = [other.name for other in self.daemons]
        if name in names:
            self.daemons[names.index(name)] = daemon
        else:
            self.daemons.append(daemon)
        return daemon

    def await_up(self, daemon: Daemon) -> None:
        """Wait until `daemon` answers. Raises `DemoFailed`."""
        status = self._poll(START_S, f"{daemon.name} did not start", lambda: _status(daemon))
        daemon.peer, daemon.api = status["peer"], status["api"]

    def await_true(self, seconds: float, what: str, is_true: Any) -> Any:
        """Wait until `is_true()` gives something true and return it. Raises `DemoFailed` naming `what`."""
        return self._poll(seconds, what, is_true)

    def check(self) -> None:
        """Raise `DemoFailed` where a daemon that nobody killed has ended."""
        for daemon in self.daemons:
            if not daemon.is_killed and daemon.process.poll() is not None:
                raise DemoFailed(f"{daemon.name} ended by itself:\n{daemon.last_words()}")

    def by_peer(self, peer: str) -> Daemon:
        """The daemon with that peer id."""
        return next(daemon for daemon in self.daemons if daemon.peer == peer)

    def _poll(self, seconds: float, what: str, ask: Any) -> Any:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self.check()
            if answer := ask():
                return answer
            time.sleep(0.1)
        words = "\n".join(f"{daemon.name}: {daemon.last_words()}" for daemon in self.daemons)
        raise DemoFailed(f"{what} within {seconds:.0f} s\n{words}")


def _status(daemon: Daemon) -> dict[str, Any] | None:
    try:
        return dict(daemon.control.get("status"))
    except (NotRunning, ControlError, json.JSONDecodeError):
        return None
