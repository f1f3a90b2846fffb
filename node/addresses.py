"""Which addresses others can dial, of those that this node listens on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network

from multiaddr import Multiaddr

from mycel.protocol.address import circuit_of, endpoint_of, is_circuit, is_web, tcp_addr, tcp_of, web_of

WILDCARDS = ("0.0.0.0", "::")


def dialable(bound: Iterable[Multiaddr], local_ips: Sequence[str]) -> list[Multiaddr]:
    """`bound` with every wildcard replaced by this machine's addresses of its family.

    Loopback stands for a wildcard only where the machine has no other address.
    """
    addrs: list[Multiaddr] = []
    for addr in bound:
        if is_web(addr):
            below = web_of(addr).tcp
            suffix = str(addr).removeprefix(str(below))
            addrs.extend(Multiaddr(f"{one}{suffix}") for one in dialable([below], local_ips))
            continue
        end = endpoint_of(addr)
        hosts: Sequence[str] = [end.host]
        if end.host in WILDCARDS:
            local = [ip for ip in local_ips if (":" in ip) == (":" in end.host)]
            hosts = [ip for ip in local if not ip_address(ip).is_loopback] or local
        addrs.extend(tcp_addr(host, end.port) for host in hosts)
    return addrs


def host_of(addr: Multiaddr) -> str:
    """The IP address or name that `addr` leads to first: of a relayed one, the relay's."""
    if is_circuit(addr):
        return host_of(circuit_of(addr).relay)
    return tcp_of(addr).host


def shares_network(ip: str, own: Sequence[str]) -> bool:
    """Whether a private address `ip` is likely in a network that this machine, with addresses `own`, is in.

    Masks are not known here, so it goes by the sizes that such networks usually have.
    """
    there = ip_address(ip)
    return any(there in network for network in map(_network_of, own) if network.version == there.version)


def _network_of(ip: str) -> IPv4Network | IPv6Network:
    """The network around an address: what a house has, or a carrier, or an overlay such as 100.64/10."""
    address = ip_address(ip)
    for block, bits in (("192.168.0.0/16", 24), ("100.64.0.0/10", 10), ("127.0.0.0/8", 8)):
        if address.version == 4 and address in ip_network(block):
            return ip_network(f"{ip}/{bits}", strict=False)
    return ip_network(f"{ip}/{16 if address.version == 4 else 64}", strict=False)
