"""Reach: that every peer can call this node, and this node every peer, whatever stands between.

`Reach` composes what `mycel.node.reach` holds; the daemon knows nothing else of it:

    prober      finds out what this node is to others: echo, dial-back, who calls (verdict judges)
    relay       circuits for others, where this node is public and its owner lets it
    circuits    circuits of this node's own: dialled, taken, and the reservations that make it callable
    upgrade     from a relayed connection to a direct one

What they find out ends in three decisions, made in `_settle` and nowhere else: which addresses are told to
others, how many relays are wanted, and what this node does for others.

- A public node wants no relays, answers echoes, and relays where `relay = auto`.
- Where nobody outside is in sight (a swarm in one house) there is nothing to ask, and no relay is wanted but
  those that the config names.
- Any other node keeps two relays. One that has a public address itself waits a moment before, for a call.

A node that listens on loopback only (preset local) sends no probe and opens no port.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from ipaddress import ip_address

import trio
from multiaddr import Multiaddr

from mycel.node.addresses import shares_network
from mycel.node.config import Config
from mycel.node.contacts import ADDRS_MAX, Contacts
from mycel.node.gather import Gather, leads_to
from mycel.node.host import Host
from mycel.node.reach.outward import Outward, ip_of, is_outside
from mycel.node.reach.probe import Prober
from mycel.node.reach.relay_client import RelayClient
from mycel.node.reach.relay_server import RelayServer
from mycel.node.reach.upgrade import Upgrader
from mycel.node.reach.verdict import MEANINGS, Judge, Kind
from mycel.node.views import IndirectView, ReachView
from mycel.protocol import echo
from mycel.protocol.address import CIRCUIT, circuit_of
from mycel.protocol.mesh import Access, PeerId

RELAYS = 2
"""Reservations of a node that others cannot call: one relay may die."""
CIRCUITS_TOLD = 4
"""Relayed addresses told to others at most: two relays with an IPv4 and an IPv6 address each."""


class Reach:
    """The service of one node. Any part may call `changed` when what it found out changed."""

    def __init__(
        self, config: Config, network: Outward, host: Host, contacts: Contacts, gather: Gather
    ) -> None:
        self._config = config
        self._network = network
        self._host = host
        self._contacts = contacts
        self._gather = gather
        self._wake = trio.Event()
        self._bound: list[Multiaddr] = []
        self._here: tuple[object, ...] = ()
        self._mapped: list[Multiaddr] = []
        self._judge = Judge()
        self.verdict = self._judge.verdict()
        """What this node is to others, as last judged."""
        self.is_local = False
        """Whether only this machine can reach this node anyway."""
        self.on_settled: Callable[[], None] = lambda: None
        """Hears that it was decided anew; the verdict may be another one."""
        self.prober = Prober(
            host, network, self._judge, contacts, forwarded=self.forwarded, changed=self.changed
        )
        self.relay = RelayServer(host, config.relay_limits())
        self.circuits = RelayClient(host, config.relay_limits(), relays=config.relays, on_change=self.changed)
        self.upgrade = Upgrader(host, network, self.prober.echo, public=lambda: self.verdict.addrs)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled; started once others can be told where this node is. Sends nothing before."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self.relay.run)
            await nursery.start(self.circuits.run)
            await nursery.start(self.upgrade.run)
            ips = [ip_of(addr) for addr in self._host.bound_addrs]
            self.is_local = bool(ips) and all(ip and ip_address(ip).is_loopback for ip in ips)
            self._judge.here(self._host.bound_addrs)
            if not self.is_local:
                await nursery.start(self.prober.run)
                self._gather.on_told = self.prober.on_told
            self._gather.can_lead = self.can_lead
            nursery.start_soon(self._follow)
            self._settle()
            task_status.started()
            while True:
                await self._wake.wait()
                self._wake = trio.Event()
                self._settle()

    def changed(self) -> None:
        """Something was found out: decide again. Never blocks."""
        self._wake.set()

    async def _follow(self) -> None:
        """Where connected peers listen is what they say last: relays come and go."""
        stated: dict[PeerId, tuple[Multiaddr, ...]] = {}
        while True:
            await self._host.links_changed()
            for peer, info in self._host.peers.items():
                if stated.get(peer) is not info.listen_addrs and info.access >= Access.SUBMIT:
                    own = f"/p2p/{peer}"
                    addrs = [str(addr).removesuffix(own) + own for addr in info.listen_addrs]
                    self._contacts.state(peer, [addr for addr in addrs if leads_to(addr, peer)])
            stated = {peer: info.listen_addrs for peer, info in self._host.peers.items()}

    # Deciding

    def can_lead(self, addr: str) -> bool:
        """Whether `addr`, told by others, may lead to them from here.

        A private address means something in its own network only; elsewhere it is somebody else's. While
        nobody outside is in sight this node's whole world is one private network, whatever its parts.
        """
        ip = ip_of(addr.partition(f"/{CIRCUIT}")[0])
        if not ip or is_outside(ip) or not self._judge.is_outside:
            return True
        return shares_network(ip, [own for addr in self._bound if (own := ip_of(addr))])

    def _settle(self) -> None:
        """What follows from what is known."""
        self._bound = list(self._host.bound_addrs)
        verdict = self.verdict = self._judge.verdict()
        is_public = verdict.kind is Kind.PUBLIC
        self.relay.serve(self._config.relay == "on" or (self._config.relay == "auto" and is_public))
        if is_public and any(is_outside(ip_of(addr)) for addr in self._bound):
            self.prober.echo.serve()
        else:
            self.prober.echo.stop()
        self.circuits.want(self._relays_wanted())
        self._host.announce(self._told())
        here = (self._judge.epoch, *self._bound)
        if here != self._here:
            self._here = here
            self.upgrade.network_changed()
        self.on_settled()

    def _relays_wanted(self) -> int:
        if self.is_local or self.verdict.kind is Kind.PUBLIC:
            return 0
        if self.verdict.kind is Kind.LOCAL:
            return RELAYS if self._config.relays else 0
        return 0 if self._bound and self.prober.is_waiting else RELAYS

    def forwarded(self) -> list[Multiaddr]:
        """Addresses that lead here though nothing here listens on them: what the owner announces, and what
        the router promises."""
        own = f"/p2p/{self._host.peer_id}"
        return [*(Multiaddr(addr.removesuffix(own)) for addr in self._config.announce), *self._mapped]

    def set_mapped(self, addrs: Sequence[Multiaddr]) -> None:
        """The router promises that calls to `addrs` arrive here; it remains to be seen."""
        gone = [addr for addr in self._mapped if addr not in addrs]
        self._mapped = list(addrs)
        self.prober.forwards_changed(gone)
        self.changed()

    def _told(self) -> Sequence[Multiaddr]:
        """The addresses to tell others, best first, without this node's id."""
        own = list(self.forwarded())
        if not self._config.announce:
            own = list(dict.fromkeys([*own, *self._judge.public_addrs(), *self._bound]))
        circuits = choose_circuits(self.circuits.addrs)
        return [*own[: ADDRS_MAX - len(circuits)], *circuits]

    # Showing

    def view(self, name: Callable[[str], str]) -> ReachView:
        """For faces; `name` turns a peer id into what people call that peer."""
        verdict, circuits = self.verdict, self.circuits
        troubles = circuits.troubles.items() if self._relays_wanted() > len(circuits.relays) else ()
        return ReachView(
            verdict=verdict.kind.value,
            meaning=MEANINGS[verdict.kind],
            evidence=tuple(_PEER_ID.sub(lambda found: name(found[0]), line) for line in verdict.evidence),
            ip=verdict.ip,
            addrs=tuple(map(str, verdict.addrs)),
            relays=tuple(name(peer) for peer in circuits.relays),
            relay_trouble=tuple(f"{name(peer)}: {why}" for peer, why in troubles),
            relaying=self.relay.is_serving,
            reservations=self.relay.reservations,
            circuits=self.relay.circuits,
            forwarded_bytes=self.relay.forwarded,
            echoing=echo.PROTOCOL in self._host.protocols,
            indirect=tuple(
                IndirectView(peer, name(peer), _PEER_ID.sub(lambda found: name(found[0]), why))
                for peer, why in self.upgrade.troubles.items()
            ),
        )


def choose_circuits(addrs: Sequence[Multiaddr]) -> list[Multiaddr]:
    """Of relayed addresses those worth telling: two of each relay, and none in a private network of the
    relay's where it has others."""
    ways: dict[PeerId, list[Multiaddr]] = {}
    for addr in addrs:
        ways.setdefault(circuit_of(addr).relay_peer, []).append(addr)
    chosen: list[Multiaddr] = []
    for found in ways.values():
        ips = {addr: ip_of(circuit_of(addr).relay) for addr in found}
        far = [addr for addr in found if not ips[addr] or is_outside(ips[addr])]
        chosen += (far or found)[: CIRCUITS_TOLD // RELAYS]
    return chosen[:CIRCUITS_TOLD]


_PEER_ID = re.compile(r"\b(?:12D3KooW|Qm)[1-9A-HJ-NP-Za-km-z]{20,60}\b")
