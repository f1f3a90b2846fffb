"""Reach: that every peer can call this node, and this node every peer, whatever stands between.

`Reach` composes what `mycel.node.reach` holds; the daemon knows nothing else of it:

    outward     whom this node spoke to first (every dial goes through it)
    echo        as which address others see a port of this node
    relay       circuits for others, where this node is public and its owner lets it
    circuits    circuits of this node's own: dialled, taken, and the reservations that make it callable
    upgrade     from a relayed connection to a direct one
    lan         members on the same wire, found by multicast; the router's port mapping

What all of them find out ends in three decisions, made in `_settle` and nowhere else: which addresses are
told to others, how many relays are wanted, and whether this node relays for others.

A node that listens on loopback only (preset local) has nothing to find out: it sends no probe, opens no port.
"""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import ip_address

import trio
from multiaddr import Multiaddr

from mycel.node.config import Config
from mycel.node.contacts import Contacts
from mycel.node.host import Host
from mycel.node.reach.echo import Echo
from mycel.node.reach.outward import Outward, ip_of
from mycel.node.reach.upgrade import Upgrader
from mycel.protocol.rpc import Rpc


class Reach:
    """The service of one node. `changed()` may be called by any part when what it found out changed."""

    def __init__(self, config: Config, network: Outward, host: Host, rpc: Rpc, contacts: Contacts) -> None:
        self._config = config
        self._network = network
        self._host = host
        self._rpc = rpc
        self._contacts = contacts
        self._wake = trio.Event()
        self.echo = Echo(host, network)
        # R1: self.relay = RelayServer(host, ...); self.circuits = RelayClient(host, ...);
        #     its Reservations call self.changed whenever .addrs changed.
        self.upgrade = Upgrader(host, network, self.echo, public=self.public)
        # R6: self.lan = Lan(...), self.port_mapper = PortMapper(..., on_change=self.changed)

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach this node anyway."""
        bound = self._host.bound_addrs
        return bool(bound) and all(ip_address(ip_of(addr)).is_loopback for addr in bound)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled; started once addresses are told to others. Sends nothing before."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self.echo.run)
            # R1: await nursery.start(self.relay.run); await nursery.start(self.circuits.run)
            if not self.is_local:
                await nursery.start(self.upgrade.run)
            # R6: if not self.is_local: nursery.start_soon(self.lan.run), ...(self.port_mapper.run)
            self._settle()
            task_status.started()
            while True:
                await self._wake.wait()
                self._wake = trio.Event()
                self._settle()

    def changed(self) -> None:
        """Something was found out: decide again. Never blocks."""
        self._wake.set()

    def public(self) -> Sequence[Multiaddr]:
        """Where everybody can dial this node, as far as is known; peers behind a relay use it first."""
        return []
        # R2: the bound addresses where the verdict is public; R6: + self.port_mapper.addrs

    def _settle(self) -> None:
        """What follows from what is known: addresses told, relays wanted, relaying for others."""
        self._host.announce(self.told())
        # R1: self.circuits.reservations.want(0 if public or is_local else 2)
        #     self.relay.is_serving = public and config.relay allows

    def told(self) -> Sequence[Multiaddr]:
        """The addresses to tell others, best first, without this node's id; empty where the bound ones do."""
        own = f"/p2p/{self._host.peer_id}"
        return [Multiaddr(addr.removesuffix(own)) for addr in self._config.announce]
        # R1: + self.circuits.reservations.addrs;  R6: + self.port_mapper.addrs
