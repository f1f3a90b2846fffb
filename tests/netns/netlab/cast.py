"""Players at all sites of a lab: one process each, asked and answering over a socket.

    async with cast(lab, folder) as players:
        ticket = (await players["hub"].ask("found"))["ticket"]

`folder` gets a log for each. When the context is left, or this process ends, so do the players.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from netlab.space import Space, die_with_parent

ANSWER_S = 60.0
STOP_S = 10.0


class PlayerFailed(Exception):
    """A player could not do what it was asked for, or is gone; the text says why."""


class Voice:
    """What a player is asked through."""

    def __init__(self, name: str, control: socket.socket, log: Path) -> None:
        self.name = name
        self.log = log
        self._stream = trio.SocketStream(trio.socket.from_stdlib_socket(control))
        self._turn = trio.Lock()
        self._rest = b""

    async def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Do it, one at a time. Raises `PlayerFailed` within `ANSWER_S`."""
        async with self._turn:
            try:
                with trio.fail_after(ANSWER_S):
                    await self._stream.send_all(json.dumps({"do": do, **arguments}).encode() + b"\n")
                    answer = json.loads(await self._line())
            except (trio.TooSlowError, trio.BrokenResourceError, ValueError) as error:
                raise PlayerFailed(
                    f"{self.name} does not answer to {do}: {error!r}; see {self.log}"
                ) from None
        if "error" in answer:
            raise PlayerFailed(f"{self.name} could not {do}: {answer['error']}")
        found: dict[str, Any] = answer
        return found

    async def _line(self) -> bytes:
        while b"\n" not in self._rest:
            data = await self._stream.receive_some()
            if not data:
                raise ValueError("it ended")
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    async def aclose(self) -> None:
        """Let the player end."""
        await self._stream.aclose()


@asynccontextmanager
async def cast(spaces: Iterable[tuple[str, Space]], folder: Path) -> AsyncIterator[dict[str, Voice]]:
    """A player in every space, by name. Enter it from a thread that lives as long."""
    parts: list[dict[str, Any]] = []
    voices: dict[str, Voice] = {}
    theirs: list[socket.socket] = []
    for name, space in spaces:
        ours, control = socket.socketpair()
        log = folder / f"{name.replace(' ', '-')}.log"
        parts.append({"space": space.fd, "control": control.fileno(), "log": str(log)})
        voices[name] = Voice(name, ours, log)
        theirs.append(control)
    process = _start(parts, folder)
    try:
        for control in theirs:
            control.close()
        yield voices
    finally:
        with trio.CancelScope(shield=True):
            for voice in voices.values():
                await voice.aclose()
        _end(process)


def _start(parts: list[dict[str, Any]], folder: Path) -> subprocess.Popen[bytes]:
    """The process that becomes the players."""
    with open(folder / "players.log", "ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "netlab.player"],
            stdin=subprocess.PIPE,
            stderr=log,
            pass_fds=[int(part[what]) for part in parts for what in ("space", "control")],
            preexec_fn=die_with_parent,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        )
    assert process.stdin is not None
    process.stdin.write(json.dumps(parts).encode() + b"\n")
    process.stdin.close()
    return process


def _end(process: subprocess.Popen[bytes]) -> None:
    """Wait for the players, and help where they do not end."""
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
