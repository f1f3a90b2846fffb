"""A simulated TCP connection's end: the `Pipe` of the world in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import trio
from multiaddr import Multiaddr

from mycel.protocol.address import tcp_addr
from mycel.protocol.errors import PipeBroken
from mycel.simnet.flow import Flow
from mycel.simnet.park import Park

if TYPE_CHECKING:
    from mycel.simnet.tcp import Opening


class SimPipe:
    """One end of a connection: a flow out, a flow in, and who waits for them."""

    def __init__(self, opening: Opening, out: Flow, into: Flow) -> None:
        self.opening = opening
        self.machine = opening.machine
        self.near = opening.near
        self.far = opening.far
        self._out = out
        self._into = into
        self._why: str | None = None
        self._reset_by_peer: str | None = None
        self._readable = Park(f"data from {self.far[0]}:{self.far[1]}")
        self._writable = Park(f"room towards {self.far[0]}:{self.far[1]}")
        out.on_room = self._writable.wake
        into.on_news = self._readable.wake
        into.on_reset = self.on_reset
        into.on_stray = self._on_stray

    def __repr__(self) -> str:
        return f"<SimPipe {self._out.name} {self._why or self._reset_by_peer or ''}>"

    @property
    def local(self) -> Multiaddr:
        """See `Pipe.local`."""
        return tcp_addr(*self.near)

    @property
    def remote(self) -> Multiaddr:
        """See `Pipe.remote`."""
        return tcp_addr(*self.far)

    def await_first(self, act: Callable[[], None]) -> None:
        """The handshake has an end to go: `act` when something arrives before it is told to be complete."""
        self._into.on_news = act

    def open(self) -> None:
        """The handshake is complete."""
        self._into.on_news = self._readable.wake

    @property
    def is_open(self) -> bool:
        """Whether this side may still use the pipe."""
        return self._why is None

    @property
    def was_reset(self) -> bool:
        """Whether the other end reset it."""
        return self._reset_by_peer is not None

    def _check(self) -> None:
        if self._why is not None:
            raise PipeBroken(f"connection to {self.remote} {self._why}")

    def _check_reset(self) -> None:
        if self._reset_by_peer is not None:
            raise PipeBroken(f"connection to {self.remote} was lost: {self._reset_by_peer}")

    def try_send(self, data: memoryview | bytes | bytearray) -> int:
        """See `Pipe.try_send`."""
        self._check()
        self._check_reset()
        if not self.machine.is_running:
            return 0
        return self._out.put(memoryview(data).cast("B"))

    def try_recv_into(self, buffer: memoryview | bytearray) -> int | None:
        """See `Pipe.try_recv_into`. What arrived before a reset can still be read, as from a kernel."""
        self._check()
        if not self.machine.is_running:
            return None
        count = self._into.get(memoryview(buffer).cast("B"))
        if count:
            return count
        if self._into.ended:
            return 0
        self._check_reset()
        return None

    async def wait_writable(self) -> None:
        """See `Pipe.wait_writable`."""
        await trio.lowlevel.checkpoint_if_cancelled()
        self._check()
        if not self.is_writable:
            self._out.watch_room()
            await self._writable.wait()
        else:
            await trio.lowlevel.cancel_shielded_checkpoint()
        self._check()

    async def wait_readable(self) -> None:
        """See `Pipe.wait_readable`."""
        await trio.lowlevel.checkpoint_if_cancelled()
        self._check()
        if not self.has_news:
            await self._readable.wait()
        else:
            await trio.lowlevel.cancel_shielded_checkpoint()
        self._check()

    @property
    def has_news(self) -> bool:
        """Whether `try_recv_into` would return a number or raise."""
        news = self._into.unread > 0 or self._into.ended or self._reset_by_peer is not None
        return news and self.machine.is_running

    @property
    def is_writable(self) -> bool:
        """Whether `try_send` would take a byte or raise."""
        return self.machine.is_running and (self._reset_by_peer is not None or self._out.is_writable)

    def close(self) -> None:
        """See `Pipe.close`."""
        if self._why is None:
            self._end("was closed on this side")
            self._out.finish()

    def reset(self) -> None:
        """See `Pipe.reset`."""
        if self._why is None:
            self._end("was reset on this side")
            self._out.cut_off("connection reset by peer")

    def _end(self, why: str) -> None:
        self._why = why
        self._into.close_reader()
        self.machine.forget_pipe(self)
        self.wake()

    def die(self, why: str, *, reset: bool) -> None:
        """The machine under this pipe crashed: its kernel resets the connection, or is gone itself."""
        if self._why is None:
            self._end(why)
        if reset:
            self._out.cut_off("connection reset by peer")
        else:
            self._out.forget()

    def wake(self) -> None:
        """Let both waiters look again."""
        self._readable.wake()
        self._writable.wake()

    def resume(self) -> None:
        """The machine runs again after a pause."""
        if self.has_news:
            self._readable.wake()
        if self.is_writable:
            self._writable.wake()

    def on_reset(self, why: str) -> None:
        """The other end, or a box on the way, reset the connection."""
        if self._reset_by_peer is None:
            self._reset_by_peer = why
            self._out.forget()
            self.wake()

    def _on_stray(self) -> None:
        """Data for a closed end. Once all of ours is through, the kernel answers with a reset."""
        if self._out.is_settled:
            self._out.cut_off("connection reset by peer")
