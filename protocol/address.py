"""What a multiaddr says to a network: which host, which TCP port, and which peer is expected there.

A network dials `/ip4|ip6|dns|dns4|dns6/HOST/tcp/PORT`, optionally followed by `/p2p/PEERID`
(https://github.com/multiformats/multiaddr). A relayed address, `RELAY/p2p-circuit/p2p/PEERID`
(libp2p specs/relay/circuit-v2), names a peer behind a relay: `circuit_of` takes it apart, and a network
refuses it like every other kind. `/ws`, `/wss` and `/tls/ws` behind a TCP address say that WebSocket is
spoken there; `web_of` takes them apart.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from multiaddr import Multiaddr

from mycel.protocol.errors import AddressError
from mycel.protocol.mesh import PeerId

CIRCUIT = "p2p-circuit"
"""The part of a multiaddr that stands between a relay and who is reached through it."""

HOST_KINDS = ("ip4", "ip6", "dns", "dns4", "dns6")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A host and a TCP port. `kind` is one of `HOST_KINDS`; `peer` is who the address says is there."""

    kind: str
    host: str
    port: int
    peer: PeerId | None = None

    @property
    def is_name(self) -> bool:
        """Whether the host must be resolved first."""
        return self.kind.startswith("dns")


@functools.lru_cache(maxsize=16384)
def endpoint_of(addr: Multiaddr | str) -> Endpoint:
    """The TCP endpoint that `addr` names. Raises `AddressError` for any other kind of address."""
    try:
        parts = [
            (protocol.name, value)
            for protocol, value in (Multiaddr(addr) if isinstance(addr, str) else addr).items()
        ]
    except Exception as error:  # boundary: multiaddr raises a dozen kinds of its own for malformed text
        raise AddressError(f"{addr} is not a multiaddr ({error}); write /ip4/HOST/tcp/PORT") from error
    peer: PeerId | None = None
    if len(parts) == 3 and parts[2][0] == "p2p":
        peer = PeerId(str(parts[2][1]))
        parts = parts[:2]
    if len(parts) != 2 or parts[0][0] not in HOST_KINDS or parts[1][0] != "tcp":
        raise AddressError(f"{addr} is not a TCP address; write /ip4/HOST/tcp/PORT, /ip6/... or /dns/...")
    return Endpoint(parts[0][0], str(parts[0][1]), int(parts[1][1] or 0), peer)


@functools.lru_cache(maxsize=1024)
def tcp_addr(host: str, port: int) -> Multiaddr:
    """The multiaddr of a TCP port on an IP address (IPv6 has a colon in it)."""
    return Multiaddr(f"/{'ip6' if ':' in host else 'ip4'}/{host}/tcp/{port}")


@dataclass(frozen=True, slots=True)
class Circuit:
    """A relayed address, taken apart."""

    relay: Multiaddr
    """Where the relay is dialled; it ends in `/p2p/RELAYID`."""
    relay_peer: PeerId
    peer: PeerId | None
    """Who is reached through it; None in the address that a relay's own listener shows."""


@functools.lru_cache(maxsize=16384)
def is_circuit(addr: Multiaddr | str) -> bool:
    """Whether `addr` leads through a relay."""
    return f"/{CIRCUIT}" in str(addr)


@functools.lru_cache(maxsize=1024)
def circuit_of(addr: Multiaddr | str) -> Circuit:
    """The parts of a relayed address. Raises `AddressError` where `addr` is none, or leads through two."""
    before, found, after = str(addr).partition(f"/{CIRCUIT}")
    relay_peer = peer_of(before) if found else None
    if relay_peer is None or CIRCUIT in after or not (after == "" or after.startswith("/p2p/")):
        raise AddressError(f"{addr} is not a relayed address; write RELAY/p2p/RELAYID/{CIRCUIT}/p2p/PEERID")
    return Circuit(Multiaddr(before), relay_peer, PeerId(after.removeprefix("/p2p/")) if after else None)


def peer_of(addr: Multiaddr | str) -> PeerId | None:
    """Who is expected at the far end of `addr`, relayed or not; None where it does not say.

    Raises `AddressError` for an address that no node can dial.
    """
    if is_circuit(addr):
        return circuit_of(addr).peer
    return web_of(addr).peer if is_web(addr) else endpoint_of(addr).peer


@dataclass(frozen=True, slots=True)
class WebAddress:
    """An address at which WebSocket is spoken, taken apart."""

    tcp: Multiaddr
    """What is dialled or listened on below it."""
    is_secure: bool
    """Whether TLS comes between."""
    peer: PeerId | None


WEB_SUFFIXES = {"/tls/ws": True, "/wss": True, "/ws": False}
"""How an address ends at which WebSocket is spoken, the longest first, and whether TLS comes between."""


@functools.lru_cache(maxsize=16384)
def is_web(addr: Multiaddr | str) -> bool:
    """Whether WebSocket is spoken at `addr` itself."""
    return not is_circuit(addr) and _bare(addr).endswith(tuple(WEB_SUFFIXES))


@functools.lru_cache(maxsize=1024)
def web_of(addr: Multiaddr | str) -> WebAddress:
    """The parts of a WebSocket address. Raises `AddressError` where `addr` is none."""
    bare = _bare(addr)
    peer = str(addr).removeprefix(bare).removeprefix("/p2p/")
    for suffix, is_secure in WEB_SUFFIXES.items():
        if bare.endswith(suffix):
            tcp = Multiaddr(bare.removesuffix(suffix))
            endpoint_of(tcp)
            return WebAddress(tcp, is_secure, PeerId(peer) if peer else None)
    raise AddressError(f"{addr} is not a WebSocket address; write /ip4/HOST/tcp/PORT/ws")


def tcp_of(addr: Multiaddr | str) -> Endpoint:
    """The TCP endpoint at or below `addr`, which is not a relayed one. Raises `AddressError`."""
    return endpoint_of(web_of(addr).tcp if is_web(addr) else addr)


def _bare(addr: Multiaddr | str) -> str:
    """`addr` without the peer at its end."""
    return str(addr).partition("/p2p/")[0]
