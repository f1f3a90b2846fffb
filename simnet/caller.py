"""A node that does nothing but call and be called: host, calls and reach, as the daemon composes them.

It has no engine, board or gatherer: it knows whom it is told of. What is left is what getting through depends
on, the same code as in `mycel.node.daemon`, on a simulated machine.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import trio

from mycel.node.config import PRESETS, Config
from mycel.node.contacts import Contacts
from mycel.node.gather import Gather
from mycel.node.host import Host
from mycel.node.memory import VolatileMemory
from mycel.node.reach.outward import Outward
from mycel.node.reach.reach import Reach
from mycel.protocol.address import is_circuit
from mycel.protocol.identity import SigningKey
from mycel.protocol.keys import OwnKey
from mycel.protocol.membership import Credentials, Membership, found_swarm
from mycel.protocol.mesh import Access, PathKind, PeerId
from mycel.protocol.method import Call, Method
from mycel.protocol.rpc import Rpc
from mycel.protocol.ticket import issue_ticket, parse_ticket
from mycel.simnet.machine import Machine
from mycel.simnet.network import SimNetwork

LISTEN = "/ip4/0.0.0.0/tcp/4001"
CALL_S = 10.0
ECHO = Method("sim.echo", bytes, bytes)
ASKED_BYTES = 128

CONFIG = replace(Config(home=Path("nowhere"), **PRESETS["wan"]), preset="wan", listen=(LISTEN,))


class Caller:
    """One node. `found` or `join` starts it."""

    def __init__(self, machine: Machine, nursery: trio.Nursery, config: Config = CONFIG) -> None:
        self.machine = machine
        self._nursery = nursery
        self._config = config
        self._network = SimNetwork(machine)
        self._identity = OwnKey(self._network.entropy(32))
        self.peer_id = self._identity.peer_id

    async def found(self) -> str:
        """Found a swarm; returns a ticket to it that names this node."""
        root = SigningKey(self._network.entropy(32))
        now = self._network.wall()
        await self._start(found_swarm(self.peer_id, root, now))
        ticket = issue_ticket(root, access=Access.MEMBER, now=now, entropy=self._network.entropy)
        return ticket.with_bootstrap(self.host.listen_addrs).text()

    async def join(self, ticket: str) -> None:
        """Join the swarm and be connected with whom the ticket names. Raises what `Host.connect` does."""
        parsed = parse_ticket(ticket)
        await self._start(Credentials(self.peer_id, parsed.root, parsed.chain_for(self.peer_id)))
        await self.host.connect(list(parsed.bootstrap))

    @property
    def told(self) -> list[str]:
        """Where this node tells others to dial it."""
        return [str(addr) for addr in self.host.listen_addrs]

    @property
    def is_callable(self) -> bool:
        """Whether it tells an address that leads through a relay."""
        return any(is_circuit(addr) for addr in self.told)

    def path(self, peer: PeerId) -> PathKind | None:
        """How this node is connected with `peer`, None where it is not."""
        info = self.host.peers.get(peer)
        return None if info is None else info.path

    async def call(self, peer: PeerId) -> bool:
        """Whether a call to `peer` brought back what was sent. Raises `MycelError`."""
        asked = self._network.entropy(ASKED_BYTES)
        return await self.rpc.call(peer, ECHO, asked, deadline_s=CALL_S) == asked

    async def _start(self, credentials: Credentials) -> None:
        await self._nursery.start(self._live, credentials)

    async def _live(self, credentials: Credentials, *, task_status: trio.TaskStatus[None]) -> None:
        await self.machine.run(partial(self._run, credentials, task_status))

    async def _run(self, credentials: Credentials, task_status: trio.TaskStatus[None]) -> None:
        config, limits = self._config, self._config.limits()
        membership = Membership(credentials, self._network.wall, limits=limits)
        outward = Outward(self._network)
        self.host = Host(
            outward, self._identity, listen=list(config.listen), membership=membership, limits=limits
        )
        self.rpc = Rpc(self.host)
        self.rpc.serve(ECHO, _echo, inline=True)
        contacts = Contacts(self.peer_id, redial_s=config.redial_s, redial_max_s=config.redial_max_s)
        gather = Gather(self.host, self.rpc, contacts, VolatileMemory())
        self.reach = Reach(config, outward, self.host, contacts, gather)
        async with trio.open_nursery() as nursery:
            for service in (self.host.run, self.rpc.run, self.reach.run):
                await nursery.start(service)
            task_status.started()


def _echo(call: Call, request: bytes) -> bytes:
    return request
