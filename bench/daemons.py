"""Daemons as processes of their own, for what is measured over real sockets: start them, ask them, end them.

A `Machine` is a home and the process that runs in it, at most one at a time; it may die and be started again.
`owner` is a node of this process, founder of a swarm, that lends nothing: who measures holds the sessions.
"""

from __future__ import annotations

import http.client
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

import psutil
import trio

from mycel.compute.infer.request import Holder
from mycel.node import daemon
from mycel.node.client import Client, ControlError, NotRunning
from mycel.node.config import PRESETS, Config
from mycel.node.memory import VolatileMemory
from mycel.node.running import Node
from mycel.node.tcp import TcpNetwork
from mycel.node.trust import open_trust

STOP_S = 10.0
POLL_S = 0.05


class NotSo(Exception):
    """Something that was to be shown is not true, or took too long to be shown."""


class Machine:
    """A home, and the daemon that runs in it."""

    def __init__(self, home: Path, command: Sequence[str]) -> None:
        """`command`: what `mycel` is run with, `--home` apart."""
        self.name = home.name
        self.peer = ""
        self._home = home
        self._command = [sys.executable, "-m", "mycel", *command, "--home", str(home), "--label", self.name]
        self._process: subprocess.Popen[bytes] | None = None
        self._api = ""

    def start(self) -> None:
        """Start the daemon; `is_up` says when it is there."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MYCEL_")}
        with open(self._log, "ab") as log:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
            )

    @property
    def _log(self) -> Path:
        return self._home.with_suffix(".log")

    @property
    def pid(self) -> int:
        """The daemon's process id."""
        assert self._process is not None, "start it first"
        return self._process.pid

    def is_up(self, members: int) -> bool:
        """Whether the daemon answers and is connected with so many members. Raises `NotSo` if it ended."""
        assert self._process is not None, "start it first"
        if self._process.poll() is not None:
            raise NotSo(f"{self.name} ended by itself:\n{self.last_words()}")
        try:
            status = Client(self._home, timeout_s=5.0).get("status")
        except (NotRunning, ControlError):
            return False
        self.peer, self._api = status["peer"], status["api"]
        return bool(status["pid"] == self.pid and status["peers"] == members)

    def counter(self, name: str) -> int:
        """One of its metrics, by the name without `mycel_` and `_total`."""
        url = urlsplit(self._api)
        connection = http.client.HTTPConnection(url.hostname or "", url.port or 80, timeout=5.0)
        try:
            connection.request("GET", "/metrics")
            text = connection.getresponse().read().decode()
        finally:
            connection.close()
        wanted = f"mycel_{name}_total "
        return int(float(next(line for line in text.splitlines() if line.startswith(wanted)).split()[1]))

    def workers(self) -> list[psutil.Process]:
        """Processes that the daemon started."""
        return list(psutil.Process(self.pid).children(recursive=True))

    def signal(self, number: signal.Signals) -> None:
        """Send the daemon, not its workers, a signal."""
        os.kill(self.pid, number)

    def wait(self) -> None:
        """Wait for the end of a daemon that was told to end, and help where it does not."""
        if self._process is None:
            return
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def stop(self) -> None:
        """Tell the daemon to end, if it runs."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGCONT)
            self._process.terminate()

    def last_words(self) -> str:
        """The end of what it wrote."""
        return "\n".join(self._log.read_text("utf-8", "replace").splitlines()[-12:])


@asynccontextmanager
async def owner(home: Path) -> AsyncIterator[Node]:
    """A node of this process that founds a swarm and lends nothing."""
    network = TcpNetwork()
    trust = open_trust(home, now=network.wall(), entropy=network.entropy)
    papers = daemon.Papers(trust.identity, trust.credentials, trust.keep, VolatileMemory(), ())
    config = Config(**{**PRESETS["local"], "home": home, "assign": False})
    async with trio.open_nursery() as nursery:
        yield await nursery.start(partial(daemon.run, config, network, _no_engine, papers))
        nursery.cancel_scope.cancel()


def _no_engine() -> NoReturn:
    raise AssertionError("the owner was asked to load layers")


def ready(node: Node) -> list[Holder]:
    """Holders of any model that `node` sees ready."""
    return [
        holder for model in node.generator.models() for holder in model.holders if holder.state == "ready"
    ]


async def until(what: str, seconds: float, holds: Callable[[], Any]) -> None:
    """Ask in a thread, for `holds` may block, until the answer is true. Raises `NotSo` naming `what`."""
    deadline = time.monotonic() + seconds
    while not await trio.to_thread.run_sync(holds):
        if time.monotonic() > deadline:
            raise NotSo(f"{what} within {seconds:.0f} s")
        await trio.sleep(POLL_S)
