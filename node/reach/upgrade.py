"""From relayed to direct connections, and back when they die: the plan of `upgrade_plan`, carried out.

Whenever a connection comes or goes this looks at all of them. A member (or submitter) that is connected over
a relay is punched by our own protocol, a foreign libp2p peer that called through one by DCUtR. When it works
the direct connection wins (`mycel.node.peering`) and the relayed one is drained: streams on it see
`ConnectionLost` with the reason "superseded" and are opened anew by those who keep them, such as the links
between stages.

When the last connection to a peer that is known behind relays dies, be it direct or relayed, the peer is
dialled over its relays at once.
"""

from __future__ import annotations

import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

import trio
from multiaddr import Multiaddr

from mycel.node.host import Host
from mycel.node.reach.dcutr import Dcutr
from mycel.node.reach.echo import Echo
from mycel.node.reach.outward import ip_of
from mycel.node.reach.punch import Puncher
from mycel.node.reach.upgrade_plan import Punch, Return, UpgradePlan
from mycel.protocol import dcutr
from mycel.protocol.address import circuit_of, is_circuit
from mycel.protocol.errors import AddressError, LimitExceeded, MycelError, Refused
from mycel.protocol.limits_reach import DEFAULT_PUNCH_LIMITS, PunchLimits
from mycel.protocol.mesh import Access, PathKind, PeerDown, PeerId, PeerInfo
from mycel.protocol.network import Network
from mycel.protocol.punch import PunchFailed

log = logging.getLogger("mycel.reach")

GOODBYES = ("left", "refused")
"""Why a connection ended when its peer is not to be dialled at once."""

SEEN_MAX = 1024
"""Foreign peers whose addresses are remembered."""
SEEN_IPS_MAX = 4


class Upgrader:
    """The service of one node."""

    def __init__(
        self,
        host: Host,
        network: Network,
        echo: Echo,
        *,
        public: Callable[[], Sequence[Multiaddr]] = tuple,
        limits: PunchLimits = DEFAULT_PUNCH_LIMITS,
    ) -> None:
        """`public` gives the addresses at which this node believes everybody can reach it."""
        self._host = host
        self._plan = UpgradePlan(limits)
        self._wake = trio.Event()
        self._seen: OrderedDict[PeerId, dict[str, None]] = OrderedDict()
        self.puncher = Puncher(host, network, echo, public=public, limits=limits)
        self.puncher.on_answered = self._on_answered
        self.dcutr = Dcutr(host, network, self.puncher.locator, self._may_dial, limits)
        self.upgraded = 0
        """Relayed connections that became direct since the start."""
        self.failed = 0
        """Punches that did not work."""

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch)
            nursery.start_soon(self._hear)
            task_status.started()
            while True:
                self._wake = trio.Event()
                now = trio.current_time()
                self._look(now)
                for step in self._plan.plan(now):
                    if isinstance(step, Punch):
                        nursery.start_soon(self._punch, step)
                    else:
                        nursery.start_soon(self._return, step)
                due = self._plan.next_s()
                with trio.move_on_at(due) if math.isfinite(due) else trio.CancelScope():
                    await self._wake.wait()

    def network_changed(self) -> None:
        """This node's addresses or NAT are others than before: what failed is tried again."""
        self._plan.on_network_changed(trio.current_time())
        self._wake.set()

    @property
    def troubles(self) -> Mapping[PeerId, str]:
        """Peers that are reached over a relay for want of better, and why there is no direct connection."""
        found = [one for one in self._plan.standings() if one.path is PathKind.RELAYED]
        return {one.peer: one.trouble or "not tried yet" for one in found}

    async def _watch(self) -> None:
        while True:
            await self._host.links_changed()
            self._wake.set()

    async def _hear(self) -> None:
        """Goodbyes. They come in the same turn as `links_changed`, so before the loop looks."""
        while True:
            async with self._host.events() as events:
                with suppress(LimitExceeded):  # too slow once: what was missed is dialled in vain
                    async for event in events:
                        if isinstance(event, PeerDown) and event.reason in GOODBYES:
                            self._plan.on_goodbye(event.peer)

    def _look(self, now: float) -> None:
        """Tell the plan what connections there are."""
        for peer, info in self._host.peers.items():
            if info.access >= Access.SUBMIT:
                # A submitter may not ask, and of two members the one with the smaller id does.
                leads = info.access < Access.MEMBER or self._host.peer_id < peer
                self._plan.on_path(peer, info.path, circuits_of(info), now, leads=leads)
            elif info.path is PathKind.DIRECT:
                self._remember(peer, ip_of(info.addr))
                self._plan.on_path(peer, info.path, (), now, leads=False)
            elif info.inbound and dcutr.PROTOCOL in info.protocols:
                self._plan.on_path(peer, info.path, (), now, leads=True)
        self._plan.on_present(self._host.peers, now)

    def _remember(self, peer: PeerId, ip: str) -> None:
        """Where a foreign peer was seen."""
        ips = self._seen.setdefault(peer, {})
        self._seen.move_to_end(peer)
        if len(ips) < SEEN_IPS_MAX:
            ips[ip] = None
        if len(self._seen) > SEEN_MAX:
            self._seen.popitem(last=False)

    def _may_dial(self, peer: PeerId, addr: Multiaddr) -> bool:
        """A foreign peer's word is good for addresses where this node saw it itself."""
        return ip_of(addr) in self._seen.get(peer, {})

    async def _punch(self, step: Punch) -> None:
        began = trio.current_time()
        info = self._host.peers.get(step.peer)
        foreign = info is not None and info.access < Access.SUBMIT
        try:
            await (self.dcutr.lead(step.peer) if foreign else self.puncher.punch(step.peer))
        except PunchFailed as error:
            self.failed += error.reason != "busy"
            log.info("no direct connection to %s: %s", step.peer, error)
            self._plan.on_failed(step.peer, error.reason, str(error), trio.current_time(), self._spread())
        else:
            self.upgraded += 1
            log.info("%s is connected directly after %.2f s", step.peer, trio.current_time() - began)
            self._plan.on_punched(step.peer, trio.current_time())
        self._wake.set()

    def _on_answered(self, peer: PeerId, failure: PunchFailed) -> None:
        now = trio.current_time()
        self._plan.on_answered(peer, failure.reason, str(failure), now, self._spread())
        self._wake.set()

    def _spread(self) -> float:
        """A random number in [0, 1)."""
        return int.from_bytes(self._host.entropy(2), "big") / 65536

    async def _return(self, step: Return) -> None:
        try:
            await self._host.connect(step.circuits)
        except MycelError as error:
            log.info("no way back to %s over a relay: %s", step.peer, error)
            refused = isinstance(error, Refused)
            self._plan.on_not_returned(step.peer, trio.current_time(), refused=refused)
        else:
            log.info("%s is connected over a relay again", step.peer)
            self._plan.on_returned(step.peer)
        self._wake.set()


def circuits_of(info: PeerInfo) -> list[str]:
    """Where a peer is reached over relays: the connection's own address first, then those that it told."""
    found = []
    for addr in (info.addr, *info.listen_addrs):
        if not is_circuit(addr):
            continue
        try:
            peer = circuit_of(addr).peer
        except AddressError:
            continue  # a way through two relays
        if peer is None and addr != info.addr:
            found.append(f"{addr}/p2p/{info.peer}")
        elif peer == info.peer:
            found.append(str(addr))
    return found
