"""Real processes: `mycel` daemons on loopback, each with a home of its own, all stopped at the end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mycel.compute.model.tiny import tiny_model
from mycel.compute.tokenizer import byte_level_tokenizer_files

UP_S = 60.0


def environment() -> dict[str, str]:
    """This process's, without settings of a node."""
    return {key: value for key, value in os.environ.items() if not key.startswith("MYCEL_")}


class Machine:
    """A home, and the commands that are run on it."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.process: subprocess.Popen[str] | None = None

    def run(self, *command: str, rc: int = 0, text: str | None = None) -> subprocess.CompletedProcess[str]:
        """`mycel COMMAND --home HOME`, which must exit with `rc`; its output."""
        done = subprocess.run(
            [sys.executable, "-m", "mycel", *command, "--home", str(self.home)],
            input=text,
            capture_output=True,
            text=True,
            timeout=90,
            env=environment(),
        )
        assert done.returncode == rc, done.stderr
        assert "Traceback" not in done.stderr
        return done

    def json(self, *command: str) -> Any:
        """The JSON that a command prints."""
        return json.loads(self.run(*command, "--json").stdout)

    def start(self, *command: str) -> dict[str, Any]:
        """Start `mycel up` or `join`; what it says once it is up."""
        options = ("--home", str(self.home), "--preset", "local", "--threads", "1", "--json")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mycel", *command, *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.process.communicate()[1]
        event: dict[str, Any] = json.loads(line)
        assert event["event"] == "up"
        return event

    def stop(self) -> int:
        """SIGTERM, then what it exited with."""
        if self.process is None:
            return 0
        self.process.terminate()
        try:
            self.process.communicate(timeout=15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()
        return self.process.returncode


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Callable[[str], Machine]]:
    """`machine("a")`: a machine with a home of that name."""
    machines: dict[str, Machine] = {}

    def get(name: str) -> Machine:
        return machines.setdefault(name, Machine(tmp_path / name))

    yield get
    for one in machines.values():
        one.stop()


@pytest.fixture(scope="session")
def byte_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 4 layers that reads and writes bytes."""
    folder = tiny_model(
        tmp_path_factory.mktemp("models") / "tiny",
        seed=3,
        vocab_size=257,
        max_position_embeddings=512,
        eos_token_id=256,
    )
    for name, content in byte_level_tokenizer_files().items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def poll() -> Callable[[Callable[[], Any]], Any]:
    """Ask until the answer is true, at most a minute; returns it."""

    def ask_until(ask: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + UP_S
        while time.monotonic() < deadline:
            if answer := ask():
                return answer
            time.sleep(0.1)
        raise AssertionError("it did not come true within a minute")

    return ask_until
