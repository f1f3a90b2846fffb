"""Asking the router at home to forward a port to this node: UPnP IGD, else NAT-PMP (RFC 6886).

Of the two the first that answers is used, through `miniupnpc` and `py-natpmp`; routers that speak PCP answer
NAT-PMP too (RFC 6887, appendix A), so it is not spoken by itself. A mapping is leased, renewed when half of
the lease is over, asked for anew when this machine moved, and given back at exit. What the router promises
is a claim like any other: `mycel.node.reach.probe` has somebody call there before it is told to others. A
router that is itself behind another one has no public address, and its promise is not even tried.

Both libraries block, so they run in threads; they send to the LAN's multicast and to the gateway only. This
is a service of real nodes: a simulated box has no UPnP.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Protocol

import miniupnpc
import trio
from natpmp import NATPMP

from mycel.node.running import Node
from mycel.protocol.address import Endpoint, endpoint_of, is_web, tcp_addr

log = logging.getLogger("mycel.node")

LEASE_S = 3600
AGAIN_S = 900.0
"""How soon a router that did not answer is asked again: somebody may have switched it on."""
SEARCH_MS = 1500
"""How long UPnP routers have to answer the search."""
PMP_TRIES = 3
"""NAT-PMP requests: 0.25, 0.5 and 1 s are waited for an answer."""
GOODBYE_S = 3.0
"""How long giving the port back may take at exit."""
OTHER_PORTS = 4
"""Ports tried at a router whose first choice is taken."""


class GatewayError(Exception):
    """No router does what was asked, and why."""


@dataclass(frozen=True, slots=True)
class Forwarded:
    """A promise of the router: what comes to `ip`:`port` there goes to the asked port here."""

    ip: str
    port: int


class Router(Protocol):
    """A gateway that answered. Every method blocks and raises `GatewayError`."""

    name: str

    def forward(self, port: int, wanted: int) -> Forwarded:
        """Forward TCP port `wanted` outside, or another one, to `port` here, for `LEASE_S`; renews too."""

    def give_back(self, port: int, forwarded: Forwarded) -> None:
        """Forward it no more."""


class UpnpRouter:
    """An Internet Gateway Device (UPnP IGD:1 and :2)."""

    name = "UPnP"

    def __init__(self) -> None:
        """Search the LAN. Raises `GatewayError` where none answers."""
        self._igd = miniupnpc.UPnP()
        self._igd.discoverdelay = SEARCH_MS
        try:
            self._igd.discover()
            self._igd.selectigd()
        except Exception as error:  # boundary: the library raises bare Exception for all that can go wrong
            raise GatewayError(f"no router answers UPnP ({error})") from None

    def forward(self, port: int, wanted: int) -> Forwarded:
        """See `Router.forward`."""
        failure = ""
        for outside in range(wanted, min(wanted + OTHER_PORTS, 65536)):
            try:
                if self._igd.addportmapping(outside, "TCP", self._igd.lanaddr, port, "mycel", "", LEASE_S):
                    return Forwarded(self._igd.externalipaddress(), outside)
            except Exception as error:  # boundary: as above; the next port may be free
                failure = str(error)
        raise GatewayError(f"the router does not forward a port by UPnP ({failure})")

    def give_back(self, port: int, forwarded: Forwarded) -> None:
        """See `Router.give_back`."""
        try:
            self._igd.deleteportmapping(forwarded.port, "TCP")
        except Exception as error:  # boundary: as above
            raise GatewayError(f"the router keeps the port ({error})") from None


class PmpRouter:
    """A gateway that speaks NAT-PMP."""

    name = "NAT-PMP"

    def __init__(self) -> None:
        """Ask the default gateway. Raises `GatewayError` where it does not answer."""
        try:
            self._ip = NATPMP.get_gateway_addr()
            self._public()
        except (NATPMP.NATPMPError, OSError) as error:
            raise GatewayError(f"the gateway does not answer NAT-PMP ({error})") from None

    def _public(self) -> str:
        return str(NATPMP.get_public_address(gateway_ip=self._ip, retry=PMP_TRIES))

    def forward(self, port: int, wanted: int) -> Forwarded:
        """See `Router.forward`."""
        try:
            reply = NATPMP.map_tcp_port(wanted, port, LEASE_S, gateway_ip=self._ip, retry=PMP_TRIES)
            return Forwarded(self._public(), reply.public_port)
        except (NATPMP.NATPMPError, OSError) as error:
            raise GatewayError(f"the gateway does not forward a port by NAT-PMP ({error})") from None

    def give_back(self, port: int, forwarded: Forwarded) -> None:
        """See `Router.give_back`."""
        try:
            NATPMP.map_tcp_port(0, port, 0, gateway_ip=self._ip, retry=PMP_TRIES)
        except (NATPMP.NATPMPError, OSError) as error:
            raise GatewayError(f"the gateway keeps the port ({error})") from None


def find_router() -> Router:
    """The first router that answers. Blocks for seconds. Raises `GatewayError` naming what was tried."""
    failures = []
    for kind in (UpnpRouter, PmpRouter):
        try:
            return kind()
        except GatewayError as error:
            failures.append(str(error))
    raise GatewayError("; ".join(failures))


class PortMapper:
    """The service of one node."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._router: Router | None = None
        self._port = 0
        self._forwarded: Forwarded | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep a port forwarded until cancelled, then give it back."""
        task_status.started()
        try:
            while True:
                wait_s = await self._renew()
                await trio.sleep(wait_s)
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + GOODBYE_S):
                await trio.to_thread.run_sync(self._give_back, abandon_on_cancel=True)

    async def _renew(self) -> float:
        """Ask for the port, again or for the first time. Returns the seconds until the next time."""
        own = self._own()
        if own is None:
            return AGAIN_S
        if own.port != self._port:
            await trio.to_thread.run_sync(self._give_back)
            self._port = own.port
        try:
            forwarded = await trio.to_thread.run_sync(self._forward)
        except GatewayError as error:
            log.info("no port is forwarded to this node: %s", error)
            self._router = None
            self._tell(None)
            return AGAIN_S
        self._tell(forwarded)
        return LEASE_S / 2

    def _own(self) -> Endpoint | None:
        """The listening address behind the router: a private IPv4 one."""
        for addr in self._node.host.bound_addrs:
            end = None if is_web(addr) else endpoint_of(addr)
            if end is not None and ":" not in end.host:
                ip = ip_address(end.host)
                if ip.is_private and not ip.is_loopback:
                    return end
        return None

    def _forward(self) -> Forwarded:
        self._router = self._router or find_router()
        wanted = self._forwarded.port if self._forwarded is not None else self._port
        return self._router.forward(self._port, wanted)

    def _give_back(self) -> None:
        forwarded, self._forwarded = self._forwarded, None
        if forwarded is not None and self._router is not None:
            try:
                self._router.give_back(self._port, forwarded)
            except GatewayError as error:
                log.info("%s", error)

    def _tell(self, forwarded: Forwarded | None) -> None:
        if forwarded == self._forwarded:
            return
        self._forwarded = forwarded
        if forwarded is None:
            self._node.reach.set_mapped([])
        elif not ip_address(forwarded.ip).is_global:
            log.info("the router forwards port %d, but is behind another one itself", forwarded.port)
            self._node.reach.set_mapped([])
        else:
            self._node.reach.set_mapped([tcp_addr(forwarded.ip, forwarded.port)])
