"""A running node as its faces see it: what it can be asked and told, over the services of the daemon."""

from __future__ import annotations

import os
from collections import deque
from dataclasses import dataclass, field

import trio

import mycel
from mycel.compute.engine import Span
from mycel.compute.infer.generate import Generator
from mycel.compute.infer.request import ModelStatus, Report
from mycel.compute.infer.serve import StageServer
from mycel.dht.board import SwarmBoard
from mycel.dht.doc.sync import Documents
from mycel.node.blocks import Blocks
from mycel.node.capacity import Capacity
from mycel.node.catalog import Catalog, Progress
from mycel.node.config import Config
from mycel.node.contacts import Contacts
from mycel.node.discovery import Discovery
from mycel.node.gather import Gather
from mycel.node.host import Host
from mycel.node.jobs.service import Jobs
from mycel.node.lend import Lender
from mycel.node.members import Members
from mycel.node.reach.reach import Reach
from mycel.node.together import Together
from mycel.node.views import (
    HolderView,
    ModelView,
    PeerView,
    StageView,
    StatusView,
    TicketAsk,
    TicketView,
    TroubleView,
)
from mycel.protocol.chain import swarm_id
from mycel.protocol.errors import MycelError
from mycel.protocol.membership import Membership
from mycel.protocol.mesh import Access, PeerInfo
from mycel.protocol.rpc import Rpc
from mycel.protocol.ticket import TicketError, issue_ticket

REPORTS_MAX = 64
"""Reports of past generations that are kept."""
LABEL_KEY = "label"
"""The board key under which a node states what it calls itself."""
LABEL_BYTES_MAX = 64
ROLES = {"submit": Access.SUBMIT, "member": Access.MEMBER, "admin": Access.ADMIN}


class NotFounder(MycelError):
    """Only the node that founded the swarm holds its root key and can issue tickets."""


@dataclass(slots=True)
class Tally:
    """Totals over the generations that this node owned."""

    generations: int = 0
    tokens: int = 0
    failovers: int = 0


