"""Which inbound connections a node takes: bounded in all, in handshake, and per IP address."""

from __future__ import annotations

from collections import Counter

from multiaddr import Multiaddr

from mycel.node.addresses import host_of
from mycel.protocol.limits import Limits


class Admission:
    """Counts of what is connected now."""

    __slots__ = ("_limits", "_per_ip", "connections", "handshakes")

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._per_ip: Counter[str] = Counter()
        self.connections = 0
        """All connections, dialed ones and those in handshake included."""
        self.handshakes = 0
        """Inbound connections whose peer is not proven yet."""

    def refusal(self, remote: Multiaddr) -> str | None:
        """One word for why a connection from `remote` is not taken, None where it is."""
        if self.connections >= self._limits.connections:
            return "connections"
        if self.handshakes >= self._limits.pending_handshakes:
            return "handshakes"
        if self._per_ip[host_of(remote)] >= self._limits.connections_per_ip:
            return "per_ip"
        return None

    def enter(self, remote: Multiaddr, *, inbound: bool) -> None:
        """A connection began."""
        self.connections += 1
        if inbound:
            self.handshakes += 1
            self._per_ip[host_of(remote)] += 1

    def proven(self, *, inbound: bool) -> None:
        """Its handshake succeeded."""
        if inbound:
            self.handshakes -= 1

    def leave(self, remote: Multiaddr, *, inbound: bool, was_proven: bool) -> None:
        """It ended."""
        self.connections -= 1
        if not inbound:
            return
        if not was_proven:
            self.handshakes -= 1
        ip = host_of(remote)
        self._per_ip[ip] -= 1
        if not self._per_ip[ip]:
            del self._per_ip[ip]
