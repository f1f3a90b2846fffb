"""A coordinator's memory in a folder: for one that starts again on its own machine."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import trio

from mycel.protocol.errors import UsageProblem

STANDING = "standing"
KEPT_FILES = 6
"""Models and strategies' rows of the last rounds that stay; older ones are removed."""


class FolderKeep:
    """A `Keep` on disk. What it returned from is there after a crash."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder

    async def keep(self, content: bytes) -> bytes:
        name = hashlib.sha256(content).hexdigest()
        await trio.to_thread.run_sync(self._write, name, content)
        return name.encode()

    async def fetch(self, name: bytes) -> bytes:
        try:
            return (self._folder / name.decode()).read_bytes()
        except OSError as error:
            raise UsageProblem(f"what was kept as {name.decode()} is gone: {error.strerror}") from error

    async def checkpoint(self, state: bytes, names: Sequence[bytes]) -> None:
        await trio.to_thread.run_sync(self._write, STANDING, state)

    async def resume(self) -> bytes | None:
        try:
            return (self._folder / STANDING).read_bytes()
        except FileNotFoundError:
            return None

    def _write(self, name: str, content: bytes) -> None:
        fresh = self._folder / f"{name}.new"
        with fresh.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, self._folder / name)
        kept = [path for path in self._folder.iterdir() if path.name != STANDING and path.suffix != ".new"]
        for path in sorted(kept, key=lambda path: path.stat().st_mtime)[:-KEPT_FILES]:
            path.unlink()
