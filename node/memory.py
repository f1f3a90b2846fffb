"""What a node remembers between two runs, by name: ports, peers' addresses, its chain.

Small values only. On disk each is a file of mode 0600 in the node's home, there whole or not at all; a
simulated node's memory is a dictionary. Losing it costs a node time, never its identity: keys are not here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from mycel.node.keyfile import write_private

VALUE_BYTES_MAX = 1 << 20


class Memory(Protocol):
    """Bytes by name; names are plain words."""

    def get(self, name: str) -> bytes | None:
        """What was put under `name`, None when nothing was or it cannot be read any more."""

    def put(self, name: str, value: bytes) -> None:
        """Keep `value` under `name` instead of what stood there."""


class VolatileMemory:
    """A memory that ends with the process."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}

    def get(self, name: str) -> bytes | None:
        """As `Memory.get`."""
        return self._values.get(name)

    def put(self, name: str, value: bytes) -> None:
        """As `Memory.put`."""
        self._values[name] = value


class FolderMemory:
    """A memory in files `NAME.json` of a folder, which is made (0700) when there is something to keep."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get(self, name: str) -> bytes | None:
        """As `Memory.get`."""
        try:
            with open(self._path(name), "rb") as file:
                value = file.read(VALUE_BYTES_MAX + 1)
        except OSError:
            return None
        return value if len(value) <= VALUE_BYTES_MAX else None

    def put(self, name: str, value: bytes) -> None:
        """As `Memory.put`. Raises `OSError` when the folder cannot be written."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_private(self._path(name), value, replace=True)

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.json"
