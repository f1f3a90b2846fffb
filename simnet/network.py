"""The `Network` of a simulated machine: what a whole daemon runs on in memory.

A dial is TCP's handshake: SYN, SYN-ACK, ACK, each one latency. The dialler's pipe is ready after one round
trip, the acceptor's half a round trip later, accepted or not. A port nobody listens on answers with a reset;
an address nobody has is unreachable; where packets vanish the SYN is sent again after 1, 2, 4, ... s
(RFC 6298 and Linux's tcp_syn_retries) until the dial's own deadline, or the kernel's patience, ends.
"""

from __future__ import annotations

import random

import trio
from multiaddr import Multiaddr

from mycel.protocol.address import endpoint_of, tcp_addr
from mycel.protocol.errors import AddressError, DialError
from mycel.simnet.flow import Flow
from mycel.simnet.machine import Machine, SimListener
from mycel.simnet.park import Park
from mycel.simnet.pipe import Address, SimPipe

SYN_TIMEOUT_S = 1.0
SYN_TRIES = 7
"""One SYN and six retransmissions: 127 s."""


class Dial:
    """One handshake under way."""

    def __init__(self, machine: Machine, target: Machine | None, near: Address, far: Address) -> None:
        self._machine = machine
        self._target = target
        self._near = near
        self._far = far
        self._park = Park("a dial")
        self._tries = 0
        self._pipe: SimPipe | None = None
        self._far_pipe: SimPipe | None = None
        self._failure: str | None = None
        self._abandoned = False

    async def finish(self) -> SimPipe:
        """The near end. Raises `DialError`. Cancelled: the other end sees a reset."""
        self._send_syn()
        try:
            while self._pipe is None and self._failure is None:
                await self._park.wait()
        except trio.Cancelled:
            self._abandoned = True
            raise
        if self._pipe is None:
            raise DialError(f"cannot reach {tcp_addr(*self._far)}: {self._failure}")
        return self._pipe

    def _fail(self, why: str) -> None:
        if self._pipe is None:
            self._failure = self._failure or why
            self._park.wake()

    def _send_syn(self) -> None:
        if self._abandoned or self._failure or self._pipe:
            return
        net = self._machine.internet
        if self._target is None:
            net.timeline.after(2 * self._machine.link.latency_s, self._fail, "No route to host")
        elif self._tries == SYN_TRIES:
            self._fail("Connection timed out")
        else:
            if not net.is_cut(self._machine, self._target):
                net.timeline.after(net.latency(self._machine, self._target), self._on_syn)
            net.timeline.after(SYN_TIMEOUT_S * 2**self._tries, self._send_syn)
            self._tries += 1

    def _on_syn(self) -> None:
        """At the target."""
        assert self._target is not None
        net = self._machine.internet
        if net.is_cut(self._machine, self._target):
            return
        net.trace.note("syn", self._machine.name, self._target.name, self._far[1])
        back = net.latency(self._machine, self._target)
        if self._far_pipe is None:
            listener = self._target.listener_at(*self._far)
            if listener is None:
                net.timeline.after(back, self._fail, "Connection refused")
                return
            if listener.is_full:
                return
            self._far_pipe = self._make_pipes(self._target, listener)
            net.timeline.after(2 * back, listener.admit, self._far_pipe)
        net.timeline.after(back, self._on_syn_ack)

    def _make_pipes(self, target: Machine, listener: SimListener) -> SimPipe:
        names = f"{self._near[0]}:{self._near[1]}", f"{self._far[0]}:{self._far[1]}"
        there = Flow(f"{names[0]}>{names[1]}", self._machine, target)
        back = Flow(f"{names[1]}>{names[0]}", target, self._machine)
        listener.coming += 1
        self._near_pipe = SimPipe(self._machine, self._near, self._far, there, back)
        far_pipe = SimPipe(target, self._far, self._near, back, there)
        target.own_pipe(far_pipe)
        return far_pipe

    def _on_syn_ack(self) -> None:
        """Back at the dialler."""
        assert self._target is not None
        if self._pipe is not None or self._machine.internet.is_cut(self._machine, self._target):
            return
        self._pipe = self._near_pipe
        if self._abandoned or not self._machine.is_on:
            self._pipe.reset()
        else:
            self._machine.own_pipe(self._pipe)
            self._park.wake()


class SimNetwork:
    """`Network` for the programs of one machine."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self._random = random.Random(f"{machine.internet.options.seed} {machine.name}")

    async def dial(self, addr: Multiaddr, *, local: Multiaddr | None = None) -> SimPipe:
        """See `Network.dial`. A host name is dialled at its addresses in `Internet.names`, in order."""
        endpoint = endpoint_of(addr)
        wanted = None
        if local is not None:
            near = endpoint_of(local)
            if near.is_name:
                raise AddressError(f"{local} names a host; a local address is /ip4/... or /ip6/...")
            wanted = (near.host, near.port)
        hosts = self.machine.internet.names.get(endpoint.host, ()) if endpoint.is_name else (endpoint.host,)
        if not hosts:
            raise DialError(f"cannot resolve {endpoint.host}: Name or service not known")
        failures: list[str] = []
        for host in hosts:
            try:
                return await self._dial_ip((host, endpoint.port), wanted)
            except DialError as error:
                failures.append(str(error))
        raise DialError("; ".join(failures))

    async def _dial_ip(self, far: Address, wanted: Address | None) -> SimPipe:
        await trio.lowlevel.checkpoint()
        target = self.machine if self.machine.has_ip(far[0]) else self.machine.internet.find(far[0])
        try:
            near = self.machine.bind(wanted, far)
        except AddressError as error:
            raise DialError(f"cannot reach {tcp_addr(*far)}: {error}") from None
        if not near[0]:
            raise DialError(f"cannot reach {tcp_addr(*far)}: Network is unreachable")
        return await Dial(self.machine, target, near, far).finish()

    async def listen(self, addr: Multiaddr, *, shared: bool = False) -> SimListener:
        """See `Network.listen`."""
        endpoint = endpoint_of(addr)
        if endpoint.is_name:
            raise AddressError(f"{addr} names a host; listen on an IP address such as /ip4/0.0.0.0/tcp/0")
        await trio.lowlevel.checkpoint()
        return self.machine.listen(endpoint.host, endpoint.port, shared=shared)

    def local_ips(self) -> list[str]:
        """See `Network.local_ips`."""
        return [*self.machine.ips, "127.0.0.1"]

    def wall(self) -> float:
        """See `Network.wall`."""
        return self.machine.internet.wall()

    def entropy(self, count: int) -> bytes:
        """See `Network.entropy`: a stream of this machine's own, from the seed."""
        return self._random.randbytes(count)
