"""A network that remembers whom this node spoke to first.

Whether others can call this node is proven by a connection that comes from an address this node never sent
a packet to: no NAT and no firewall on the way can have taken it for an answer. So everything that this daemon
dials, be it a peer, an echo or a punch, goes through one `Outward`, and `has_contacted` says what proves
nothing.

What a host name resolves to is known of the address that answered only.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Sequence
from ipaddress import IPv6Network, ip_address

from multiaddr import Multiaddr

from mycel.protocol.address import is_circuit
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
        ip = ip_of(addr)
        self._remember(ip)
        pipe = await self._network.dial(addr, local=local)
        if not ip:
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

    def forget(self) -> None:
        """This node is somewhere else now: no NAT and no firewall here knows of what it did before."""
        self._contacted.clear()

    def _remember(self, ip: str) -> None:
        if not ip:
            return
        self._contacted[ip] = None
        self._contacted.move_to_end(ip)
        if len(self._contacted) > CONTACTED_MAX:
            self._contacted.popitem(last=False)


@functools.lru_cache(maxsize=4096)
def ip_of(addr: Multiaddr | str) -> str:
    """The IP address that a direct address leads to, whatever is spoken there; "" for others."""
    text = str(addr)
    parts = text.split("/", 3)
    return parts[2] if len(parts) > 2 and parts[1] in ("ip4", "ip6") and not is_circuit(text) else ""


@functools.lru_cache(maxsize=4096)
def is_outside(ip: str) -> bool:
    """Whether `ip` is an address of the internet at large, as opposed to a private network's."""
    return bool(ip) and ip_address(ip).is_global


@functools.lru_cache(maxsize=4096)
def place_of(ip: str) -> str:
    """Where on the internet an address is: an IPv4 address itself, of an IPv6 one the network of its house.

    Routers give a house a /64, in which machines choose addresses, and choose anew every day.
    """
    return str(IPv6Network(f"{ip}/64", strict=False)) if ":" in ip else ip
