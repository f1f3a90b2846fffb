"""Sending many small frames from many tasks on one stream, and counting bytes that many tasks hold.

An `Outlet` sends at once where the peer's window has room, from whichever task or callback has something
to say. Where it has none the frame joins a backlog that one task drains, and senders who can wait do so until
the backlog is short again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable

import trio

from mycel.protocol.errors import ConnectionLost, Refused, StreamClosed, StreamReset
from mycel.protocol.mesh import Buffer, Stream

Spawn = Callable[[Callable[[], Awaitable[None]]], None]
STREAM_GONE = (StreamReset, ConnectionLost, Refused, StreamClosed)
"""What a stream's methods raise once nothing can be sent or received on it any more."""


class Outlet:
    """The sending side of a shared stream."""

    def __init__(self, stream: Stream, spawn: Spawn, backlog_max: int) -> None:
        self._stream = stream
        self._spawn = spawn
        self._backlog_max = backlog_max
        self._backlog: deque[bytes] = deque()
        self._waiting = trio.lowlevel.ParkingLot()
        self._draining = False
        self._gone = False
        self.backlog_bytes = 0

    def put(self, data: Buffer) -> None:
        """Send one frame, or keep a copy of it until there is room. Never blocks; raises `STREAM_GONE`."""
        if not self._draining:
            if self._stream.try_send(data):
                return
            self._draining = True
            self._spawn(self._drain)
        if not self._gone:
            self._backlog.append(bytes(data))
            self.backlog_bytes += len(data)

    @property
    def is_full(self) -> bool:
        """Whether who can wait should."""
        return self.backlog_bytes > self._backlog_max

    async def wait_room(self) -> None:
        """Wait until the backlog is short or the stream is gone."""
        while self.is_full:
            await self._waiting.park()

    async def _drain(self) -> None:
        try:
            while self._backlog:
                batch: list[bytes] = []
                size = 0
                while self._backlog and size < self._backlog_max:
                    batch.append(self._backlog.popleft())
                    size += len(batch[-1])
                await self._stream.send(b"".join(batch))
                self.backlog_bytes -= size
                if not self.is_full:
                    self._waiting.unpark_all()
        except STREAM_GONE:  # whoever receives on the stream is told too, and ends what hangs on it
            self._gone = True
            self._backlog.clear()
            self.backlog_bytes = 0
            self._waiting.unpark_all()
        else:
            self._draining = False


class Budget:
    """An amount of bytes that tasks take and give back; served in the order of asking."""

    def __init__(self, total: int, small: int = 0) -> None:
        """Amounts up to `small` are neither waited for nor counted."""
        self._total = total
        self._small = small
        self._free = total
        self._queue: deque[tuple[int, trio.lowlevel.Task]] = deque()

    async def take(self, count: int) -> None:
        """Take `count` bytes (at most all of the budget), waiting until they are free."""
        if count <= self._small:
            return
        count = min(count, self._total)
        if not self._queue and count <= self._free:
            self._free -= count
            return
        entry = (count, trio.lowlevel.current_task())
        self._queue.append(entry)

        def abort(_: object) -> trio.lowlevel.Abort:
            self._queue.remove(entry)
            self._serve()
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)

    def give(self, count: int) -> None:
        """Give back what `take(count)` took."""
        if count <= self._small:
            return
        self._free += min(count, self._total)
        self._serve()

    @property
    def is_idle(self) -> bool:
        """Whether nobody holds or waits for anything."""
        return self._free == self._total and not self._queue

    def _serve(self) -> None:
        while self._queue and self._queue[0][0] <= self._free:
            count, task = self._queue.popleft()
            self._free -= count
            trio.lowlevel.reschedule(task)
