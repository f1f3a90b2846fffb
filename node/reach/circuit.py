"""A stream as a pipe: what a connection through a relay runs over.

The connection core asks of a pipe that nothing in it waits, so bytes come out of the stream's `deliver_to`
and go in by its `offer`. What has arrived and was not read is not credited, so a reader who pauses stops the
writer at the far end of the circuit, through the relay. A link reads by `push_to`: it deals with what arrives
where it lies, in the reader of the connection below.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import trio
from multiaddr import Multiaddr

from mycel.node.stream import HostStream
from mycel.protocol.errors import MycelError, PipeBroken, StreamReset
from mycel.protocol.relay import UNLIMITED, Limit


class StreamPipe:
    """See `mycel.protocol.network.Pipe`. The stream is its own from here on."""

    def __init__(
        self, stream: HostStream, *, local: Multiaddr, remote: Multiaddr, limit: Limit = UNLIMITED
    ) -> None:
        """`limit` is what the relay said that it allows: it explains a sudden end."""
        self._stream = stream
        self._held: deque[memoryview] = deque()
        self._ended = False
        self._closed = False
        self._broken = ""
        self._reader: trio.lowlevel.Task | None = None
        self._writer: trio.lowlevel.Task | None = None
        self._push: Callable[[memoryview], None] | None = None
        self._since = trio.current_time()
        self._count = 0
        self.local = local
        self.remote = remote
        self.limit = limit
        stream.on_room = self._wake_writer
        stream.deliver_to(self._take, credit=False)

    def __repr__(self) -> str:
        return f"<StreamPipe {self.local} - {self.remote}>"

    # Sending

    def try_send(self, data: memoryview | bytes | bytearray) -> int:
        """See `Pipe.try_send`."""
        self._check()
        try:
            taken = self._stream.offer(memoryview(data).cast("B"))
        except MycelError as error:
            self._break(error)
            raise PipeBroken(self._broken) from error
        self._count += taken
        return taken

    async def wait_writable(self) -> None:
        """See `Pipe.wait_writable`."""
        await trio.lowlevel.checkpoint_if_cancelled()
        if self._writer is not None:
            raise trio.BusyResourceError("another task waits to write into this pipe")
        while not (self._closed or self._broken or self._stream.has_room):
            self._writer = trio.lowlevel.current_task()
            await trio.lowlevel.wait_task_rescheduled(self._abort_write)
        self._check_open()

    def _abort_write(self, _: trio.lowlevel.RaiseCancelT) -> trio.lowlevel.Abort:
        self._writer = None
        return trio.lowlevel.Abort.SUCCEEDED

    def _wake_writer(self) -> None:
        task, self._writer = self._writer, None
        if task is not None:
            trio.lowlevel.reschedule(task)

    # Receiving

    def try_recv_into(self, buffer: memoryview | bytearray) -> int | None:
        """See `Pipe.try_recv_into`."""
        self._check()
        held = self._held
        if not held:
            return 0 if self._ended else None
        view = memoryview(buffer)
        count = 0
        while held and count < len(view):
            piece = held[0]
            size = min(len(piece), len(view) - count)
            view[count : count + size] = piece[:size]
            count += size
            if size < len(piece):
                held[0] = piece[size:]
            else:
                held.popleft()
        self._count += count
        self._stream.credit(count)
        return count

    def push_to(self, receiver: Callable[[memoryview], None]) -> None:
        """See `PushingPipe.push_to`."""
        while self._held:
            piece = self._held.popleft()
            self._count += len(piece)
            receiver(memoryview(bytearray(piece)))
            self._stream.credit(len(piece))
        self._push = receiver

    async def wait_readable(self) -> None:
        """See `Pipe.wait_readable`."""
        await trio.lowlevel.checkpoint_if_cancelled()
        if self._reader is not None:
            raise trio.BusyResourceError("another task waits to read from this pipe")
        while not (self._held or self._ended or self._closed or self._broken):
            self._reader = trio.lowlevel.current_task()
            await trio.lowlevel.wait_task_rescheduled(self._abort_read)
        self._check_open()

    def _abort_read(self, _: trio.lowlevel.RaiseCancelT) -> trio.lowlevel.Abort:
        self._reader = None
        return trio.lowlevel.Abort.SUCCEEDED

    def _wake_reader(self) -> None:
        task, self._reader = self._reader, None
        if task is not None:
            trio.lowlevel.reschedule(task)

    def _take(self, data: memoryview | None, error: Exception | None) -> None:
        if data is not None and self._push is not None:
            self._count += len(data)
            self._push(data if not data.readonly else memoryview(bytearray(data)))
            self._stream.credit(len(data))
            return
        if data is not None:
            self._held.append(memoryview(bytes(data)))
        elif error is None:
            self._ended = True
        else:
            self._break(error)
        self._wake_reader()

    # Ending

    def close(self) -> None:
        """See `Pipe.close`. What still comes is thrown away; the far end has `LINGER_S` to finish as well."""
        if self._closed or self._broken:
            return
        self._end()
        unread = sum(map(len, self._held))
        self._held.clear()
        self._stream.deliver_to(_forget)
        self._stream.credit(unread)
        self._stream.finish()
        self._stream.linger()

    def reset(self) -> None:
        """See `Pipe.reset`."""
        if not self._closed:
            self._end()
        self._held.clear()
        self._stream.reset()

    def _end(self) -> None:
        self._closed = True
        self._wake_reader()
        self._wake_writer()

    def _break(self, error: Exception) -> None:
        if self._closed or self._broken:
            return
        self._broken = str(error)
        if isinstance(error, StreamReset):
            took = trio.current_time() - self._since
            self._broken = (
                f"the circuit was reset after {took:.1f} s and {self._count} bytes both ways "
                f"(the relay allows it {self.limit})"
            )
        self._held.clear()
        self._wake_reader()
        self._wake_writer()

    def _check_open(self) -> None:
        if self._closed:
            raise PipeBroken("the pipe was closed on this side")

    def _check(self) -> None:
        self._check_open()
        if self._broken:
            raise PipeBroken(self._broken)


def _forget(data: memoryview | None, error: Exception | None) -> None:
    """Takes what nobody reads any more."""
