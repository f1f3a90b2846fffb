"""What a stage sent on, kept so that it can be sent again without computing it again.

Each session has a log of its hidden states with the step boundaries they were computed in. All logs of a
stage share one bound in bytes. When it is hit, the session that was opened first loses its whole log (a
prefix would be of no use: a replacement starts at row 0); from then on its log begins at the row to be
computed next, and a failover behind this stage makes this stage start afresh too.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from mycel.compute.infer.rows import Rows


class SendLog:
    """One session's log: contiguous rows [start : end)."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._entries: deque[Rows] = deque()
        self.start = 0
        self.nbytes = 0
        memory.logs[id(self)] = self

    @property
    def end(self) -> int:
        """The row after the last."""
        return self._entries[-1].end if self._entries else self.start

    def append(self, rows: Rows) -> None:
        """Add what was just computed; it must follow."""
        if rows.position != self.end:
            raise ValueError(f"row {rows.position} does not follow a log that ends at {self.end}")
        self._entries.append(rows)
        self.nbytes += rows.nbytes
        self._memory.grow(rows.nbytes)

    def since(self, row: int) -> Iterator[Rows]:
        """Entries that reach beyond `row`, the first perhaps beginning before it."""
        if row < self.start:
            raise ValueError(f"row {row} is no longer in a log that begins at {self.start}")
        return (entry for entry in self._entries if entry.end > row)

    def drop(self) -> None:
        """Forget all entries; the log goes on from its end."""
        self.start = self.end
        self._entries.clear()
        self._memory.nbytes -= self.nbytes
        self.nbytes = 0

    def close(self) -> None:
        """Leave the memory."""
        self.drop()
        self._memory.logs.pop(id(self), None)


class Memory:
    """What the sessions of a stage hold together: logs, which are bounded here, and rows that wait."""

    def __init__(self, bytes_max: int) -> None:
        self.bytes_max = bytes_max
        self.nbytes = 0
        self.waiting_bytes = 0
        """Hidden states that wait for the engine."""
        self.logs: dict[int, SendLog] = {}  # oldest first

    def grow(self, nbytes: int) -> None:
        """Account for `nbytes` more and drop the oldest logs while over the bound."""
        self.nbytes += nbytes
        for log in list(self.logs.values()):
            if self.nbytes <= self.bytes_max:
                return
            log.drop()
