"""A stream from this node to itself, so that a call to one's own peer id is a call like any other.

Two ends in memory with the promises of `mycel.protocol.mesh.Stream`: a window, an end, a reset.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import trio

from mycel.protocol.errors import RemoteProtocolError, StreamClosed, StreamReset
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
        self._inbox: deque[bytes] = deque()
        self._receiver: Receiver | None = None
        self._credits_itself = True
        self._ended_here = False
        self._ended_there = False
        self._lost: StreamReset | None = None
        self._news = trio.lowlevel.ParkingLot()

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
                await self._news.park()
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
            self._inbox.append(data)
            self._news.unpark_all()
            return
        self._receiver(memoryview(data), None)
        if self._credits_itself:
            self.credit(len(data))

    async def receive_some(self, max_bytes: int = MIB) -> bytes:
        """See `Stream.receive_some`."""
        while not self._inbox:
            if self._lost is not None:
                raise self._lost.with_traceback(None)
            if self._ended_there:
                return b""
            await self._news.park()
        data = self._inbox.popleft()
        if len(data) > max_bytes:
            self._inbox.appendleft(data[max_bytes:])
            data = data[:max_bytes]
        self.credit(len(data))
        return data

    async def receive_exactly(self, count: int) -> bytes:
        """See `Stream.receive_exactly`."""
        data = bytearray()
        while len(data) < count:
            part = await self.receive_some(count - len(data))
            if not part:
                raise RemoteProtocolError(f"the {self.protocol} stream ended {count - len(data)} bytes early")
            data += part
        return bytes(data)

    def deliver_to(self, receiver: Receiver, *, credit: bool = True) -> None:
        """See `Stream.deliver_to`."""
        self._receiver = receiver
        self._credits_itself = credit
        while self._inbox:
            self._on_data(self._inbox.popleft())
        if self._lost is not None:
            receiver(None, self._lost)
        elif self._ended_there:
            receiver(None, None)

    def credit(self, count: int) -> None:
        """See `Stream.credit`."""
        self._other._room += count
        self._other._news.unpark_all()

    async def send_eof(self) -> None:
        """See `Stream.send_eof`."""
        self._end()
        await trio.lowlevel.checkpoint()

    def _end(self) -> None:
        if not self._ended_here and self._lost is None:
            self._ended_here = True
            self._other._on_end()

    def _on_end(self) -> None:
        self._ended_there = True
        self._news.unpark_all()
        if self._receiver is not None:
            self._receiver(None, None)

    def reset(self) -> None:
        """See `Stream.reset`."""
        for end in (self, self._other):
            end._on_reset()

    def _on_reset(self) -> None:
        if self._lost is not None or (self._ended_here and self._ended_there):
            return
        self._lost = StreamReset(f"the {self.protocol} stream was reset")
        self._news.unpark_all()
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
