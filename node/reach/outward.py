"""A network that remembers whom this node spoke to first.

Whether others can call this node is proven by a connection that comes from an address this node never sent
a packet to: no NAT and no firewall on the way can have taken it for an answer. So everything that this daemon
dials, be it a peer, an echo or a punch, goes through one `Outward`, and `has_contacted` says what proves
nothing.

What a host name resolves to is known of the address that answered only.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from multiaddr import Multiaddr

from mycel.protocol.address import endpoint_of
from mycel.protocol.errors import AddressError
from mycel.protocol.network import Listener, Network, Pipe

CONTACTED_MAX = 65536
"""Addresses remembered; about 100 bytes each. The oldest is forgotten first: NATs forget within hours."""


class Outward:
    """`Network` over another one, with a memory of dialled IP addresses."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._contacted: OrderedDict[str, None] = OrderedDict()

    def has_contacted(self, ip: str) -> bool:
        """Whether this node ever sent a packet to `ip` of its own accord."""
        return ip in self._contacted

    def contacted(self) -> Sequence[str]:
        """The IP addresses that this node dialled, oldest first."""
        return tuple(self._contacted)

    async def dial(self, addr: Multiaddr, *, local: Multiaddr | None = None) -> Pipe:
        """See `Network.dial`."""
        endpoint = endpoint_of(addr)
        if not endpoint.is_name:
            self._remember(endpoint.host)
        pipe = await self._network.dial(addr, local=local)
        if endpoint.is_name:
            self._remember(ip_of(pipe.remote))
        return pipe

    async def listen(self, addr: Multiaddr, *, shared: bool = False) -> Listener:
        """See `Network.listen`."""
        return await self._network.listen(addr, shared=shared)

    def local_ips(self) -> Sequence[str]:
        """See `Network.local_ips`."""
        return self._network.local_ips()

    def wall(self) -> float:
        """See `Network.wall`."""
        return self._network.wall()

    def entropy(self, count: int) -> bytes:
        """See `Network.entropy`."""
        return self._network.entropy(count)

    def _remember(self, ip: str) -> None:
        self._contacted[ip] = None
        self._contacted.move_to_end(ip)
        if len(self._contacted) > CONTACTED_MAX:
            self._contacted.popitem(last=False)


def ip_of(addr: Multiaddr) -> str:
    """The IP address in `addr`; "" where it has none (a relayed address, a name)."""
    try:
        endpoint = endpoint_of(addr)
    except AddressError:
        return ""
    return "" if endpoint.is_name else endpoint.host
