"""The seam below: what the connection core asks of a network.

Two worlds implement it, real TCP (`mycel.node.tcp`) and the internet in memory (`mycel.simnet`); everything
above is the same code in both, and one contract battery (tests/contract) runs over both.

A `Pipe` never blocks: the connection core flushes and reads without a task hop and waits only when the
pipe says "not now". Time is trio's: `trio.current_time()` is the monotonic clock of both worlds (virtual in
the simulated one), `Network.wall()` the calendar. Randomness that may show on the wire comes from
`Network.entropy`, so that a simulated world replays from its seed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from multiaddr import Multiaddr


class Pipe(Protocol):
    """An ordered, reliable, two-way pipe of bytes: a TCP connection or its simulated twin.

    At most one task waits for each direction. After `close` or `reset` every method but these two raises
    `PipeBroken`, and a task that waits is woken to find that out.
    """

    @property
    def local(self) -> Multiaddr:
        """This end's address, as the pipe sees it."""

    @property
    def remote(self) -> Multiaddr:
        """The other end's address, as the pipe sees it (behind a NAT: the NAT's)."""

    def try_send(self, data: memoryview | bytes | bytearray) -> int:
        """Hand over as many leading bytes of `data` as fit now; returns how many, 0 when none fit.

        Raises `PipeBroken` when the pipe was reset or closed.
        """

    def try_recv_into(self, buffer: memoryview | bytearray) -> int | None:
        """Fill `buffer` from the front with what has arrived.

        Returns the number of bytes, 0 at the end of the stream (the peer closed), None when nothing has
        arrived yet. Raises `PipeBroken` when the pipe was reset.
        """

    async def wait_writable(self) -> None:
        """Park until `try_send` would take at least a byte or raise."""

    async def wait_readable(self) -> None:
        """Park until `try_recv_into` would return a number or raise."""

    def close(self) -> None:
        """Close in order: bytes already taken are still delivered. Never blocks, never raises."""

    def reset(self) -> None:
        """Close at once (TCP RST): the other end sees `PipeBroken`. Never blocks, never raises."""


@runtime_checkable
class PushingPipe(Pipe, Protocol):
    """A pipe that can hand over what arrives at once, without a task that reads.

    For a pipe within another connection, whose reader has the bytes at hand.
    """

    def push_to(self, receiver: Callable[[memoryview], None]) -> None:
        """From now on call `receiver` with what arrives (writable, valid during the call), and now with what
        has arrived. The pipe's end and its loss still show in `try_recv_into`."""


class Listener(Protocol):
    """A listening address. Leaving it unaccepted for long refuses newcomers; closing it frees the port."""

    @property
    def addr(self) -> Multiaddr:
        """The bound address with the real port, even where port 0 was asked for."""

    async def accept(self) -> Pipe:
        """The next inbound pipe. Raises `PipeBroken` once the listener is closed."""

    def close(self) -> None:
        """Stop listening. Pipes already accepted live on."""


class Network(Protocol):
    """Dial, listen, calendar, entropy."""

    async def dial(self, addr: Multiaddr, *, local: Multiaddr | None = None) -> Pipe:
        """Open a pipe to `addr` (/ip4|ip6|dns/.../tcp/PORT; a trailing /p2p/ID is ignored).

        `local` binds the near end (with address and port reuse, for hole punching beside a `shared`
        listener). Raises `AddressError` for an address of another kind, `DialError` when refused or
        unreachable. The deadline is the caller's cancel scope.
        """

    async def listen(self, addr: Multiaddr, *, shared: bool = False) -> Listener:
        """Listen on `addr` (port 0: any free port). `shared` lets dials leave from the same port.

        Raises `AddressError` when the address cannot be bound, saying which and why.
        """

    def local_ips(self) -> Sequence[str]:
        """The IP addresses of this machine's interfaces, loopback last."""

    def wall(self) -> float:
        """Seconds since 1970 by this machine's calendar clock (may jump; never use it for durations)."""

    def entropy(self, count: int) -> bytes:
        """`count` random bytes: the operating system's, or the simulation's seeded stream."""
