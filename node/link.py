"""One connection at work: a `Connection` (which decides) over a `Pipe`, and the two tasks between them.

Reading: one `try_recv_into` per wake-up into a buffer that all links of a node share, for what arrived is
dealt with before anything else runs. Answers written meanwhile stay corked until the batch is parsed.
Writing: whoever enqueues flushes at once, without a task hop, until the pipe says "not now"; then the writer
task waits for the pipe and drains. Only the link's own tasks touch the pipe's waiting side, so a cancelled
sender never leaves half a frame behind.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable

import trio
from multiaddr import Multiaddr

from mycel.node import introduce
from mycel.node.gate import Arrival, Gate, Service
from mycel.node.keepalive import Keepalive, Verdict
from mycel.node.owner import Owner
from mycel.node.stream import HostStream
from mycel.protocol import yamux
from mycel.protocol.address import is_circuit
from mycel.protocol.channel import Channel
from mycel.protocol.connection import Connection, Stage
from mycel.protocol.errors import (
    ConnectionLost,
    DeadlineExceeded,
    PipeBroken,
    Refused,
    RemoteProtocolError,
)
from mycel.protocol.keys import PublicKey
from mycel.protocol.mesh import PeerId, StreamHandler
from mycel.protocol.network import Pipe, PushingPipe

RECEIVE_BYTES = 512 * 1024
"""What one wake-up takes from the pipe at most."""

SENDS_PER_YIELD = 32
"""Sends in a row that do not yield to other tasks."""

HANDLER_GRACE_S = 5.0
"""How long handlers may go on after their connection is lost."""


class Link:
    """A connection of a host, from the pipe to its end."""

    def __init__(
        self, owner: Owner, pipe: Pipe, *, expected: PeerId | None, dialer: bool, ephemeral: bytes
    ) -> None:
        """A link over `pipe`; `ephemeral` is 32 fresh random bytes."""
        now = trio.current_time()
        setup = owner.setup.nested() if is_circuit(pipe.remote) else owner.setup
        self._owner = owner
        self._pipe = pipe
        self._connection = Connection(setup, self, expected=expected, dialer=dialer, ephemeral=ephemeral)
        self._keepalive = Keepalive(setup.limits, now)
        self._corked = False
        self._blocked = False
        self._turns = 0
        self._writer: trio.lowlevel.Task | None = None
        self._scope = trio.CancelScope()
        self._handlers: trio.Nursery | None = None
        self._slots = trio.lowlevel.ParkingLot()
        self._changed = trio.lowlevel.ParkingLot()
        self._gate: Gate | None = None
        self.limits = setup.limits
        self.dialer = dialer
        self.is_relayed = is_circuit(pipe.remote)
        self.since = now
        self.key: PublicKey | None = None
        self.arrivals: dict[int, Arrival] = {}
        self.lost: ConnectionLost | None = None
        self.failure: Exception | None = None
        """What this side saw go wrong, where the connection did not just end."""
        self.draining = False
        self.superseded = False
        """Whether another link to the same peer took over."""
        self._drained_by = math.inf
        self.farewell: tuple[str, str] | None = None
        """Reason and text that the peer gave before it closed."""

    def __repr__(self) -> str:
        return f"<Link {self._pipe.local} {'->' if self.dialer else '<-'} {self._pipe.remote}>"

    @property
    def remote(self) -> Multiaddr:
        """The other end's address."""
        return self._pipe.remote

    @property
    def peer(self) -> PeerId:
        """Who is at the other end; only once open."""
        assert self.key is not None
        return self.key.peer_id

    @property
    def rtt(self) -> float | None:
        """Smoothed round trip in seconds."""
        return self._connection.session.rtt if self.is_open else None

    @property
    def is_open(self) -> bool:
        """Whether streams can be opened."""
        return self._connection.stage is Stage.OPEN

    @property
    def channels(self) -> int:
        """Streams on this link."""
        return self._connection.session.channels if self.is_open else 0

    @property
    def window(self) -> int:
        """The receive window that this peer filled so far, in bytes."""
        return self._connection.window

    @property
    def proven(self) -> bool:
        """Whether the handshake succeeded and the host took the peer."""
        return self._gate is not None

    # Tasks

    async def run(self) -> None:
        """Serve the connection until it ends. Cancelling closes it."""
        async with trio.open_nursery() as handlers:
            self._handlers = handlers
            try:
                with self._scope:
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(self._write)
                        await self._read()
            finally:
                self._owner.on_shutdown(self)
                handlers.cancel_scope.deadline = trio.current_time() + HANDLER_GRACE_S

    async def _read(self) -> None:
        buffer = self._owner.receive_buffer
        pipe = self._pipe
        self.flush()
        if isinstance(pipe, PushingPipe):
            pipe.push_to(self._receive)
        try:
            while True:
                count = pipe.try_recv_into(buffer)
                if count is None:
                    await pipe.wait_readable()
                    continue
                if count == 0:
                    self._on_eof()
                    return
                self._receive(buffer[:count])
                if count < len(buffer):
                    await pipe.wait_readable()
                else:
                    await trio.lowlevel.checkpoint()
        except PipeBroken as error:
            self._on_eof(str(error))

    def _receive(self, data: memoryview) -> None:
        now = trio.current_time()
        self._keepalive.on_heard(now)
        self._corked = True
        try:
            self._connection.receive(data, now)
        except RemoteProtocolError as error:
            self.failure = error
            self.end("protocol", str(error))
        except Refused as error:
            self.failure = error
            self.end("refused", str(error))
        finally:
            self._corked = False
        self.flush()

    async def _write(self) -> None:
        try:
            while True:
                if self._blocked:
                    await self._pipe.wait_writable()
                    self._blocked = False
                else:
                    self._writer = trio.lowlevel.current_task()
                    await trio.lowlevel.wait_task_rescheduled(self._abort_writer)
                self.flush()
        except PipeBroken as error:
            self._on_eof(str(error))

    def _abort_writer(self, _: trio.lowlevel.RaiseCancelT) -> trio.lowlevel.Abort:
        self._writer = None
        return trio.lowlevel.Abort.SUCCEEDED

    def flush(self) -> None:
        """Hand what waits to the pipe as far as it takes it. Never blocks, never raises."""
        if self._corked or self._blocked or self.lost is not None:
            return
        connection = self._connection
        try:
            while view := connection.outgoing():
                count = self._pipe.try_send(view)
                if not connection.sent(count):
                    return
                if count < len(view):
                    self._blocked = True
                    self._wake_writer()
                    return
        except PipeBroken as error:
            self._blocked = True  # nothing more is sent, not even why
            self._on_eof(str(error))

    def is_turn_over(self) -> bool:
        """Whether senders that found room did so often enough in a row to let other tasks run now."""
        self._turns += 1
        return self._turns % SENDS_PER_YIELD == 0

    def _wake_writer(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            trio.lowlevel.reschedule(writer)

    # Streams

    async def has_slot(self) -> bool:
        """Park until a stream can be opened: True; False where the link is drained meanwhile.

        Raises `ConnectionLost`.
        """
        while not (self.is_open and self._connection.session.can_open):
            if self.lost is not None:
                raise self.lost
            if self.draining:
                return False
            await self._slots.park()
        return True

    async def open_stream(self, protocol: str) -> HostStream:
        """A stream; waits for a free slot. Raises `ConnectionLost`."""
        if not await self.has_slot():
            raise ConnectionLost(f"the connection to {self.peer} is closing", reason="closed")
        return HostStream(self, self._connection.session.open(), self.peer, protocol)

    def try_open_stream(self, protocol: str) -> HostStream | None:
        """A stream, None where it would have to be waited for."""
        connection = self._connection
        if self.draining or connection.stage is not Stage.OPEN:
            return None
        channel = connection.session.try_open()
        return None if channel is None else HostStream(self, channel, self.peer, protocol)

    def on_stream(self, stream: HostStream, service: Service, data: memoryview | bytes) -> None:
        """An inbound stream's protocol is agreed; `data` came behind it."""
        if data:
            stream.take(data)
        if stream.protocol == introduce.FAREWELL:
            self.farewell = introduce.read_farewell(bytes(data))
            stream.reset()
            return
        assert self._gate is not None
        self._gate.admit(self, stream, service)

    def start_handler(self, stream: HostStream, handler: StreamHandler) -> None:
        """Serve `stream` in a task of its own."""
        if self.lost is None and self._handlers is not None:
            self._handlers.start_soon(self._owner.handle, stream, handler)

    def start_soon(self, task: Callable[..., Awaitable[None]], *args: object) -> None:
        """Run a task of the host's that ends with this link."""
        if self.lost is None and self._handlers is not None:
            self._handlers.start_soon(task, *args)

    def turn_away(self, stream: HostStream) -> None:
        """The peer has no right to this stream."""
        self._owner.on_stream_refused("access")
        stream.reset()

    def on_handler_error(self, protocol: str, error: Exception) -> None:
        """See `Owner.on_handler_error`."""
        self._owner.on_handler_error(protocol, error)

    # What the connection calls

    def on_open(self, remote: PublicKey) -> None:
        """See `connection.Observer`."""
        now = trio.current_time()
        self.key = remote
        self.since = now
        self._gate = self._owner.on_open(self)
        session = self._connection.session
        session.learned = self._owner.learned_window(self.peer)
        session.ping(now)
        self._changed.unpark_all()

    def on_channel(self, channel: Channel) -> None:
        """See `session.Observer`."""
        deadline = self._connection.now + self.limits.negotiate_s
        self.arrivals[channel.id] = Arrival(self, channel, self._owner.services, deadline)

    def on_slot(self) -> None:
        """See `session.Observer`."""
        if self._slots:
            self._slots.unpark()

    def on_go_away(self, code: int) -> None:
        """See `session.Observer`."""
        if code == yamux.NORMAL:
            self.drain()
            self._owner.on_drain(self)
            return
        reason, text = self.farewell or ("closed", f"the peer went away with code {code}")
        self.end(reason, text)

    # Time and ends

    def on_tick(self, now: float, late: float) -> None:
        """Look after the connection, every `keepalive.TICK_S`. `late` seconds did not run here."""
        if late:
            self._keepalive.forgive(late)
        if not self.is_open:
            if self.lost is None and now - self.since - late > self.limits.handshake_s:
                self.failure = DeadlineExceeded(f"no handshake within {self.limits.handshake_s:g} s")
                self.end("closed", str(self.failure))
            return
        session = self._connection.session
        for arrival in list(self.arrivals.values()):
            if now < arrival.deadline:
                break
            self._owner.on_stream_refused("negotiation")
            arrival.expire(self.limits.negotiate_s)
        session.on_tick(now)
        verdict = self._keepalive.judge(now)
        if verdict is Verdict.DEAD:
            self.end("silent", f"nothing came from the peer for {self.limits.silence_s:g} s")
            return
        if verdict is Verdict.PING:
            session.ping(now)
        self.flush()
        self.close_if_drained()

    async def wait_open(self) -> None:
        """Park until the connection is open. Raises why it is not, if it ends before."""
        while self.key is None:
            if self.lost is not None:
                raise self.failure or self.lost
            await self._changed.park()

    def drain(self, by: float = math.inf) -> None:
        """Open no more streams here; close once the peer agrees and none are left, or at the time `by`."""
        self.draining = True
        self._drained_by = min(self._drained_by, by)
        self._slots.unpark_all()
        if self.is_open:
            self._connection.session.go_away(yamux.NORMAL)
            self.flush()

    def close_if_drained(self) -> None:
        """Close where both sides open no more streams and none is left, or when it took too long."""
        if self.is_open and self.draining:
            session = self._connection.session
            agreed = session.go_away_sent and session.go_away_received
            if (agreed and not session.channels) or trio.current_time() >= self._drained_by:
                self._on_eof()

    def end(self, reason: str, text: str) -> None:
        """End the connection now; streams and waiters see `ConnectionLost`. Once is enough."""
        if self.lost is not None:
            return
        code = yamux.PROTOCOL_ERROR if reason == "protocol" else yamux.NORMAL
        if self.is_open and reason not in ("silent", "reset"):
            self._corked = False
            if self.farewell is None and reason != "superseded":
                introduce.say_farewell(self._connection.session, reason, text)
            self._connection.session.go_away(code)
            self.flush()
        if self.lost is not None:
            return
        name = self.key.peer_id if self.key is not None else "a peer in handshake"
        self.lost = ConnectionLost(f"connection to {name} at {self.remote} lost: {text}", reason=reason)
        self._connection.lose(self.lost)
        if reason in ("silent", "reset"):
            self._pipe.reset()
        else:
            self._pipe.close()
        self.arrivals.clear()
        self._scope.cancel()
        self._slots.unpark_all()
        self._changed.unpark_all()
        self._owner.on_lost(self)

    def _on_eof(self, broken: str | None = None) -> None:
        if self.farewell is not None:
            self.end(*self.farewell)
        elif broken is not None:
            self.end("reset", broken.removeprefix(f"connection to {self.remote} was lost: "))
        elif self.superseded:
            self.end("superseded", "another connection to this peer took over")
        else:
            self.end("closed", "the peer closed it")
