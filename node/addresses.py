"""Which addresses others can dial, of those that this node listens on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from ipaddress import ip_address

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
