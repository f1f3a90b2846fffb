"""What a multiaddr says to a network: which host, which TCP port, and which peer is expected there.

Mycel dials `/ip4|ip6|dns|dns4|dns6/HOST/tcp/PORT`, optionally followed by `/p2p/PEERID`
(https://github.com/multiformats/multiaddr). Relayed addresses (`/p2p-circuit`) are not a network's business
and are refused here like every other kind.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from multiaddr import Multiaddr

from mycel.protocol.errors import AddressError
from mycel.protocol.mesh import PeerId

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


@functools.lru_cache(maxsize=4096)
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


@functools.lru_cache(maxsize=4096)
def tcp_addr(host: str, port: int) -> Multiaddr:
    """The multiaddr of a TCP port on an IP address (IPv6 has a colon in it)."""
    return Multiaddr(f"/{'ip6' if ':' in host else 'ip4'}/{host}/tcp/{port}")
