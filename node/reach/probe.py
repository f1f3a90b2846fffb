"""Finding out what this node is to others: looks at connections, asks peers, tells the judge.

Looking costs nothing and is done whenever a peer comes or goes and every `CHECK_S`: the listening addresses,
where peers see this node, who called. Asking is done as seldom as it can be: not at all while nobody outside
is in sight, nor while somebody's call is proof enough, and one question at a time:

- a newcomer that is told of members picks one of them as its witness before it dials any, leaves that one
  alone for a moment, and has it call (`mycel.protocol.dialback`)
- where no call came, up to three echoes tell how ports are mapped, and two members knock
- what was proven is checked by a knock every `RECHECK_S`
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

import trio
from multiaddr import Multiaddr

from mycel.node.contacts import Contacts
from mycel.node.host import Host
from mycel.node.reach.dialback import DialBack
from mycel.node.reach.echo import Echo, EchoFailed
from mycel.node.reach.outward import Outward, ip_of, is_outside, place_of
from mycel.node.reach.verdict import Judge
from mycel.protocol import dialback, echo
from mycel.protocol.address import endpoint_of, tcp_addr
from mycel.protocol.dialback import Outcome
from mycel.protocol.errors import AddressError, LimitExceeded
from mycel.protocol.mesh import Access, PathKind, PeerId, PeerInfo, PeerUp

log = logging.getLogger("mycel.reach")

CHECK_S = 5.0
"""Between two looks at what this machine's addresses are."""
PAUSE_S = 0.02
"""Between two looks at least: peers come and go in crowds."""
GRACE_S = 2.0
"""How long a node that has a public address itself waits for a call before it asks others."""
RECHECK_S = 600.0
"""Between two knocks at a node that others can call, and before peers are asked again in vain."""
HOLD_S = 3.0
"""How long a witness is not dialled: it is told and dials itself within two round trips."""
KNOCKERS = 2
ECHOES = 3


