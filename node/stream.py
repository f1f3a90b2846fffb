"""A stream of the mesh: a `Channel` (which decides) with tasks that wait for it.

Sending and receiving park the task bare, without a lock or an event; the channel's callbacks wake it. A
`send` that finds room neither parks nor hops; every so often it yields all the same, so that a sender in a
loop does not starve the others.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

import outcome
import trio
from multiaddr import Multiaddr

from mycel.protocol import multistream
from mycel.protocol.channel import Channel
from mycel.protocol.errors import (
    ConnectionLost,
    MycelError,
    Refused,
    RemoteProtocolError,
    StreamClosed,
    StreamReset,
)
from mycel.protocol.mesh import Buffer, PeerId
from mycel.protocol.yamux import Pool

if TYPE_CHECKING:
    from mycel.node.link import Link

PIECES_MAX = 1024
"""Pieces held before they are joined: what comes byte by byte must not take a hundred times its size."""
COPIED_MAX = 65507
"""Up to one full frame is copied into the output; more is borrowed from the sender until it is out."""

Receiver = Callable[[memoryview | None, Exception | None], None]


class HostStream:
    """See `mycel.protocol.mesh.Stream`."""

    __slots__ = (
        "_asks",
        "_buffered",
        "_channel",
        "_credited",
        "_ended",
        "_error",
        "_inbox",
        "_link",
        "_reader",
        "_receiver",
        "_sender",
        "on_room",
        "peer",
        "protocol",
    )

    def __init__(self, link: Link, channel: Channel, peer: PeerId, protocol: str) -> None:
        """Takes over `channel`, whose protocol is agreed (inbound) or proposed with the first data."""
        self._link = link
        self._channel = channel
        self._inbox: deque[bytes] = deque()
        self._receiver: Receiver | None = None
        self._credited = True
        self._reader: trio.lowlevel.Task | None = None
        self._sender: trio.lowlevel.Task | None = None
        self._ended = False
        self._error: MycelError | None = None
        self._asks: multistream.Dialer | None = None
        self.on_room: Callable[[], None] | None = None
        """Called when what `offer` kept went out, or never will, from within a flush: only take note."""
        self.peer = peer
        self.protocol = protocol
        channel.sink = self._take
        channel.on_drained = self._on_drained
        if not channel.inbound:
            channel.prefix = multistream.proposal(protocol)
            channel.sink = self._take_answer

    def __repr__(self) -> str:
        return f"<HostStream {self.protocol} {self.peer} #{self._channel.id}>"

    @property
    def remote(self) -> Multiaddr:
        """The other end's address of the connection below."""
        return self._link.remote

    @property
    def is_relayed(self) -> bool:
        """Whether the connection below goes through a relay."""
        return self._link.is_relayed

    # Sending

    def try_send(self, data: Buffer, *, end: bool = False) -> bool:
        """See `Stream.try_send`."""
        if self._sender is not None:
            raise trio.BusyResourceError("another task is sending on this stream")
        if isinstance(data, memoryview) and data.itemsize != 1:
            data = data.cast("B")
        if not self._channel.try_send(data, end=end):
            return False
        if end and self._channel.is_over:
            self._receiver = None
        self._link.flush()
        return True

    async def send(self, data: Buffer, *, end: bool = False) -> None:
        """See `Stream.send`."""
        if self._sender is not None:
            raise trio.BusyResourceError("another task is sending on this stream")
        view = memoryview(data).cast("B")
        channel = self._channel
        if len(view) <= COPIED_MAX and channel.try_send(view, end=end):
            self._link.flush()
            if self._link.is_turn_over():
                await trio.lowlevel.checkpoint()
            else:
                await trio.lowlevel.checkpoint_if_cancelled()
            return
        await trio.lowlevel.checkpoint_if_cancelled()
        channel.enqueue(view, end=end)
        self._link.flush()
        if channel.queued:
            self._sender = trio.lowlevel.current_task()
            await trio.lowlevel.wait_task_rescheduled(self._abort_send)
        else:
            await trio.lowlevel.cancel_shielded_checkpoint()
        if channel.error is not None:
            raise channel.error

    def offer(self, data: memoryview, *, flush: bool = True) -> int:
        """Send as many leading bytes of `data` as there is room for, and one piece more that waits for it.

        Returns how many were taken, 0 while that piece waits; then `on_room` is called. For those who copy
        between streams or carry a connection: nothing waits, and little is held. Without `flush` the last of
        it may wait for the caller's `flush`. Raises as `send` does.
        """
        taken = self._channel.offer(data, keep=False)
        if taken < len(data):
            self._link.flush()
            taken += self._channel.offer(data[taken:])
        if flush:
            self._link.flush()
        return taken

    def flush(self) -> None:
        """Send now what `offer` took."""
        self._link.flush()

    @property
    def has_room(self) -> bool:
        """Whether `offer` would take something."""
        return not self._channel.queued

    def finish(self) -> None:
        """As `send_eof`, without yielding."""
        self._channel.finish()
        self._link.flush()

    def linger(self) -> None:
        """This side is done: see to it that the peer does not leave the stream half open for long."""
        self._channel.linger()

    def bound_window(self, count: int, pool: Pool) -> None:
        """Let the receive window grow to `count` bytes at most, and only by what `pool` has left."""
        self._channel.window_max = count
        self._channel.window_pool = pool

    def _abort_send(self, _: trio.lowlevel.RaiseCancelT) -> trio.lowlevel.Abort:
        self._sender = None
        self._channel.withdraw()
        return trio.lowlevel.Abort.SUCCEEDED

    def _on_drained(self) -> None:
        task, self._sender = self._sender, None
        if task is not None:
            trio.lowlevel.reschedule(task)
        if self.on_room is not None:
            self.on_room()

    async def send_eof(self) -> None:
        """See `Stream.send_eof`."""
        self._channel.finish()
        self._link.flush()
        await trio.lowlevel.checkpoint()

    def reset(self) -> None:
        """See `Stream.reset`."""
        self._lose(StreamReset("this side reset the stream"))
        self._channel.reset(StreamReset("this side reset the stream"))
        self._link.flush()

    async def aclose(self) -> None:
        """See `Stream.aclose`."""
        self._receiver = None
        self._lose(StreamClosed("this side closed the stream; open another one"))
        self._channel.forget()
        if not self._channel.fin_received:
            self._link.flush()  # else the peer waits for nothing more: the end may ride on what is sent next
        if self._link.is_turn_over():
            await trio.lowlevel.cancel_shielded_checkpoint()

    # Receiving

    async def receive_some(self, max_bytes: int = 1 << 20) -> bytes:
        """See `Stream.receive_some`."""
        if self._inbox or self._ended or self._error is not None:
            await trio.lowlevel.checkpoint_if_cancelled()
        while not self._inbox:
            if self._ended:
                return b""
            if self._error is not None:
                raise self._error
            await self._wait_for_data()
        return self._shift(max_bytes)

    async def receive_exactly(self, count: int) -> bytes:
        """See `Stream.receive_exactly`."""
        piece = await self.receive_some(count) if count else b""
        if len(piece) == count:
            return piece
        pieces, have = [piece], len(piece)
        while piece and have < count:
            piece = await self.receive_some(count - have)
            pieces.append(piece)
            have += len(piece)
            if len(pieces) == PIECES_MAX:
                pieces = [b"".join(pieces)]
        if have < count:
            raise RemoteProtocolError(f"the stream ended after {have} of {count} bytes")
        return b"".join(pieces)

    def deliver_to(self, receiver: Receiver, *, credit: bool = True) -> None:
        """See `Stream.deliver_to`."""
        self._receiver = receiver
        self._credited = credit
        while self._inbox and self._receiver is receiver:
            piece = self._inbox.popleft()
            if self._take(memoryview(piece), None):
                self._channel.credit(len(piece))
        if self._ended or self._error is not None:
            self._tell_end(None if self._ended else self._error)
        elif self._channel.prefix and not self._channel.inbound:
            self._channel.flush_prefix()
            self._link.flush()

    def credit(self, count: int) -> None:
        """See `Stream.credit`."""
        if self._channel.credit(count):
            self._link.flush()

    async def _wait_for_data(self) -> None:
        if self._reader is not None:
            raise trio.BusyResourceError("another task is receiving from this stream")
        if self._channel.prefix:
            self._channel.flush_prefix()
            self._link.flush()
        self._reader = trio.lowlevel.current_task()
        await trio.lowlevel.wait_task_rescheduled(self._abort_receive)

    def _abort_receive(self, _: trio.lowlevel.RaiseCancelT) -> trio.lowlevel.Abort:
        self._reader = None
        return trio.lowlevel.Abort.SUCCEEDED

    def _shift(self, max_bytes: int) -> bytes:
        piece = self._inbox.popleft()
        if len(piece) > max_bytes:
            self._inbox.appendleft(piece[max_bytes:])
            piece = piece[:max_bytes]
        if self._channel.credit(len(piece)):
            self._link.flush()
        return piece

    # What the channel calls

    def _take_answer(self, data: memoryview | None, error: MycelError | None) -> bool:
        """The sink of an outbound stream until the peer agreed to the protocol."""
        if data is None:
            if error is None:
                error = StreamReset(f"the peer ended the stream without agreeing to {self.protocol}")
                self._channel.reset(error)
            self._lose(error)
            return False
        rest: memoryview | bytes | None
        agreement = multistream.proposal(self.protocol)
        size = len(agreement)
        try:
            if self._asks is None and data[:size] == agreement:
                rest = data[size:]
            else:
                if self._asks is None:
                    self._asks = multistream.Dialer(self.protocol, self._link.limits.multistream_message)
                rest = self._asks.receive(data)
        except Refused as refused:
            self._lose(refused)
            self._channel.reset(refused)
            return False
        if rest is None:
            return True
        self._asks = None
        self._channel.sink = self._take
        if not rest or self._take(memoryview(rest), None):
            return True
        self._channel.credit(len(data) - len(rest))
        return False

    def _take(self, data: memoryview | None, error: MycelError | None) -> bool:
        if data is None:
            if error is None:
                self._ended = True
                self._tell_end(None)
            else:
                self._lose(error)
            return False
        receiver = self._receiver
        if receiver is None:
            self._inbox.append(bytes(data))
            self._wake_reader()
            return False
        try:
            receiver(data, None)
        except Exception as failure:  # boundary: a receiver's failure ends its own stream only
            self._fail(failure)
            return False
        return self._credited

    def take(self, data: memoryview | bytes) -> None:
        """Data that came together with the negotiation."""
        self._inbox.append(bytes(data))

    def _lose(self, error: MycelError) -> None:
        """No more will arrive. After an end in order, or where the connection was lost, what did arrive can
        still be read; a reset throws it away."""
        if self._error is not None:
            return
        if self._ended and not isinstance(error, StreamClosed):
            if self._receiver is not None:
                self._tell_end(error)
            return
        self._error = error
        if not isinstance(error, ConnectionLost):
            self._inbox.clear()
            self._ended = False
        self._tell_end(error)

    def _tell_end(self, error: MycelError | None) -> None:
        self._wake_reader()
        receiver = self._receiver
        if receiver is None:
            return
        if error is not None or self._channel.is_over:
            self._receiver = None
        try:
            receiver(None, error)
        except Exception as failure:  # boundary: a receiver's failure ends its own stream only
            self._fail(failure)

    def _fail(self, error: Exception) -> None:
        self._receiver = None
        self._link.on_handler_error(self.protocol, error)
        self.reset()

    def _wake_reader(self) -> None:
        task, self._reader = self._reader, None
        if task is not None:
            trio.lowlevel.reschedule(task, outcome.Value(None))
