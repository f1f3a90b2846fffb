"""One question on its way: sent without a task, its answer read in the connection's reader.

A node asks some dozens of peers for each lookup, so a question costs what its bytes cost: it has neither a
task nor a cancel scope, and one alarm watches over all of them. Only who must be dialled first takes a task.

js-libp2p gives a stream up whose end came with the question, so over libp2p's own protocol the end comes
after the answer; there `ADD_PROVIDER` has no answer, and that of a ping sent after it shows that it was
taken.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import trio

from mycel.dht.kad.message import FOREIGN_PROTOCOL, Kind, Message, read, write
from mycel.dht.kad.table import Contact
from mycel.protocol import varint
from mycel.protocol.alarm import Alarm
from mycel.protocol.errors import ConnectionLost, RemoteProtocolError, StreamReset
from mycel.protocol.limits import KadLimits
from mycel.protocol.mesh import Stream

Over = Callable[["Question", Message | None, Exception | None], None]
"""Called once: with the answer, or with why there is none (None: it did not come in time)."""


class Question:
    """A message to one peer and what comes of it."""

    __slots__ = (
        "_alarm",
        "_is_foreign",
        "_kind",
        "_limits",
        "_number",
        "_over",
        "_stream",
        "_unread",
        "began",
        "bytes",
        "contact",
        "dialled",
        "is_over",
        "is_settled",
        "message",
        "scope",
        "until",
    )

    def __init__(
        self, contact: Contact, message: Message, over: Over, alarm: tuple[Alarm, int], limits: KadLimits
    ) -> None:
        """`alarm`: who watches over it, and its own number among all questions."""
        self._alarm, self._number = alarm
        self.until = 0.0
        self.contact = contact
        self.message = message
        self.began = trio.current_time()
        self.dialled = False
        """Whether the peer had to be dialled for it."""
        self.scope: trio.CancelScope | None = None
        """Of the task that dials, where there is one."""
        self.bytes = 0
        """Sent and received."""
        self.is_over = False
        self.is_settled = True
        """Whether no alarm watches over it (see `mycel.protocol.deadlines`)."""
        self._over = over
        self._limits = limits
        self._stream: Stream | None = None
        self._unread = b""

    def watch(self, until: float) -> None:
        """Let it expire at `until` (trio time)."""
        self.until = until
        self._alarm.set(until, self._number, self)

    def _raw(self, stream: Stream) -> bytes:
        self._stream, self._kind = stream, self.message.kind
        self._is_foreign = stream.protocol == FOREIGN_PROTOCOL
        raw = write(self.message)
        if self._is_foreign and self._kind is Kind.ADD_PROVIDER:
            raw, self._kind = raw + write(Message(Kind.PING)), Kind.PING
        self.bytes += len(raw)
        return raw

    def try_send(self, stream: Stream) -> bool:
        """Put the question now or not at all. Raises as `Stream.try_send`."""
        sent = stream.try_send(self._raw(stream), end=not self._is_foreign)
        if sent:
            stream.deliver_to(self._on_data)
        else:
            self._stream, self.bytes = None, 0
            stream.reset()
        return sent

    async def send(self, stream: Stream) -> None:
        """Put the question. Raises as `Stream.send`."""
        await stream.send(self._raw(stream), end=not self._is_foreign)
        stream.deliver_to(self._on_data)

    def expire(self) -> None:
        """Its time has come: the peer did not answer, or did not end its stream after it did."""
        self.drop()
        self._end(None, None)

    def again(self) -> None:
        """Take what came so far for nothing: it will be put once more, to a peer that is dialled for it."""
        self.began, self.dialled, self.is_over = trio.current_time(), True, False
        self._stream, self._unread = None, b""

    def drop(self) -> None:
        """Take the question back."""
        if self.scope is not None:
            self.scope.cancel()
        if self._stream is not None:
            self._stream.reset()

    def fail(self, error: Exception) -> None:
        """There will be no answer."""
        self._end(None, error)

    def _end(self, answer: Message | None, error: Exception | None) -> None:
        if not self.is_over:
            self.is_over = True
            if answer is None:
                self._alarm.clear(self)
            self._over(self, answer, error)

    def _on_data(self, data: memoryview | None, error: Exception | None) -> None:
        if self.is_over:
            self._on_rest(data, error)
            return
        if error is not None:
            self.fail(error)
            return
        try:
            answer = self._read(data)
        except RemoteProtocolError as wrong:
            self.drop()
            self.fail(wrong)
            return
        if answer is not None:
            self._finish_sending()
            self._end(answer, None)

    def _on_rest(self, data: memoryview | None, error: Exception | None) -> None:
        """Nothing but the end of the stream should come after the answer."""
        if data is None or error is not None:
            self._alarm.clear(self)
        else:
            self.drop()

    def _read(self, data: memoryview | None) -> Message | None:
        """The answer once all of it has come. Raises `RemoteProtocolError`."""
        if data is None:
            raise RemoteProtocolError("the stream ended without an answer")
        self._unread += bytes(data)
        cut = varint.split_prefixed(self._unread, self._limits.message_bytes)
        if cut is None:
            return None
        self.bytes += len(self._unread)
        answer = read(cut[0], self._limits)
        if answer.kind is not self._kind:
            raise RemoteProtocolError(f"asked {self._kind.name}, answered {answer.kind.name}")
        return self.message if self._kind is not self.message.kind else answer

    def _finish_sending(self) -> None:
        if self._is_foreign and self._stream is not None:
            with suppress(ConnectionLost, StreamReset):  # the answer is here, and that was all
                self._stream.try_send(b"", end=True)
