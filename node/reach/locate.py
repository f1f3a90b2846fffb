"""Where a fresh port of this node can be met: what an echo sees of it, and the machine's own addresses.

IPv4 goes by the echo, asked of the relay first and then of other members that this node has a direct
connection to. IPv6 is taken as it is: its addresses are global, and who punches opens the firewall. Where
nobody echoes, the port is told unchanged at the address where others see this node: right for the many NATs
that keep port numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_address

import trio
from multiaddr import Multiaddr

from mycel.node.host import Host
from mycel.node.reach.echo import Echo, Mapped
from mycel.node.reach.meet import Doorstep
from mycel.node.reach.outward import ip_of
from mycel.protocol.address import endpoint_of
from mycel.protocol.errors import MycelError
from mycel.protocol.limits_reach import PunchLimits
from mycel.protocol.mesh import Access, PathKind, PeerId

SERVERS_MAX = 3
"""Echoes asked for one port, one after the other, until one answers."""


@dataclass(frozen=True, slots=True)
class Located:
    """Where a port is. Addresses are TCP addresses without a peer id, as text."""

    mapped: tuple[str, ...]
    near: tuple[str, ...]
    symmetric: bool
    guessed: bool
    """Whether no echo answered."""


class Locator:
    """Finds out where doorsteps are."""

    def __init__(self, host: Host, echo: Echo, limits: PunchLimits) -> None:
        self._host = host
        self._echo = echo
        self._limits = limits

    async def locate(
        self,
        doorstep: Doorstep,
        own_ips: Sequence[str],
        relay: PeerId | None,
        *,
        task_status: trio.TaskStatus[Located] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Started with what was found; keeps the mapping alive until cancelled."""
        local = doorstep.beside("0.0.0.0")
        async with trio.open_nursery() as nursery:
            seen: Mapped | None = None
            with trio.move_on_after(self._limits.learn_s):
                for server in self._servers(relay) if local is not None else ():
                    try:
                        seen = await nursery.start(self._hold, server, local)
                        break
                    except MycelError:
                        continue  # the next one may answer, and a guess is left in the end
            task_status.started(self._located(doorstep, own_ips, relay, seen))
            await trio.sleep_forever()

    async def _hold(
        self,
        server: PeerId,
        local: Multiaddr,
        *,
        task_status: trio.TaskStatus[Mapped] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        async with self._echo.hold(server, local) as mapped:
            task_status.started(mapped)
            await trio.sleep_forever()

    def _servers(self, relay: PeerId | None) -> list[PeerId]:
        """Whom to ask: the relay, then other members with a direct connection that this node made."""
        direct = [
            peer
            for peer, info in self._host.peers.items()
            if info.path is PathKind.DIRECT and info.access >= Access.MEMBER and not info.inbound
        ]
        first = [relay] if relay in direct else []
        return [*first, *(peer for peer in direct if peer != relay)][:SERVERS_MAX]

    def _located(
        self, doorstep: Doorstep, own_ips: Sequence[str], relay: PeerId | None, seen: Mapped | None
    ) -> Located:
        mapped = [str(seen.first)] if seen is not None else self._guess(doorstep, relay)
        near = []
        for ip in own_ips:
            at = doorstep.beside(ip)
            if at is None or ip_address(ip).is_loopback:
                continue
            addr = f"/ip{ip_address(ip).version}/{ip}/tcp/{endpoint_of(at).port}"
            near.append(addr)
            if ":" in ip and ip_address(ip).is_global:
                mapped.append(addr)
        symmetric = seen is not None and seen.is_symmetric
        return Located(tuple(mapped[:8]), tuple(near[:8]), symmetric, guessed=seen is None)

    def _guess(self, doorstep: Doorstep, relay: PeerId | None) -> list[str]:
        """The port as it is, at the address where the relay, or else anybody, sees this node."""
        local = doorstep.beside("0.0.0.0")
        observed = self._host.observed_addrs
        first = [observed[relay]] if relay is not None and relay in observed else []
        ips = [ip_of(addr) for addr in [*first, *observed.values()]]
        at = next((ip for ip in ips if ip and ":" not in ip), None)
        return [f"/ip4/{at}/tcp/{endpoint_of(local).port}"] if at is not None and local is not None else []
