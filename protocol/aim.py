"""Whom to dial in a punch: which of a peer's addresses make sense, and which must not be dialled at all.

A member's word is worth a dial to the internet, not one into this machine or its LAN. So of what it offers

- global addresses are dialled;
- private ones only where both are in one LAN: their NAT has the same public address, or the address lies in a
  subnet of this machine's own; and where the echo itself sees this node at a private address, for then the
  whole mesh lives in such a network;
- loopback only where the echo sees this node there too;
- unspecified, multicast, link-local and reserved ones, and names, never.

IPv6 needs no mapping: both sides know their global address, and dialling from it opens the firewall. In IPv4,
two NATs that both choose another port for each destination have no address to aim at. That is the only pair
that offers show to be impossible: what a NAT lets in is not known before it is tried.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import TYPE_CHECKING

from mycel.protocol.address import Endpoint, endpoint_of
from mycel.protocol.errors import AddressError

if TYPE_CHECKING:
    from mycel.protocol.punch import Offer

Ip = IPv4Address | IPv6Address

SUBNET_BITS = {4: 24, 6: 64}
"""How much of an address two machines of one LAN share at least, by IP version: what homes use."""

SYMMETRIC = "both NATs choose another port for each destination, so neither knows where to aim"


@dataclass(frozen=True, slots=True)
class Aim:
    """What to dial. `obstacle` says why punching is out of the question, "" where it is not."""

    public: tuple[str, ...]
    punch: tuple[str, ...]
    obstacle: str


def take_aim(own: Offer, theirs: Offer, own_ips: Sequence[str], most: int) -> Aim:
    """What to dial of `theirs`, at most `most` addresses of each kind, LAN first, then IPv6."""
    seen = _ips(own.mapped)
    one_nat = any(ip in seen for ip in _ips(theirs.mapped))
    homes = [_ip(text) for text in own_ips]
    inside = [ip for ip in seen if not ip.is_global]
    public = [addr for addr, ip in _parse(theirs.public) if ip.is_global or _like(ip, inside)]
    near = [
        addr for addr, ip in _parse(theirs.near) if _in_lan(ip, [home for home in homes if home], one_nat)
    ]
    near += [addr for addr, ip in _parse(theirs.near) if ip.is_loopback and _like(ip, inside)]
    mapped = [(addr, ip) for addr, ip in _parse(theirs.mapped) if ip.is_global or _like(ip, inside)]
    mapped = [(addr, ip) for addr, ip in mapped if ip.version in {one.version for one in seen} or not seen]
    blind = own.symmetric and theirs.symmetric
    usable = [addr for addr, ip in mapped if ip.version == 6]
    usable += [addr for addr, ip in mapped if ip.version == 4 and not blind]
    punch = tuple(dict.fromkeys([*near, *usable]))[:most]
    obstacle = ""
    if not punch:
        obstacle = SYMMETRIC if blind and mapped else "the peer told no address that this node may dial"
    return Aim(tuple(dict.fromkeys(public))[:most], punch, obstacle)


def _in_lan(ip: Ip, homes: Iterable[Ip], one_nat: bool) -> bool:
    """Whether `ip` is a private address in this machine's LAN."""
    if not _is_private(ip) or ip in homes:
        return False
    return one_nat or any(_share_subnet(ip, home) for home in homes)


def _share_subnet(ip: Ip, home: Ip) -> bool:
    return ip.version == home.version and ip in ip_network(f"{home}/{SUBNET_BITS[ip.version]}", strict=False)


def _like(ip: Ip, inside: Sequence[Ip]) -> bool:
    """Whether `ip` belongs to the closed world in which the echo sees this node."""
    if ip.is_loopback:
        return any(one.is_loopback for one in inside)
    return _is_private(ip) and any(not one.is_loopback and one.version == ip.version for one in inside)


def _is_private(ip: Ip) -> bool:
    """Private or shared (RFC 1918, 6598, 4193) and for use between machines."""
    return not (
        ip.is_global
        or ip.is_loopback
        or ip.is_link_local
        or ip.is_multicast
        or ip.is_unspecified
        or ip.is_reserved
    )


def _parse(addrs: Iterable[str]) -> list[tuple[str, Ip]]:
    """Those of `addrs` that name an IP address and a port, without a peer id."""
    found: list[tuple[str, Ip]] = []
    for addr in addrs:
        try:
            end: Endpoint = endpoint_of(addr)
        except AddressError:
            continue
        ip = None if end.is_name else _ip(end.host)
        if ip is not None and end.port and not ip.is_multicast:
            found.append((f"/ip{ip.version}/{end.host}/tcp/{end.port}", ip))
    return found


def _ips(addrs: Iterable[str]) -> list[Ip]:
    return [ip for _, ip in _parse(addrs)]


def _ip(text: str) -> Ip | None:
    """An address; None for text that is none, and for IPv4 in the dress of IPv6."""
    try:
        ip = ip_address(text)
    except ValueError:
        return None
    return None if isinstance(ip, IPv6Address) and (ip.ipv4_mapped or ip.sixtofour or ip.teredo) else ip
