"""Finding the swarm's peers on the local network without being told an address: mDNS (RFC 6762, RFC 6763).

A node states one service, `_mycel._tcp.local`: its instance name is random, its text holds the peer id and a
tag of the swarm, from which the swarm's key cannot be guessed. Nodes of other swarms are passed over. What is
heard proves nothing and is used as an address to dial only: at the other end Noise and the membership
exchange ask for proof. So that nobody on the LAN can aim this node's packets elsewhere, an address counts
only if it lies in a network of one of this machine's interfaces.

The `zeroconf` library has a thread of its own; what it hears is handed to the node's loop. This is a
service of real nodes only: a simulated network has no multicast.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_interface

import psutil
import trio
from zeroconf import (
    BadTypeInNameException,
    NonUniqueNameException,
    ServiceBrowser,
    ServiceInfo,
    ServiceStateChange,
    Zeroconf,
)

from mycel.node.running import Node
from mycel.protocol.address import Endpoint, endpoint_of, is_web, tcp_addr
from mycel.protocol.mesh import PeerId

log = logging.getLogger("mycel.node")

SERVICE = "_mycel._tcp.local."
LOOK_S = 15.0
"""How often this machine's addresses are compared with those stated."""
ASK_MS = 3000
"""How long a peer's answer to "where are you" is waited for."""
GOODBYE_S = 2.0
"""How long leaving may take."""
HEARD_MAX = 256
"""Peers of a LAN that are taken note of in one run."""

Subnet = IPv4Network | IPv6Network


def swarm_tag(swarm: str) -> str:
    """What the nodes of a swarm know each other by on the LAN: 16 hex digits."""
    return hashlib.sha256(b"mycel lan " + swarm.encode()).hexdigest()[:16]


def read_service(
    properties: Mapping[bytes, bytes | None],
    ips: Iterable[str],
    port: int,
    tag: str,
    subnets: Sequence[Subnet],
) -> tuple[PeerId, list[str]] | None:
    """Peer and addresses in a service that was heard; None where it is another swarm's or of no use."""
    peer = (properties.get(b"id") or b"").decode(errors="replace")
    if (properties.get(b"swarm") or b"").decode(errors="replace") != tag or not peer.isalnum():
        return None
    near = [ip for ip in ips if any(ip_address(ip) in subnet for subnet in subnets)]
    if not near or not 0 < port < 65536:
        return None
    return PeerId(peer), [f"{tcp_addr(ip, port)}/p2p/{peer}" for ip in near]


def own_subnets() -> list[Subnet]:
    """The networks of this machine's interfaces, loopback not among them."""
    found: dict[Subnet, None] = {}
    for entries in psutil.net_if_addrs().values():
        for entry in entries:
            if entry.netmask is None:
                continue
            try:
                network = ip_interface(f"{entry.address.partition('%')[0]}/{_bits(entry.netmask)}").network
            except ValueError:
                continue  # a hardware address
            if not network.is_loopback:
                found[network] = None
    return list(found)


def _bits(netmask: str) -> str:
    """A netmask as `ipaddress` reads it: IPv6 ones by their length."""
    return str(int(ip_address(netmask)).bit_count()) if ":" in netmask else netmask


class Lan:
    """The service of one node."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._tag = swarm_tag(node.swarm)
        self._name = f"{node.host.entropy(8).hex()}.{SERVICE}"
        self._heard: dict[PeerId, None] = {}

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """State this node and listen for others until cancelled. Where multicast is not to be had it says
        so in the log and ends."""
        task_status.started()
        ips = list(dict.fromkeys(end.host for end in self._stated()))
        try:
            zeroconf = await trio.to_thread.run_sync(partial(Zeroconf, interfaces=ips) if ips else Zeroconf)
        except OSError as error:
            log.warning("no discovery on the local network: %s", error)
            return
        token = trio.lowlevel.current_trio_token()
        try:
            ServiceBrowser(zeroconf, SERVICE, handlers=[partial(self._on_change, token)])
            await self._state(zeroconf)
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + GOODBYE_S):
                await trio.to_thread.run_sync(zeroconf.close, abandon_on_cancel=True)

    async def _state(self, zeroconf: Zeroconf) -> None:
        """Say where this node is, now and whenever that changes."""
        stated: ServiceInfo | None = None
        while True:
            info = self._info()
            if info is not None and info != stated:
                say = zeroconf.register_service if stated is None else zeroconf.update_service
                try:
                    await trio.to_thread.run_sync(say, info)
                    stated = info
                except (NonUniqueNameException, BadTypeInNameException, OSError) as error:
                    log.warning("this node is not announced on the local network: %s", error)
            await trio.sleep(LOOK_S)

    def _stated(self) -> list[Endpoint]:
        """The TCP addresses that machines next to this one can dial."""
        bound = [endpoint_of(addr) for addr in self._node.host.bound_addrs if not is_web(addr)]
        return [end for end in bound if not ip_address(end.host).is_loopback]

    def _info(self) -> ServiceInfo | None:
        stated = self._stated()
        if not stated:
            return None
        return ServiceInfo(
            SERVICE,
            self._name,
            port=stated[0].port,
            parsed_addresses=list(dict.fromkeys(end.host for end in stated if end.port == stated[0].port)),
            properties={"id": self._node.host.peer_id, "swarm": self._tag},
            server=f"{self._name.partition('.')[0]}.local.",
        )

    def _on_change(
        self,
        token: trio.lowlevel.TrioToken,
        zeroconf: Zeroconf,
        service_type: str,
        name: str,
        state_change: ServiceStateChange,
    ) -> None:
        """In the library's thread: somebody came, changed or left."""
        if state_change is ServiceStateChange.Removed or name == self._name:
            return
        info = zeroconf.get_service_info(service_type, name, ASK_MS)
        if info is None or info.port is None:
            return
        found = read_service(info.properties, info.parsed_addresses(), info.port, self._tag, own_subnets())
        if found is not None:
            try:
                token.run_sync_soon(self._on_found, *found)
            except trio.RunFinishedError:
                return  # the node has just ended

    def _on_found(self, peer: PeerId, addrs: list[str]) -> None:
        if peer == self._node.host.peer_id or (peer not in self._heard and len(self._heard) >= HEARD_MAX):
            return
        if peer not in self._heard:
            log.info("%s is on the local network at %s", peer, ", ".join(addrs))
        self._heard[peer] = None
        self._node.gather.learn(peer, addrs)
