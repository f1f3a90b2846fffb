"""The program itself at a site: `mycel up` and `mycel join` as a user runs them, and what they tell."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mycel.node.client import Client
from netlab.space import Space

STOP_S = 15.0
ANSWER_S = 10.0
POLL_S = 0.1


class Daemon:
    """A home folder, and the `mycel` that runs on it in a namespace. Use it from one lasting thread."""

    def __init__(self, space: Space, home: Path) -> None:
        self.space = space
        self.home = home
        self.process: subprocess.Popen[str] | None = None
        self._log = home.with_suffix(".log")

    def start(self, *command: str) -> dict[str, Any]:
        """`mycel COMMAND` as a daemon; what it says once it is up."""
        options = ("--home", str(self.home), "--label", self.home.name, "--no-assign", "--json")
        with open(self._log, "a", encoding="utf-8") as log:
            self.process = self.space.start(
                [sys.executable, "-m", "mycel", *command, *options, "--log", "debug"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                env=_environment(),
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"it did not come up:\n{self.last_words()}"
        event: dict[str, Any] = json.loads(line)
        assert event["event"] == "up", event
        return event

    def run(self, *command: str) -> str:
        """`mycel COMMAND` beside the daemon, to its end; what it prints. Raises `LabError`."""
        python = [sys.executable, "-m", "mycel", *command, "--home", str(self.home)]
        return self.space.command("env", *(f"{k}={v}" for k, v in _changes().items()), *python)

    def json(self, *command: str) -> Any:
        """The JSON that a command prints."""
        return json.loads(self.run(*command, "--json"))

    def ask(self, what: str) -> Any:
        """What the daemon tells the command line, without starting one: "peers", "models", "status"."""
        return self.space.do(lambda: Client(self.home, timeout_s=ANSWER_S).get(what))

    def paths(self) -> dict[str, str]:
        """How each connected peer is reached, by its label."""
        return {peer["label"]: peer["path"] for peer in self.ask("peers")}

    def stop(self) -> int:
        """SIGTERM, and what it exited with; -9 where it had to be killed."""
        if self.process is None:
            return 0
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.communicate(timeout=STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()
        code, self.process = self.process.returncode, None
        return code

    def last_words(self) -> str:
        """The end of its log."""
        return "\n".join(self._log.read_text("utf-8", "replace").splitlines()[-30:])


def until(what: str, seconds: float, ask: Callable[[], Any]) -> Any:
    """Ask until the answer is true; returns it. Fails naming `what` and the last answer."""
    deadline = time.monotonic() + seconds
    while True:
        answer = ask()
        if answer:
            return answer
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s"
        time.sleep(POLL_S)


def _changes() -> dict[str, str]:
    # Whatever happens in a namespace must not go through a proxy outside it.
    return {"no_proxy": "*", "NO_PROXY": "*"}


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MYCEL_")}
    return {**kept, **_changes()}
