"""A stream from this node to itself, so that a call to one's own peer id is a call like any other.

Two ends in memory with the promises of `mycel.protocol.mesh.Stream`: a window, an end, a reset.
"""

from __future__ import annotations

from collections.abc import Callable

import trio

from mycel.protocol.errors import StreamClosed, StreamReset
from mycel.protocol.inbox import Inbox
from mycel.protocol.limits import MIB
from mycel.protocol.mesh import Buffer, PeerId

WINDOW = MIB
"""Bytes under way in one direction: enough for a large piece, little beside one message."""

Receiver = Callable[[memoryview | None, Exception | None], None]


class LoopStream:
    """One end."""

    def __init__(self, peer: PeerId, protocol: str) -> None:
        self.peer = peer
        self.protocol = protocol
        self._other: LoopStream = self
        self._room = WINDOW  # what this end may still send
        self._inbox = Inbox(protocol, self.credit)
        self._receiver: Receiver | None = None
        self._credits_itself = True
        self._ended_here = False
        self._lost: StreamReset | None = None
        self._room_lot = trio.lowlevel.ParkingLot()

    def try_send(self, data: Buffer, *, end: bool = False) -> bool:
        """See `Stream.try_send`."""
        self._check()
        if len(data) > self._room:
            return False
        self._push(bytes(data))
        if end:
            self._end()
        return True

    async def send(self, data: Buffer, *, end: bool = False) -> None:
        """See `Stream.send`."""
        view = memoryview(data).cast("B")
        while True:
            self._check()
            if self._room:
                part = bytes(view[: self._room])
                self._push(part)
                view = view[len(part) :]
            if not view:
                break
            if not self._room:
                await self._room_lot.park()
        if end:
            self._end()

    def _check(self) -> None:
        if self._lost is not None:
            raise self._lost.with_traceback(None)
        if self._ended_here:
            raise StreamClosed(f"this side ended its {self.protocol} stream; open another to send more")

    def _push(self, data: bytes) -> None:
        self._room -= len(data)
        if data:
            self._other._on_data(data)

    def _on_data(self, data: bytes) -> None:
        if self._receiver is None:
            self._inbox.put(data)
            return
        self._receiver(memoryview(data), None)
        if self._credits_itself:
            self.credit(len(data))

    async def receive_some(self, max_bytes: int = MIB) -> bytes:
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
            self._on_data(data)
        if self._inbox.loss is not None or self._inbox.ended:
            receiver(None, self._inbox.loss)

    def credit(self, count: int) -> None:
        """See `Stream.credit`."""
        self._other._room += count
        self._other._room_lot.unpark_all()

    async def send_eof(self) -> None:
        """See `Stream.send_eof`."""
        self._end()
        await trio.lowlevel.checkpoint()

    def _end(self) -> None:
        if not self._ended_here and self._lost is None:
            self._ended_here = True
            self._other._on_end()

    def _on_end(self) -> None:
        self._inbox.end()
        if self._receiver is not None:
            self._receiver(None, None)

    def reset(self) -> None:
        """See `Stream.reset`."""
        for end in (self, self._other):
            end._on_reset()

    def _on_reset(self) -> None:
        if self._lost is not None or (self._ended_here and self._inbox.ended):
            return
        self._lost = StreamReset(f"the {self.protocol} stream was reset")
        self._inbox.lose(self._lost)
        self._room_lot.unpark_all()
        if self._receiver is not None:
            self._receiver(None, self._lost)

    async def aclose(self) -> None:
        """See `Stream.aclose`."""
        await self.send_eof()


def loop_pair(peer: PeerId, protocol: str) -> tuple[LoopStream, LoopStream]:
    """Both ends of a fresh stream."""
    near, far = LoopStream(peer, protocol), LoopStream(peer, protocol)
    near._other, far._other = far, near
    return near, far
