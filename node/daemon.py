"""The daemon: one nursery tree, in reading order, over any network.

    host        connections, from the network seam up to streams
    rpc         calls over it
    board       facts that peers state
    hearsay     facts of those that are not connected
    reach       how others can call this node, and it them
    documents   what the swarm keeps
    links       stage streams
    stages      this node's layers at work for everybody
    generator   sessions that this node owns
    gather      dials contacts, learns of more
    discovery   Kademlia: who is where, small records, who provides what
    blocks      content blocks, kept and served
    catalog     models as blocks: which are here, and which there
    together    groups that compute together
    jobs        work that the swarm does to its end
    lender      stages by the owner's order
    assigner    stages by the swarm's need

`run` is the same for a real node and for thirty of them in one simulated process: it reads no environment and
no file, starts no thread and no server, and takes network, keys, memory and engines from its caller. Faces
(HTTP) are another service that the real `main` starts beside it.

A node ends by `Node.stop`: it says so on the board, lets its sessions move, and goes. A node that is killed
says nothing, and its peers find out.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec
import trio
from multiaddr import Multiaddr

from mycel.compute.infer.generate import Generator
from mycel.compute.infer.links import Links
from mycel.compute.infer.pace import Timing
from mycel.compute.infer.serve import StageServer
from mycel.compute.train.trade import Trainer
from mycel.dht.block.memory import memory_store
from mycel.dht.board import SwarmBoard
from mycel.dht.doc.store import DocumentStore, VolatileStore
from mycel.dht.hearsay import Hearsay
from mycel.node.assign import Assigner
from mycel.node.blocks import Blocks, OpenStore
from mycel.node.capacity import Capacity
from mycel.node.catalog import Catalog
from mycel.node.config import Config
from mycel.node.contacts import Contacts
from mycel.node.discovery import Discovery
from mycel.node.documents import DocumentService
from mycel.node.gather import Gather
from mycel.node.host import Host
from mycel.node.jobs.open import learners, open_jobs
from mycel.node.lapse import end_lapsed
from mycel.node.lend import EngineFactory, Lender
from mycel.node.memory import Memory, VolatileMemory
from mycel.node.providers import Providers
from mycel.node.reach.outward import Outward
from mycel.node.reach.reach import Reach
from mycel.node.running import LABEL_BYTES_MAX, LABEL_KEY, Node
from mycel.node.together import OpenLanes, Together, stream_lanes
from mycel.protocol.address import peer_of, tcp_of
from mycel.protocol.chain import Chain, encode_chain
from mycel.protocol.errors import AddressError
from mycel.protocol.keys import OwnKey
from mycel.protocol.membership import Credentials, Membership
from mycel.protocol.mesh import PeerId
from mycel.protocol.network import Network
from mycel.protocol.rpc import Rpc

log = logging.getLogger("mycel.node")

PORTS = "ports"
"""What the node remembers its listening ports under."""


@dataclass(frozen=True, slots=True)
class Papers:
    """What a node brings along: who it is, whom it belongs to, and what it remembers."""

    identity: OwnKey
    credentials: Credentials
    keep_chain: Callable[[Chain], None] = lambda chain: None
    """Keeps a newer chain that a root holder handed over."""
    memory: Memory = field(default_factory=VolatileMemory)
    bootstrap: tuple[Multiaddr, ...] = ()
    """Where to find the swarm, from the ticket."""
    documents: DocumentStore = field(default_factory=VolatileStore)
    """Where documents are kept."""
    open_store: OpenStore = memory_store
    """Opens the store of blocks."""
    open_lanes: OpenLanes = stream_lanes
    """Makes what bulk between members of a group goes over."""
    start_trainer: Callable[[], Trainer] | None = None
    """Starts what runs federated applications; None: this node takes no part in such jobs."""


async def run(
    config: Config,
    network: Network,
    engines: EngineFactory,
    papers: Papers,
    *,
    task_status: trio.TaskStatus[Node] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Be a node until `Node.stop` or cancelled; started with the node once it listens and serves.

    Raises `AddressError` when a listening address cannot be bound.
    """
    limits = config.limits()
    membership = Membership(
        papers.credentials,
        network.wall,
        limits=limits,
        on_certificate=papers.keep_chain,
        revoked=[PeerId(peer) for peer in config.revoked],
    )
    listen = await choose_ports(config.listen, network, papers.memory)
    outward = Outward(network)
    host = Host(outward, papers.identity, listen=listen, membership=membership, limits=limits)
    rpc = Rpc(host)
    documents = DocumentService(host, rpc, membership, papers.documents)
    board = SwarmBoard(host, documents.authors.may_write)
    hearsay = Hearsay(host, rpc, board, lambda: encode_chain(membership.credentials.chain))
    links = Links(host)
    stages = StageServer(links, rpc, board)
    generator = Generator(links, rpc, board, Timing(holders_s=config.layers_wait_s))
    contacts = Contacts(host.peer_id, redial_s=config.redial_s, redial_max_s=config.redial_max_s)
    _learn_bootstrap(config, papers, contacts)
    blocks = Blocks(host, papers.open_store, upload_bytes_per_s=config.upload_bytes_per_s)
    catalog = Catalog(blocks, board, host.peer_id, config.home / "models")
    lender = Lender(config, engines, stages, catalog)
    assigner = Assigner(config, lender, generator, board, host.peer_id)
    gather = Gather(host, rpc, contacts, papers.memory)
    reach = Reach(config, outward, host, contacts, gather)
    discovery = Discovery(config, host, contacts, gather, reach, papers.memory)
    discovery.hold_blocks(blocks)
    catalog.providers = Providers(host, discovery)
    node = Node(config, membership, host, rpc, board, stages, generator, contacts, gather, lender, reach,
                discovery, documents.documents, blocks, catalog)  # fmt: skip
    node.together = Together(host, rpc, papers.open_lanes)
    learn = learners(papers.start_trainer, config.data, config.trust_submitters, node.together)
    node.jobs = open_jobs(node, papers.memory, learn)
    node.capacity = Capacity(node, papers.memory)
    async with trio.open_nursery() as nursery:
        for service in (host, rpc, reach, board, hearsay, documents, links, stages, generator, gather,
                        discovery, blocks, catalog, node.together, node.jobs):  # fmt: skip
            await nursery.start(service.run)
        board.publish(LABEL_KEY, config.label.encode()[:LABEL_BYTES_MAX])
        nursery.start_soon(node.members.run)
        nursery.start_soon(end_lapsed, membership, host)
        nursery.start_soon(_lend, config, lender, assigner)
        task_status.started(node)
        await node.stopping.wait()
        await node.jobs.leave()
        await stages.leave(config.leave_s)
        node.ended.set()
        nursery.cancel_scope.cancel()