class Prober:
    """The probes of one node."""

    def __init__(
        self,
        host: Host,
        network: Outward,
        judge: Judge,
        contacts: Contacts,
        *,
        forwarded: Callable[[], Sequence[Multiaddr]],
        changed: Callable[[], None],
    ) -> None:
        """`forwarded` gives addresses that may lead here besides those listened on: a forwarded port's.

        `changed` is called after each finding.
        """
        self._host = host
        self._network = network
        self._judge = judge
        self._contacts = contacts
        self._forwarded = forwarded
        self._changed = changed
        self._wake = trio.Event()
        self._nursery: trio.Nursery | None = None
        self._busy = False
        self._outside_since = math.inf
        self._proven_at = -math.inf
        self._knocks: dict[PeerId, float] = {}
        self._echoes: dict[PeerId, float] = {}
        self._port = 0
        self._bound: list[Multiaddr] = []
        self._own: list[str] = []
        self._seen_at = ""
        self.echo = Echo(host, network)
        self.dialback = DialBack(host, network)

    @property
    def is_waiting(self) -> bool:
        """Whether a call may still come that proves this node public."""
        judge = self._judge
        return not judge.is_natted and trio.current_time() < self._outside_since + GRACE_S

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Find out and keep finding out, until cancelled."""
        self.dialback.serve()
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            await nursery.start(self.echo.run)
            await nursery.start(self._hear)
            nursery.start_soon(self._watch_links)
            task_status.started()
            while True:
                self._wake = trio.Event()
                now = trio.current_time()
                self._look(now)
                if not self._busy and (probe := self._next(now)) is not None:
                    self._busy = True
                    nursery.start_soon(self._do, probe)
                self._changed()
                due = now + CHECK_S
                if now < self._outside_since + GRACE_S < due:
                    due = self._outside_since + GRACE_S
                with trio.move_on_at(due):
                    await self._wake.wait()
                await trio.sleep(PAUSE_S)

    def forwards_changed(self, gone: Sequence[Multiaddr]) -> None:
        """Other addresses may lead here than before, and `gone` do not any more: members knock again."""
        self._judge.closed(gone)
        self._knocks.clear()
        self._wake.set()

    async def _do(self, probe: Callable[[], Awaitable[None]]) -> None:
        try:
            await probe()
        finally:
            self._busy = False
            self._wake.set()

    # Looking

    async def _hear(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        started = False
        while True:
            async with self._host.events() as events:
                if not started:
                    task_status.started()
                    started = True
                try:
                    async for event in events:
                        if isinstance(event, PeerUp):
                            self._on_up(event.peer)
                        self._wake.set()
                except LimitExceeded:
                    continue  # too slow once: a call or two are missed, others will come

    async def _watch_links(self) -> None:
        """What identify brings (where peers see this node, what they serve) comes after a peer is up."""
        while True:
            await self._host.links_changed()
            self._wake.set()

    def _on_up(self, peer: PeerId) -> None:
        """Who calls from an address that this node never contacted proves that others can."""
        info = self._host.peers.get(peer)
        ip = ip_of(info.addr) if info is not None and info.inbound and info.path is PathKind.DIRECT else ""
        if self._is_outside(ip) and not self._network.has_contacted(ip):
            self._judge.called(peer, ip)
            self._proven_at = trio.current_time()
            log.info("%s called from %s, never contacted before: this node is public", peer, ip)

    def _is_outside(self, ip: str) -> bool:
        """Whether `ip` is on the internet and not in this house: neither this node's own, nor its router's.

        An IPv6 network of a house has global addresses too.
        """
        if not is_outside(ip) or ip == self._seen_at:
            return False
        return place_of(ip) not in map(place_of, self._own)

    def _look(self, now: float) -> None:
        judge = self._judge
        self._bound = list(self._host.bound_addrs)
        self._own = [ip for addr in self._bound if (ip := ip_of(addr))]
        self._seen_at = judge.ip
        moved = judge.here(self._bound)
        outside = self._outside_peers()
        observed = self._host.observed_addrs
        members = [info.peer for info in outside if info.access >= Access.MEMBER]
        voices = members or [info.peer for info in outside]
        seen = {peer: ip_of(observed[peer]) if peer in observed else "" for peer in voices}
        moved = judge.reported({peer: ip if is_outside(ip) else "" for peer, ip in seen.items()}) or moved
        if moved:
            log.info("this node's addresses changed: what was known of them is void")
            self._network.forget()
            self._knocks.clear()
            self._echoes.clear()
            self._outside_since, self._port = math.inf, 0
        if judge.is_outside:
            self._outside_since = min(self._outside_since, now)

    def _outside_peers(self) -> list[PeerInfo]:
        """Peers connected directly from or to outside this node's own network, ordered by id."""
        direct = [info for info in self._host.peers.values() if info.path is PathKind.DIRECT]
        outside = [info for info in direct if self._is_outside(ip_of(info.addr))]
        return sorted(outside, key=lambda info: info.peer)

    # Asking

    def _next(self, now: float) -> Callable[[], Awaitable[None]] | None:
        """The question to ask now, if any."""
        judge = self._judge
        if not judge.is_outside or self.is_waiting:
            return None
        members = [info for info in self._outside_peers() if info.access >= Access.MEMBER]
        servers = [one.peer for one in members if echo.PROTOCOL in one.protocols]
        due = [peer for peer in servers if now >= self._echoes.get(peer, -math.inf) + RECHECK_S]
        if due and not judge.is_proven and judge.answers < ECHOES:
            return partial(self._ask_echo, due[0])
        knocker = self._next_knocker([one.peer for one in members if dialback.PROTOCOL in one.protocols], now)
        if knocker is not None and (addrs := self._candidates()):
            return partial(self._knock, knocker, addrs)
        return None

    def _next_knocker(self, peers: Sequence[PeerId], now: float) -> PeerId | None:
        """Who is to knock now: the one who did so longest ago."""
        recent = [peer for peer, at in self._knocks.items() if now < at + RECHECK_S]
        wanted = KNOCKERS
        if self._judge.is_proven:
            wanted = 1 + self._judge.doubts if now >= self._proven_at + RECHECK_S else 0
        fresh = [peer for peer in peers if peer not in recent]
        if len(recent) >= wanted or not fresh:
            return None
        return min(fresh, key=lambda peer: (self._knocks.get(peer, -math.inf), peer))

    def _candidates(self) -> list[Multiaddr]:
        """Addresses at which others might reach this node from outside, best first."""
        ip = self._judge.ip
        bound = self._bound
        addrs = [addr for addr in [*self._forwarded(), *bound] if ip and ip_of(addr) == ip]
        if not addrs and ip and bound:
            # A port may have been forwarded without this node being told: most likely to the same number.
            addrs = [tcp_addr(ip, port) for addr in bound if (port := _port(addr))]
        return list(dict.fromkeys(addrs))[: dialback.ADDRS_MAX]

    async def _knock(self, peer: PeerId, addrs: Sequence[Multiaddr]) -> None:
        self._knocks[peer] = trio.current_time()
        info = self._host.peers.get(peer)
        outcome = await self.dialback.knock(peer, addrs)
        if outcome.tried and info is not None:
            self._note_knock(peer, ip_of(info.addr), addrs, outcome)

    def _note_knock(self, peer: PeerId, ip: str, addrs: Sequence[Multiaddr], outcome: Outcome) -> None:
        was_proven = self._judge.is_proven
        self._judge.knocked(peer, ip, addrs, outcome.addr.partition("/p2p/")[0], outcome.why)
        if self._judge.is_proven and not was_proven:
            self._proven_at = trio.current_time()

    async def _ask_echo(self, server: PeerId) -> None:
        self._echoes[server] = trio.current_time()
        info = self._host.peers.get(server)
        if info is None:
            return
        everywhere = "::" if ":" in ip_of(info.addr) else "0.0.0.0"
        try:
            try:
                listener = await self._network.listen(tcp_addr(everywhere, self._port), shared=True)
            except AddressError:
                listener = await self._network.listen(tcp_addr(everywhere, 0), shared=True)
            self._port = endpoint_of(listener.addr).port
            try:
                self._judge.echoed(server, await self.echo.ask(server, listener.addr))
            finally:
                listener.close()
        except (EchoFailed, AddressError) as error:
            self._judge.echo_failed(server, str(error))

    # The witness

    def on_told(self, teller: PeerId, members: Sequence[PeerId]) -> None:
        """`teller` named members that it is connected with; none of the new ones is dialled yet."""
        judge = self._judge
        info = self._host.peers.get(teller)
        if self._nursery is None or judge.is_proven or info is None or info.path is not PathKind.DIRECT:
            return
        addrs = [
            addr
            for addr in [*self._forwarded(), *self._bound]
            if is_outside(ip_of(addr)) and self._is_outside(ip_of(info.addr))
        ]
        if not addrs:
            return
        for contact in sorted(self._contacts.idle(), key=lambda one: self._turn(one.peer)):
            ips = [ip for addr in contact.addrs if is_outside(ip := ip_of(addr))]
            if contact.peer in members and ips and not any(map(self._network.has_contacted, ips)):
                self._contacts.hold(contact.peer, trio.current_time() + HOLD_S)
                witness = contact.peer, ips[0]
                self._nursery.start_soon(self._call_by, teller, witness, addrs[: dialback.ADDRS_MAX])
                return

    def _turn(self, peer: PeerId) -> bytes:
        """An order of peers that differs from node to node: whoever is a witness loses a proof of its own."""
        return hashlib.sha256(f"{self._host.peer_id}{peer}".encode()).digest()

    async def _call_by(self, teller: PeerId, witness: tuple[PeerId, str], addrs: Sequence[Multiaddr]) -> None:
        peer, ip = witness
        outcome = await self.dialback.call_by(teller, peer, addrs)
        if outcome.tried:
            self._note_knock(peer, ip, addrs, outcome)
        log.debug("%s was asked to call: %s", peer, outcome.addr or outcome.why)
        self._wake.set()


def _port(addr: Multiaddr) -> int:
    """The TCP port of a plain TCP address, else 0."""
    try:
        return endpoint_of(addr).port
    except AddressError:
        return 0
