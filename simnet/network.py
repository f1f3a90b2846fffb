"""The `Network` of a simulated machine: what a whole daemon runs on in memory.

What a dial does segment by segment is told in `mycel.simnet.tcp`. To the program it looks like the real
one: a port nobody listens on answers with a reset, an address nobody has is unreachable, and where packets
vanish the dial hangs until its own deadline, or the kernel's patience, ends.
"""

from __future__ import annotations

import random

import trio
from multiaddr import Multiaddr

from mycel.protocol.address import endpoint_of, tcp_addr
from mycel.protocol.errors import AddressError, DialError
from mycel.simnet.machine import Machine, SimListener
from mycel.simnet.packet import Address
from mycel.simnet.pipe import SimPipe


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
        try:
            near = self.machine.bind(wanted, far)
        except AddressError as error:
            raise DialError(f"cannot reach {tcp_addr(*far)}: {error}") from None
        if not near[0]:
            raise DialError(f"cannot reach {tcp_addr(*far)}: Network is unreachable")
        return await self.machine.tcp.dial(near, far).finish()

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
