"""Whole daemons on simulated machines: one swarm in one process, from one seed.

Each node is `mycel.node.daemon.run` itself, over its machine's `SimNetwork`: real Noise, yamux, tickets,
calls, stages. Its engine is the inline one, whose compute time is virtual. Nothing touches the disk but the
model's files, and nothing starts a thread or a server.

    async with internet(InternetOptions(seed=1)) as net, trio.open_nursery() as nursery:
        swarm = Swarm(net, nursery, SwarmOptions(model=folder))
        founder = await swarm.found()
        ticket = founder.ticket()
        await swarm.join(ticket)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import trio

from mycel.compute.engine import Work
from mycel.compute.inline import InlineEngine
from mycel.node import daemon
from mycel.node.config import Config
from mycel.node.daemon import Papers
from mycel.node.running import Node
from mycel.node.views import TicketAsk
from mycel.protocol.identity import SigningKey
from mycel.protocol.keys import OwnKey
from mycel.protocol.membership import Credentials, found_swarm
from mycel.protocol.mesh import PeerId
from mycel.protocol.ticket import parse_ticket
from mycel.simnet.internet import Internet
from mycel.simnet.link import LinkOptions
from mycel.simnet.machine import Machine
from mycel.simnet.network import SimNetwork

LISTEN = "/ip4/0.0.0.0/tcp/4001"


@dataclass(frozen=True, slots=True)
class SwarmOptions:
    """What the nodes of a swarm have in common."""

    model: Path
    """The folder of the model that its nodes serve."""
    memory_bytes: int = 0
    """Weights that one node lends memory for; 0: no bound."""
    stages: int = 0
    """Over how many peers the model should be spread; 0: as few as hold it."""
    layer_step_s: float = 0.002
    """Virtual seconds that one layer of one step takes, whatever its rows."""
    load_s: float = 0.2
    """Virtual seconds that loading a stage takes."""
    config: Config = field(default_factory=lambda: Config(home=Path("nowhere")))
    """Everything else that a node is told."""


@dataclass(slots=True)
class SimNode:
    """One daemon and the machine that it runs on."""

    machine: Machine
    node: Node

    @property
    def name(self) -> str:
        """The machine's name, which is the node's label too."""
        return self.machine.name

    @property
    def peer(self) -> PeerId:
        """The node's peer id."""
        return self.node.host.peer_id

    @property
    def is_alive(self) -> bool:
        """Whether its program runs and can be reached."""
        return not self.machine.has_died and not self.machine.is_silent

    def ticket(self, role: str = "member") -> str:
        """A ticket to this node's swarm, as its owner would paste it. Only the founder can issue one."""
        return self.node.issue_ticket(TicketAsk(role=role)).text


class Swarm:
    """Daemons that share one root key, by machine name in order of their birth."""

    def __init__(self, net: Internet, nursery: trio.Nursery, options: SwarmOptions) -> None:
        self._net = net
        self._nursery = nursery
        self._options = options
        self.nodes: dict[str, SimNode] = {}

    @property
    def alive(self) -> Sequence[SimNode]:
        """The nodes that have neither died nor fallen silent."""
        return [node for node in self.nodes.values() if node.is_alive]

    async def found(
        self, name: str = "n0", *, serves: bool = True, layers: tuple[int, int] | None = None
    ) -> SimNode:
        """Start the node that founds the swarm, serving the model, or layers of it, unless told otherwise."""
        network = SimNetwork(self._machine(name))
        identity = OwnKey(network.entropy(32))
        root = SigningKey(network.entropy(32))
        credentials = found_swarm(identity.peer_id, root, network.wall())
        serve = self._serve(layers) if serves else ()
        return await self._start(network, Papers(identity, credentials), serves=serves, serve=serve)

    async def join(
        self,
        ticket: str,
        name: str = "",
        *,
        serves: bool = True,
        layers: tuple[int, int] | None = None,
        link: LinkOptions | None = None,
    ) -> SimNode:
        """Start a node that joins by `ticket`; it takes layers as the swarm needs unless told otherwise, or
        those named at first."""
        network = SimNetwork(self._machine(name or f"n{len(self._net.machines)}", link))
        identity = OwnKey(network.entropy(32))
        parsed = parse_ticket(ticket)
        credentials = Credentials(identity.peer_id, parsed.root, parsed.chain_for(identity.peer_id))
        papers = Papers(identity, credentials, bootstrap=parsed.bootstrap)
        serve = self._serve(layers) if layers else ()
        return await self._start(network, papers, serves=serves, serve=serve)

    def _machine(self, name: str, link: LinkOptions | None = None) -> Machine:
        """The machine of that name: one that stands already, behind a NAT say, or a new one."""
        return self._net.machines.get(name) or self._net.add(name, link=link)

    def _serve(self, layers: tuple[int, int] | None) -> tuple[str, ...]:
        model = str(self._options.model)
        return (f"{model}@{layers[0]}:{layers[1]}" if layers else model,)

    async def _start(
        self, network: SimNetwork, papers: Papers, *, serves: bool, serve: tuple[str, ...]
    ) -> SimNode:
        options = self._options
        config = replace(
            options.config,
            label=network.machine.name,
            listen=(LISTEN,),
            serve=serve,
            assign=serves,
            models=(str(options.model.parent),),
            memory_bytes=options.memory_bytes,
            stages=options.stages,
        ).validate()
        node: Node = await self._nursery.start(self._live, network, config, papers)
        self.nodes[network.machine.name] = SimNode(network.machine, node)
        return self.nodes[network.machine.name]

    async def _live(
        self, network: SimNetwork, config: Config, papers: Papers, *, task_status: trio.TaskStatus[Node]
    ) -> None:
        await network.machine.run(
            partial(daemon.run, config, network, self._engine, papers, task_status=task_status)
        )

    def _engine(self) -> InlineEngine:
        return InlineEngine(cost=self._cost, load_s=self._options.load_s)

    def _cost(self, works: Sequence[Work]) -> float:
        layers = max(work.span.end - work.span.start for work in works)
        return layers * self._options.layer_step_s
