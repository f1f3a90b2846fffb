"""What arrived on a stream in memory and waits for its reader: the reading half that such streams share.

Pieces come in order, then an end or a loss. One task reads at a time; what it took is told to `on_taken`,
which gives the sender its room back. A loss discards what nobody took yet, as a reset does on the wire; after
an end it changes nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

import trio

from mycel.protocol.errors import RemoteProtocolError


class Inbox:
    """Arrived bytes. `name` is the protocol, for errors."""

    __slots__ = ("_name", "_news", "_on_taken", "_pieces", "_reader", "ended", "loss")

    def __init__(self, name: str, on_taken: Callable[[int], None]) -> None:
        self._name = name
        self._on_taken = on_taken
        self._pieces: deque[bytes] = deque()
        self._news: trio.lowlevel.ParkingLot | None = None  # most streams have no reader that waits
        self._reader = False
        self.ended = False
        """Whether the other side ended."""
        self.loss: Exception | None = None
        """Why nothing more comes, if not for the end."""

    def put(self, data: bytes) -> None:
        """Bytes arrived."""
        self._pieces.append(data)
        self._wake()

    def end(self) -> None:
        """The other side sends no more."""
        self.ended = True
        self._wake()

    def lose(self, error: Exception) -> bool:
        """Nothing more comes, and what waits is gone; whether that is news."""
        if self.loss is not None or self.ended:
            return False
        self.loss = error
        self._pieces.clear()
        self._wake()
        return True

    def _wake(self) -> None:
        if self._news is not None:
            self._news.unpark_all()

    def discard(self) -> None:
        """Nobody will read what waits."""
        self._pieces.clear()

    def take_all(self) -> Iterator[bytes]:
        """What waits, piece by piece, for somebody who is told of the rest directly; not told as taken."""
        while self._pieces:
            yield self._pieces.popleft()

    async def receive_some(self, max_bytes: int) -> bytes:
        """At least one byte, at most `max_bytes`; b"" at the end. Raises the loss."""
        if self._reader:
            raise trio.BusyResourceError(f"another task is waiting for data on a {self._name} stream")
        while not self._pieces:
            if self.loss is not None:
                raise self.loss.with_traceback(None)
            if self.ended:
                return b""
            self._reader = True
            self._news = self._news or trio.lowlevel.ParkingLot()
            try:
                await self._news.park()
            finally:
                self._reader = False
        data = self._pieces.popleft()
        if len(data) > max_bytes:
            self._pieces.appendleft(data[max_bytes:])
            data = data[:max_bytes]
        self._on_taken(len(data))
        return data

    async def receive_exactly(self, count: int) -> bytes:
        """`count` bytes. Raises the loss, and `RemoteProtocolError` where the end comes before."""
        parts: list[bytes] = []
        missing = count
        while missing:
            part = await self.receive_some(missing)
            if not part:
                raise RemoteProtocolError(f"the {self._name} stream ended {missing} bytes short of {count}")
            parts.append(part)
            missing -= len(part)
        return b"".join(parts)