@dataclass(slots=True)
class Node:
    """The daemon's services, together. Made by `mycel.node.daemon.run`."""

    config: Config
    membership: Membership
    host: Host
    rpc: Rpc
    board: SwarmBoard
    stages: StageServer
    generator: Generator
    contacts: Contacts
    gather: Gather
    lender: Lender
    reach: Reach
    discovery: Discovery
    documents: Documents
    blocks: Blocks
    catalog: Catalog
    began: float = field(default_factory=trio.current_time)
    api: str = ""
    """Base URL of the HTTP API once it listens."""
    stopping: trio.Event = field(default_factory=trio.Event)
    """Set once the node is to leave."""
    ended: trio.Event = field(default_factory=trio.Event)
    """Set once its sessions moved, or had their time to."""
    tally: Tally = field(default_factory=Tally)
    members: Members = field(init=False)
    """What nodes write of themselves, and what is known of members that are away."""
    together: Together = field(init=False)
    jobs: Jobs = field(init=False)
    """Set by the daemon before anything runs."""
    capacity: Capacity = field(init=False)
    """What this machine and others were measured to do; likewise."""
    _reports: deque[Report] = field(default_factory=lambda: deque(maxlen=REPORTS_MAX))

    def __post_init__(self) -> None:
        self.members = Members(self)

    def stop(self) -> None:
        """Leave the swarm in order, then end: sessions move to others, for at most `config.leave_s`."""
        self.stopping.set()

    async def serve(
        self, model: str, layers: tuple[int, int] | None, note: Progress | None = None
    ) -> StageView:
        """Lend layers [i:j) of `model`, or those the swarm needs. Raises as `Lender.serve`."""
        return (await self.lender.serve(model, Span(*layers) if layers else None, note)).view()

    def issue_ticket(self, ask: TicketAsk) -> TicketView:
        """A fresh ticket with this node's addresses in it. Raises `NotFounder`, `TicketError`."""
        root = self.membership.credentials.signer
        if root is None:
            raise NotFounder(
                f"this node joined swarm {self.swarm} by ticket and cannot issue any: "
                "run `mycel ticket` where the swarm was founded (the node with swarm.key in its home)"
            )
        if ask.role not in ROLES:
            raise TicketError(f"a ticket gives one of the roles {', '.join(ROLES)}, not {ask.role!r}")
        now = self.host.wall()
        ticket = issue_ticket(
            root,
            access=ROLES[ask.role],
            now=now,
            entropy=self.host.entropy,
            life_s=ask.life_s,
            label=ask.label,
        ).with_bootstrap(self.gather.own_addrs())
        return TicketView(
            text=ticket.text(),
            swarm=self.swarm,
            access=ask.role,
            label=ask.label,
            expires=ticket.certificate.not_after,
            bootstrap=tuple(str(addr) for addr in ticket.bootstrap),
        )

    @property
    def swarm(self) -> str:
        """The swarm's name: its root public key in base58."""
        return swarm_id(self.membership.credentials.root)

    def fresh_seed(self) -> int:
        """A random sampling seed."""
        return int.from_bytes(self.host.entropy(6), "big")

    def note_report(self, report: Report) -> None:
        """Keep how a generation went, for `reports` and metrics."""
        self._reports.append(report)
        self.tally.generations += 1
        self.tally.tokens += report.tokens
        self.tally.failovers += len(report.failovers)

    def reports(self) -> list[Report]:
        """The last generations of this node, oldest first."""
        return list(self._reports)

    def status(self) -> StatusView:
        """This node."""
        credentials = self.membership.credentials
        infos = self.host.peers.values()
        return StatusView(
            peer=self.host.peer_id,
            label=self.config.label,
            swarm=self.swarm,
            access=self.membership.own_grant().access.name.lower(),
            founder=credentials.signer is not None,
            version=mycel.__version__,
            pid=os.getpid(),
            home=str(self.config.home),
            up_s=trio.current_time() - self.began,
            listen=tuple(str(addr) for addr in self.gather.own_addrs()),
            reach=self.reach.view(self.label_of),
            api=self.api,
            peers=sum(info.access > Access.STRANGER for info in infos),
            strangers=sum(info.access == Access.STRANGER for info in infos),
            stages=tuple(self.lender.views()),
            models=tuple(status.card.name for status in self.generator.models() if status.complete),
            trouble=tuple(TroubleView(one.peer, one.addrs, one.trouble) for one in self.contacts.troubled()),
            capacity=self.capacity.view_of(self.host.peer_id),
        )

    def peers(self) -> list[PeerView]:
        """Connected peers, ordered by id."""
        return [self._peer_view(self.host.peers[peer]) for peer in sorted(self.host.peers)]

    def models(self) -> list[ModelView]:
        """Models known in the swarm, ordered by name."""
        return [self._model_view(status) for status in self.generator.models()]

    def label_of(self, peer: str) -> str:
        """What a peer calls itself; its id's end where it says nothing."""
        if peer == self.host.peer_id:
            return self.config.label or "this node"
        for fact in self.board.facts(LABEL_KEY):
            if fact.author == peer and fact.key == LABEL_KEY and fact.value:
                text = fact.value[:LABEL_BYTES_MAX].decode("utf-8", "replace")
                return "".join(char if char.isprintable() else "?" for char in text)
        return f"…{peer[-6:]}"

    def labels_in(self, report: Report) -> dict[str, str]:
        """Labels of all peers that a report names."""
        routes = [report.route, *(failover.route for failover in report.failovers)]
        peers = {stage.peer for route in routes for stage in route}
        peers.update(peer for failover in report.failovers for peer in failover.lost)
        return {peer: self.label_of(peer) for peer in sorted(peers)}

    def _peer_view(self, info: PeerInfo) -> PeerView:
        rtt = self.host.rtt(info.peer)
        return PeerView(
            peer=info.peer,
            label=self.label_of(info.peer),
            access=info.access.name.lower(),
            addr=str(info.addr),
            path=info.path.value,
            agent=info.agent,
            inbound=info.inbound,
            rtt_ms=None if rtt is None else round(rtt * 1000, 3),
            connected_s=trio.current_time() - info.since,
            serves=tuple(
                f"{status.card.name}@{holder.span.start}:{holder.span.end}"
                for status in self.generator.models()
                for holder in status.holders
                if holder.peer == info.peer
            ),
            capacity=self.capacity.view_of(info.peer),
        )

    def _model_view(self, status: ModelStatus) -> ModelView:
        card = status.card
        return ModelView(
            name=card.name,
            fingerprint=card.fingerprint,
            architecture=card.architecture,
            layers=card.n_layers,
            positions=card.max_positions,
            complete=status.complete,
            missing=tuple((span.start, span.end) for span in status.missing),
            holders=tuple(
                HolderView(one.peer, self.label_of(one.peer), one.span.start, one.span.end, one.state)
                for one in status.holders
            ),
        )
