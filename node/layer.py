"""A pipe inside a pipe: what TLS and WebSocket have in common.

A layer turns bytes into more bytes on their way out, so it may hold some that the pipe below does not take
yet. Whoever sent them was told that they are taken; a task of the layer's own sees that they leave. Inbound
it holds at most what one read of the pipe below gave.

A layer is used once `shake`, its handshake, is over.
"""

from __future__ import annotations

import trio
from multiaddr import Multiaddr

from mycel.protocol.errors import DialError, PipeBroken
from mycel.protocol.limits import KIB
from mycel.protocol.network import Pipe

READ_BYTES = 64 * KIB
HOLD_BYTES = 64 * KIB
"""What a layer takes while the pipe below takes nothing."""

LINGER_S = 2.0
"""How long a closed layer may go on sending what it had taken."""


class LayeredPipe:
    """See `mycel.protocol.network.Pipe`. A layer defines `_wrap`, `_unwrap` and `_goodbye`."""

    def __init__(self, below: Pipe, suffix: str) -> None:
        """`suffix` is what the layer adds to the addresses of the pipe below."""
        self._below = below
        self._suffix = suffix
        self._scratch = bytearray(READ_BYTES)
        self._held = bytearray()
        self._arrived = bytearray()
        self._ended = False
        self._why: str | None = None
        self._is_closed = False
        self._flusher: trio.lowlevel.Task | None = None
        self._writable = trio.lowlevel.ParkingLot()
        self._reading = trio.CancelScope()
        self.is_ready = False
        """Whether the layer's handshake is over."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.local} -> {self.remote}>"

    @property
    def local(self) -> Multiaddr:
        """See `Pipe.local`."""
        return Multiaddr(f"{self._below.local}{self._suffix}")

    @property
    def remote(self) -> Multiaddr:
        """See `Pipe.remote`."""
        return Multiaddr(f"{self._below.remote}{self._suffix}")

    # What a layer is

    def _wrap(self, data: bytes) -> bytes:
        """`data` as it travels below."""
        raise NotImplementedError

    def _unwrap(self, data: bytes) -> None:
        """Take what came from below, b"" at its end: fills `_arrived`, `_held`, `_ended`, `is_ready`.

        Raises `PipeBroken` for what the layer's protocol forbids.
        """
        raise NotImplementedError

    def _goodbye(self) -> bytes:
        """What travels below when this side closes."""
        raise NotImplementedError

    # A pipe

    def try_send(self, data: memoryview | bytes | bytearray) -> int:
        """See `Pipe.try_send`."""
        self._check()
        if self._held:
            return 0
        piece = bytes(memoryview(data)[:HOLD_BYTES])
        self._put(self._wrap(piece))
        self._check()
        return len(piece)

    def try_recv_into(self, buffer: memoryview | bytearray) -> int | None:
        """See `Pipe.try_recv_into`."""
        self._check()
        while not self._arrived and not self._ended:
            if not self._pull():
                return None
        count = min(len(self._arrived), len(buffer))
        memoryview(buffer)[:count] = self._arrived[:count]
        del self._arrived[:count]
        return count

    async def wait_writable(self) -> None:
        """See `Pipe.wait_writable`."""
        self._check()
        if not self._held:
            await trio.lowlevel.checkpoint()
        while self._why is None and self._held:
            await self._writable.park()
        if self._is_closed:
            self._check()

    async def wait_readable(self) -> None:
        """See `Pipe.wait_readable`. May return early, where what came is the layer's own."""
        self._check()
        if self._arrived or self._ended:
            await trio.lowlevel.checkpoint()
        else:
            with trio.CancelScope() as self._reading:
                await self._below.wait_readable()
        if self._is_closed:
            self._check()

    def close(self) -> None:
        """See `Pipe.close`."""
        if self._why is None:
            self._why = "was closed on this side"
            self._is_closed = True
            if self.is_ready:
                self._held += self._goodbye()
            self._wake()
            if self._flusher is None:
                self._flush()

    def reset(self) -> None:
        """See `Pipe.reset`."""
        self._held.clear()
        self._is_closed = True
        self._why = self._why or "was reset on this side"
        self._below.reset()
        self._wake()

    def _wake(self) -> None:
        self._writable.unpark_all()
        self._reading.cancel()

    def _check(self) -> None:
        if self._why is not None:
            raise PipeBroken(f"connection to {self.remote} {self._why}")

    async def shake(self) -> None:
        """Park until the layer's handshake is over, before anybody reads. Raises `DialError`, and closes
        then; the deadline is the caller's."""
        try:
            while not self.is_ready:
                if self._ended:
                    raise PipeBroken(f"{self.remote} hung up before it agreed to {self._suffix[1:]}")
                if not self._pull():
                    await self._below.wait_readable()
        except PipeBroken as error:
            self.reset()
            raise DialError(str(error)) from None
        except BaseException:  # why: a cancelled dial closes its connection too; raised again
            self.reset()
            raise

    def _pull(self) -> bool:
        """Take once from below; False where nothing has arrived."""
        count = self._below.try_recv_into(self._scratch)
        if count is None:
            return False
        try:
            self._unwrap(bytes(memoryview(self._scratch)[:count]))
        except PipeBroken as error:
            self._put(b"")  # what the layer says to that
            self._why = self._why or str(error)
            self._below.close()
            self._wake()
            raise
        if count == 0:
            self._ended = True
        self._put(b"")
        return True

    # What is held

    def _put(self, data: bytes) -> None:
        self._held += data
        if self._flusher is None:
            self._flush()

    def _flush(self) -> None:
        """Hand down what the pipe below takes; a task waits with the rest."""
        try:
            while self._held:
                count = self._below.try_send(bytes(self._held))
                del self._held[:count]
                if not count:
                    if self._flusher is None:
                        self._flusher = trio.lowlevel.spawn_system_task(self._flush_later)
                    return
        except PipeBroken as error:
            self._held.clear()
            self._why = self._why or str(error)
        if self._why is not None:
            self._below.close()
        self._writable.unpark_all()

    async def _flush_later(self) -> None:
        with trio.CancelScope() as scope:
            while self._held:
                if self._why is not None:
                    scope.deadline = min(scope.deadline, trio.current_time() + LINGER_S)
                try:
                    await self._below.wait_writable()
                except PipeBroken:
                    self._held.clear()
                self._flush()
        self._flusher = None
        if self._why is not None:
            self._below.close()