async def choose_ports(asked: Sequence[str], network: Network, memory: Memory) -> list[str]:
    """Addresses to bind: port 0 becomes last time's port where that is still free, else any free one.

    So a ticket's addresses stay good over a restart. Raises `AddressError`.
    """
    try:
        last = msgspec.json.decode(memory.get(PORTS) or b"{}", type=dict[str, int])
    except msgspec.DecodeError:
        last = {}
    ports, planned = {}, []
    for addr in asked:
        if tcp_of(addr).port:
            planned.append(addr)
            continue
        ports[addr] = await _free_port(addr, last.get(addr, 0), network)
        planned.append(_with_port(addr, ports[addr]))
    if ports and ports != last:
        memory.put(PORTS, msgspec.json.encode(ports))
    return planned


async def _free_port(addr: str, last: int, network: Network) -> int:
    for port in (last, 0) if last else (0,):
        try:
            listener = await network.listen(Multiaddr(_with_port(addr, port)))
        except AddressError:
            if port == 0:
                raise
            continue
        listener.close()
        return tcp_of(listener.addr).port
    raise AssertionError("unreachable: port 0 returns or raises")


def _with_port(addr: str, port: int) -> str:
    """`addr`, whose port is 0, with `port`; what is spoken above TCP stays."""
    return re.sub(r"/tcp/0(?=/|$)", f"/tcp/{port}", addr)


def _learn_bootstrap(config: Config, papers: Papers, contacts: Contacts) -> None:
    """The ticket's and the config's addresses, each peer's together."""
    addrs: dict[PeerId, list[str]] = {}
    for addr in [*(str(addr) for addr in papers.bootstrap), *config.bootstrap]:
        peer = peer_of(addr)
        if peer is not None:
            addrs.setdefault(peer, []).append(addr)
    for peer, known in addrs.items():
        contacts.learn(peer, known, trio.current_time(), lasting=True)


async def _lend(config: Config, lender: Lender, assigner: Assigner) -> None:
    """What the config names, then what the swarm needs."""
    async with trio.open_nursery() as nursery:
        await nursery.start(lender.serve_configured)
        if config.assign:
            nursery.start_soon(assigner.run)
