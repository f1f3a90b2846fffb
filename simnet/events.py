"""What happened, folded into one hash.

Every event of the simulated world passes here: when, what, from whom, to whom, how many bytes and their
checksum. Two runs did the same iff their hashes are equal. Invariant checkers (`mycel.simnet.check`) watch
the same stream of events, so nothing can happen behind their back.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import trio

RECENT_EVENTS = 64
"""How many of the last events are kept in full: what a failed check prints."""


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened. `at` is in virtual seconds, `crc` the CRC-32 of the `size` bytes."""

    at: float
    kind: str
    source: str
    target: str
    size: int = 0
    crc: int = 0

    def __str__(self) -> str:
        return f"{self.at:.9f} {self.kind} {self.source} > {self.target} {self.size} {self.crc:08x}"


class Trace:
    """The events of one run."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)
        self._watchers: list[Callable[[Event], None]] = []
        self.recent: deque[Event] = deque(maxlen=RECENT_EVENTS)
        self.counts: dict[str, int] = {}

    def note(self, kind: str, source: str, target: str, size: int = 0, crc: int = 0) -> None:
        """Something happened now."""
        event = Event(trio.current_time(), kind, source, target, size, crc)
        self._hash.update(f"{event.at!r} {kind} {source} {target} {size} {crc}\n".encode())
        self.counts[kind] = self.counts.get(kind, 0) + 1
        self.recent.append(event)
        for watch in self._watchers:
            watch(event)

    def watch(self, watcher: Callable[[Event], None]) -> None:
        """Call `watcher` with every event from now on."""
        self._watchers.append(watcher)

    @property
    def hash(self) -> str:
        """The hash of everything so far, 32 hex digits."""
        return self._hash.copy().hexdigest()
