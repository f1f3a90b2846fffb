"""Receiving the frames of a stream that carries one call.

Bytes are taken in the connection's reader and kept until the consumer asks for a frame; the peer's window is
credited for what was consumed only. So a slow consumer stops the sender, nothing is lost, and yet the loss
of the stream (a cancelled call is a reset stream) is known at once, even while the consumer is busy.
"""

from __future__ import annotations

from collections.abc import Callable

import trio

from mycel.protocol.errors import RemoteProtocolError
from mycel.protocol.frame import Frame, FrameReader, Head
from mycel.protocol.mesh import Stream
from mycel.protocol.outlet import Budget


class Inlet:
    """The receiving side of one call's stream. One task receives at a time."""

    def __init__(
        self,
        stream: Stream,
        message_bytes: int,
        *,
        on_news: Callable[[bool], None] | None = None,
        budget: Budget | None = None,
        first: bytes = b"",
    ) -> None:
        """`on_news` is called after each piece of data with False, and with True when the stream is reset or
        lost; it must not block. A frame is received once `budget` has room for it, which is given back when
        the next is asked for or at `release`. `first` came already and was not credited.
        """
        self._stream = stream
        self._reader = FrameReader(message_bytes)
        self._on_news = on_news
        self._budget = budget
        self._held = 0
        self._ended = False
        self.error: Exception | None = None
        self._task: trio.lowlevel.Task | None = None
        self._reader.feed(first)
        stream.deliver_to(self._on_data, credit=False)

    def _on_data(self, chunk: memoryview | None, error: Exception | None) -> None:
        if chunk is not None:
            self._reader.feed(chunk)
            used = self._reader.used()
            if used:
                self._stream.credit(used)
            if self._on_news is not None:
                self._on_news(False)
        elif error is None:
            self._ended = True
        else:
            self.error = error
            if self._on_news is not None:
                self._on_news(True)
        if self._task is not None:
            task, self._task = self._task, None
            trio.lowlevel.reschedule(task)

    async def head(self) -> Head | None:
        """The next frame's head, as soon as that came; None at the end of the stream. Raises as `frame`."""
        while (head := self._reader.head()) is None:
            if self._is_over():
                return None
            await self._more()
        return head

    @property
    def next_kind(self) -> int | None:
        """The kind of the next frame where its head came already. Raises `RemoteProtocolError`."""
        head = self._reader.head()
        return None if head is None else head[1]

    async def frame(self) -> Frame | None:
        """The next frame, None at the end of the stream.

        Raises what the stream was lost with (`StreamReset`, `ConnectionLost`, `Refused`) after the frames
        that came before, and `RemoteProtocolError` for bytes that are no frame or an end inside of one.
        """
        self.release()
        if self._budget is not None:
            head = await self.head()
            if head is not None:
                await self._budget.take(head[0])
                self._held = head[0]
        while (frame := self._reader.next()) is None:
            if self._is_over():
                return None
            used = self._reader.used()
            if used:
                self._stream.credit(used)
            await self._more()
        self._stream.credit(self._reader.used())
        return frame

    def release(self) -> None:
        """Give back what the last frame holds of the budget."""
        if self._held and self._budget is not None:
            self._budget.give(self._held)
            self._held = 0

    def _is_over(self) -> bool:
        if self.error is not None:
            raise self.error.with_traceback(None)
        if self._ended and not self._reader.is_empty:
            raise RemoteProtocolError(f"{self._stream.peer} ended its stream in the middle of a frame")
        return self._ended

    async def _more(self) -> None:
        if self._task is not None:
            raise trio.BusyResourceError("another task is receiving on this call's stream")
        self._task = trio.lowlevel.current_task()

        def abort(_: object) -> trio.lowlevel.Abort:
            self._task = None
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)
