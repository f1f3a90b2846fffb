"""Following what takes time: a bar on a terminal, nothing elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from mycel.node.client import Client, ControlError


class Bar(Protocol):
    """Shows how far it is."""

    def show(self, what: str, done: int, total: int) -> None: ...


def follow(client: Client, path: str, ask: object) -> Any:
    """Ask for what answers in lines of progress; what came of it. Raises `ControlError`, `NotRunning`."""
    with _bar() as bar:
        for event in client.lines(path, ask):
            if event.get("error"):
                raise ControlError(event["error"])
            if "result" in event:
                return event["result"]
            bar.show(event.get("what", ""), event.get("done", 0), event.get("total", 0))
    raise ControlError("the node ended before it was done: start it and ask again, it goes on where it was")


class _Silent:
    def show(self, what: str, done: int, total: int) -> None:
        """Nobody watches."""


@contextmanager
def _bar() -> Iterator[Bar]:
    if not sys.stderr.isatty():
        yield _Silent()
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield _Shown(progress)


class _Shown:
    """One bar for each thing that is done, one after the other."""

    def __init__(self, progress: Any) -> None:
        self._progress = progress
        self._what = ""
        self._task: Any = None

    def show(self, what: str, done: int, total: int) -> None:
        if what != self._what or self._task is None:
            self._what = what
            self._task = self._progress.add_task(what)
        self._progress.update(self._task, completed=done, total=total or None)
