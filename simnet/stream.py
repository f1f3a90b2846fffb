"""Streams of the simulated mesh: ordered, flow-controlled, without ciphers or frames.

A `MeshStream` is one end. What it sends travels over its connection's `Way` (latency, bandwidth, faults) and
is called on the other end: `on_data`, `on_eof`, `on_reset`, `on_credit`. As in yamux a sender spends credit
that the receiver gives back as its data is taken, so a reader who pauses stops the writer and nothing piles
up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import trio

from mycel.protocol.errors import ConnectionLost, Refused, StreamClosed, StreamReset
from mycel.protocol.inbox import Inbox
from mycel.protocol.mesh import Buffer, PeerId
from mycel.simnet.park import Park

PARTS = 8
"""A large write leaves in so many parts of a window: credit for the first comes while the last leaves."""

Receiver = Callable[[memoryview | None, Exception | None], None]
Loss = StreamReset | ConnectionLost | Refused


class StreamEnd(Protocol):
    """What a stream asks of its end of the connection."""

    def tell(self, size: int, act: str, stream_id: int, *args: object) -> None:
        """Call `act(*args)` on the other end of the stream, one journey later; `size` bytes on the link."""

    def forget(self, stream_id: int) -> None:
        """The stream is over in both directions."""

    def count_error(self, protocol: str, error: Exception) -> None:
        """A receiver raised; its stream was reset."""


class MeshStream:
    """One end of a simulated stream. See `mycel.protocol.mesh.Stream`."""

    __slots__ = (
        "_closed",
        "_credit",
        "_credits_itself",
        "_end",
        "_eof_sent",
        "_id",
        "_inbox",
        "_part",
        "_receiver",
        "_send_error",
        "_sending",
        "_writable",
        "peer",
        "protocol",
    )

    def __init__(self, end: StreamEnd, stream_id: int, peer: PeerId, protocol: str, window: int) -> None:
        self.peer = peer
        self.protocol = protocol
        self._end = end
        self._id = stream_id
        self._credit = window
        self._part = max(window // PARTS, 1)
        self._inbox = Inbox(protocol, self.credit)
        self._receiver: Receiver | None = None
        self._credits_itself = True
        self._eof_sent = self._closed = False
        self._send_error: Loss | None = None
        self._writable: Park | None = None
        self._sending = False

    def __repr__(self) -> str:
        return f"<MeshStream {self._id} {self.protocol} with {self.peer}>"

    def try_send(self, data: Buffer, *, end: bool = False) -> bool:
        """See `Stream.try_send`."""
        self._check_send()
        if self._sending:
            raise trio.BusyResourceError(f"another task is sending on this {self.protocol} stream")
        size = memoryview(data).nbytes
        if size > self._credit:
            return False
        self._push(bytes(data))
        if end:
            self._end_sending()
        return True

    async def send(self, data: Buffer, *, end: bool = False) -> None:
        """See `Stream.send`."""
        self._check_send()
        if self._sending:
            raise trio.BusyResourceError(f"another task is sending on this {self.protocol} stream")
        view = memoryview(data).cast("B")
        self._sending = True
        try:
            while view:
                if self._credit == 0:
                    self._writable = self._writable or Park(f"room to send on a {self.protocol} stream")
                    await self._writable.wait()
                    self._check_send()
                    continue
                part = view[: min(self._credit, self._part)]
                self._push(bytes(part))
                view = view[part.nbytes :]
        finally:
            self._sending = False
        if end:
            self._end_sending()

    def _check_send(self) -> None:
        if self._send_error is not None:
            raise self._send_error.with_traceback(None)
        if self._eof_sent:
            raise StreamClosed(f"this side ended its {self.protocol} stream; open another to send more")

    def _push(self, data: bytes) -> None:
        self._credit -= len(data)
        if data:
            self._end.tell(len(data), "on_data", self._id, data)

    async def receive_some(self, max_bytes: int = 1 << 20) -> bytes:
        """See `Stream.receive_some`."""
        return await self._inbox.receive_some(max_bytes)

    async def receive_exactly(self, count: int) -> bytes:
        """See `Stream.receive_exactly`."""
        return await self._inbox.receive_exactly(count)

    def deliver_to(self, receiver: Receiver, *, credit: bool = True) -> None:
        """See `Stream.deliver_to`."""
        self._receiver = receiver
        self._credits_itself = credit
        for data in self._inbox.take_all():
            self._hand_over(data)
            if self._receiver is not receiver:
                return
        if self._inbox.loss is not None or self._inbox.ended:
            self._call(None, self._inbox.loss)

    def _hand_over(self, data: bytes) -> None:
        self._call(memoryview(data), None)
        if self._credits_itself:
            self.credit(len(data))

    def _call(self, data: memoryview | None, loss: Exception | None) -> None:
        if self._receiver is None:
            return
        try:
            self._receiver(data, loss)
        except Exception as error:  # boundary: a receiver's failure ends its own stream only
            self._receiver = None
            self._end.count_error(self.protocol, error)
            self.reset()

    def credit(self, count: int) -> None:
        """See `Stream.credit`."""
        if not self._inbox.ended and self._inbox.loss is None:
            self._end.tell(0, "on_credit", self._id, count)

    async def send_eof(self) -> None:
        """See `Stream.send_eof`."""
        if self._send_error is not None:
            raise self._send_error.with_traceback(None)
        self._end_sending()
        await trio.lowlevel.checkpoint()

    def _end_sending(self) -> None:
        if not self._eof_sent and self._send_error is None:
            self._eof_sent = True
            self._end.tell(0, "on_eof", self._id)
            self._wake()
            self._forget_if_over()

    def reset(self) -> None:
        """See `Stream.reset`."""
        if self._inbox.loss is None and not (self._eof_sent and self._inbox.ended):
            self._end.tell(0, "on_reset", self._id, StreamReset(f"the peer reset the {self.protocol} stream"))
        self.on_loss(StreamReset(f"this side reset its {self.protocol} stream"))

    async def aclose(self) -> None:
        """See `Stream.aclose`."""
        self._end_sending()
        self._closed = True
        self._receiver = None
        self._inbox.discard()
        await trio.lowlevel.checkpoint()

    def _wake(self) -> None:
        if self._writable is not None:
            self._writable.wake()

    def _forget_if_over(self) -> None:
        if self._inbox.loss is not None or (self._eof_sent and self._inbox.ended):
            self._forget()

    def _forget(self) -> None:
        self._receiver = None  # nothing comes any more; and it often holds this stream
        self._end.forget(self._id)

    def on_data(self, data: bytes) -> None:
        """Bytes arrived."""
        if self._closed:
            # Nobody will read: tell the writer instead of letting it fill the window.
            self.reset()
        elif self._receiver is not None:
            self._hand_over(data)
        else:
            self._inbox.put(data)

    def on_credit(self, count: int) -> None:
        """The other end has taken `count` bytes."""
        self._credit += count
        self._wake()

    def on_eof(self) -> None:
        """The other end sends no more."""
        self._inbox.end()
        self._call(None, None)
        self._forget_if_over()

    def on_reset(self, loss: Loss) -> None:
        """The other end reset the stream, or refused it."""
        self.on_loss(loss)

    def on_loss(self, loss: Loss) -> None:
        """Nothing more goes either way. A peer's end of stream that came before stays a proper end."""
        self._send_error = self._send_error or loss
        first = self._inbox.lose(loss)
        self._wake()
        if first or self._receiver is not None:
            self._call(None, loss)
        self._forget()
