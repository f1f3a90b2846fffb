"""Stands before the memory of an operation: threads pass it for as long as they read or write there."""

from __future__ import annotations

import threading


class Doorway:
    """`mycel.protocol.lane.Gate`, which its owner can close."""

    __slots__ = ("_empty", "_inside", "_turn", "is_closed")

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._empty = threading.Condition(self._turn)
        self._inside = 0
        self.is_closed = False

    def enter(self) -> bool:
        """See `Gate.enter`."""
        with self._turn:
            if self.is_closed:
                return False
            self._inside += 1
            return True

    def leave(self) -> None:
        """See `Gate.leave`."""
        with self._turn:
            self._inside -= 1
            if self.is_closed and not self._inside:
                self._empty.notify_all()

    def close(self) -> None:
        """Let nobody in any more, and wait for those inside: as long as it takes to seal or add a chunk."""
        with self._turn:
            self.is_closed = True
            while self._inside:
                self._empty.wait()
