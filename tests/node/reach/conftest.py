"""A small world of hosts on the internet in memory, in virtual time, and whom each of them dialled."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from multiaddr import Multiaddr

from mycel.compute.inline import InlineEngine
from mycel.node import daemon
from mycel.node.config import Config
from mycel.node.daemon import Papers
from mycel.node.host import Host
from mycel.node.memory import Memory
from mycel.node.reach.outward import Outward
from mycel.node.reach.relay_client import RelayClient
from mycel.node.reach.relay_server import RelayServer
from mycel.node.running import Node
from mycel.node.views import TicketAsk
from mycel.protocol.identity import SigningKey
from mycel.protocol.keys import OwnKey
from mycel.protocol.limits_reach import DEFAULT_RELAY_LIMITS, RelayLimits
from mycel.protocol.membership import Credentials, found_swarm
from mycel.protocol.mesh import Access, PeerId, Stream
from mycel.protocol.network import Pipe
from mycel.protocol.ticket import parse_ticket
from mycel.simnet import clock
from mycel.simnet.internet import Internet, InternetOptions, internet
from mycel.simnet.link import LinkOptions
from mycel.simnet.machine import Machine
from mycel.simnet.network import SimNetwork

LISTEN = "/ip4/0.0.0.0/tcp/4001"


class World:
    """Hosts by name; each has its machine in `net.machines` and its network in `networks`."""

    def __init__(self, net: Internet, nursery: trio.Nursery) -> None:
        self.net = net
        self.nursery = nursery
        self.networks: dict[str, Outward] = {}

    async def host(self, name: str, *, add: dict[str, Any] | None = None, **options: Any) -> Host:
        """A running host on a machine of its own; `add` goes to `Internet.add`."""
        machine = self.net.add(name, **(add or {}))
        network = self.networks[name] = Outward(SimNetwork(machine))
        options.setdefault("default_access", Access.MEMBER)
        options.setdefault("listen", [LISTEN])
        host = Host(network, OwnKey(hashlib.sha256(name.encode()).digest()), **options)
        await self.nursery.start(self._run, name, host)
        return host

    async def _run(self, name: str, host: Host, *, task_status: trio.TaskStatus[None]) -> None:
        async def program() -> None:
            async with trio.open_nursery() as nursery:
                await nursery.start(host.run)
                task_status.started()

        await self.net.machines[name].run(program)

    async def up(self, host: Host, peer: PeerId) -> None:
        """Return once `peer` is up at `host`."""
        with trio.fail_after(20):
            while peer not in host.peers:  # noqa: ASYNC110
                await trio.sleep(0.001)

    async def connect(self, one: Host, other: Host) -> None:
        """Return once `one` has dialled `other` and both see each other."""
        await one.connect(other.listen_addrs)
        await self.up(other, one.peer_id)

    async def adopt_relayed(self, host: Host, pipe: Pipe, relay: Host, peer: Host, dialer: bool) -> None:
        """Let `host` be connected with `peer` over a pipe that says it came over `relay`."""
        await host.adopt(Carried(pipe, relay), expected=peer.peer_id, dialer=dialer)


class Carried:
    """A pipe that came over a relay: its remote address says so."""

    def __init__(self, pipe: Pipe, relay: Host) -> None:
        self._pipe = pipe
        self.remote = Multiaddr(f"{relay.listen_addrs[0]}/p2p-circuit")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipe, name)


class Town:
    """Whole daemons of one swarm, wherever their machines stand; they serve no models."""

    def __init__(self, net: Internet, nursery: trio.Nursery) -> None:
        self.net = net
        self.nursery = nursery
        self.nodes: dict[str, Node] = {}
        self.networks: dict[str, SimNetwork] = {}

    async def found(self, name: str = "founder", *, kind: str = "open", **settings: Any) -> Node:
        """A node that founds the swarm, on a machine connected by a `kind` of `simnet.nat.KINDS`."""
        return await self.found_on(self.net.add_site(name, kind)[0], **settings)

    async def found_on(self, machine: Machine, **settings: Any) -> Node:
        """As `found`, on a machine that is there."""
        network = SimNetwork(machine)
        identity, root = OwnKey(network.entropy(32)), SigningKey(network.entropy(32))
        credentials = found_swarm(identity.peer_id, root, network.wall())
        return await self._start(network, Papers(identity, credentials), settings)

    async def join(self, name: str, kind: str = "open", **settings: Any) -> Node:
        """A node that joins by a fresh ticket of the first one."""
        return await self.settle(self.net.add_site(name, kind)[0], **settings)

    async def settle(self, machine: Machine, **settings: Any) -> Node:
        """As `join`, on a machine that is there. Returns once it is connected with the first one."""
        network = SimNetwork(machine)
        founder = next(iter(self.nodes.values()))
        ticket = parse_ticket(founder.issue_ticket(TicketAsk()).text)
        identity = OwnKey(network.entropy(32))
        credentials = Credentials(identity.peer_id, ticket.root, ticket.chain_for(identity.peer_id))
        papers = Papers(identity, credentials, bootstrap=ticket.bootstrap)
        node = await self._start(network, papers, settings)
        await self.until(lambda: founder.host.peer_id in node.host.peers)
        return node

    async def _start(self, network: SimNetwork, papers: Papers, settings: dict[str, Any]) -> Node:
        name = network.machine.name
        settings.setdefault("listen", (LISTEN,))
        config = Config(home=Path("nowhere"), label=name, assign=False, **settings).validate()
        self.networks[name] = network
        self.nodes[name] = await self.nursery.start(self._live, network, config, papers)
        return self.nodes[name]

    async def _live(
        self, network: SimNetwork, config: Config, papers: Papers, *, task_status: trio.TaskStatus[Node]
    ) -> None:
        await network.machine.run(
            partial(daemon.run, config, network, InlineEngine, papers, task_status=task_status)
        )

    def forward(self, home: str) -> Multiaddr:
        """Let the router of `home` pass calls on to its port 4001, as an owner or UPnP would; where."""
        inside = (self.net.machines[home].ips[0], 4001)
        mapped = self.net.boxes[f"{home} box 0"].translator._map(inside, inside, trio.current_time())
        return Multiaddr("/ip4/{}/tcp/{}".format(*mapped.outside))

    async def again(self, node: Node, memory: Memory) -> Node:
        """Start the program of `node`, which ended, anew: without addresses, with this memory alone."""
        name = node.config.label
        credentials = node.membership.credentials
        papers = Papers(node.host._key, credentials, memory=memory)
        return await self._start(SimNetwork(self.net.machines[name]), papers, {})

    async def until(self, holds: Callable[[], object], seconds: float = 60.0) -> None:
        """Return once `holds()` is true."""
        with trio.fail_after(seconds):
            while not holds():  # noqa: ASYNC110
                await trio.sleep(0.05)


Scenario = Callable[[World], Awaitable[None]]
TownScenario = Callable[[Town], Awaitable[None]]


@pytest.fixture
def play() -> Callable[..., None]:
    """`play(scenario)` runs it in virtual time."""

    def run(scenario: Scenario, *, seed: int = 1, latency_s: float = 0.02) -> None:
        async def main() -> None:
            options = InternetOptions(seed=seed, link=LinkOptions(latency_s=latency_s))
            async with internet(options) as net, trio.open_nursery() as nursery:
                await scenario(World(net, nursery))
                nursery.cancel_scope.cancel()

        clock.run(main, seed)

    return run


class RelayWorld(World):
    """A world with relays in it, and hosts that use them."""

    @staticmethod
    async def until(holds: Callable[[], object], seconds: float = 20.0) -> None:
        """Wait for what comes in its own time."""
        with trio.fail_after(seconds):
            while not holds():  # noqa: ASYNC110
                await trio.sleep(0.001)

    @staticmethod
    async def echo(stream: Stream) -> None:
        """A handler that sends back what comes, to the end."""
        while data := await stream.receive_some():
            await stream.send(data)
        await stream.send_eof()

    async def relay(
        self, name: str = "relay", limits: RelayLimits = DEFAULT_RELAY_LIMITS, **options: Any
    ) -> tuple[Host, RelayServer]:
        """A host that relays."""
        host = await self.host(name, **options)
        server = RelayServer(host, limits)
        await self.nursery.start(server.run)
        server.serve(True)
        return host, server

    async def client(
        self, name: str, *relays: Host, want: int = 0, configured: Sequence[str] = (), **options: Any
    ) -> tuple[Host, RelayClient]:
        """A host that uses relays; with `want` it listens nowhere and is to be reached through them."""
        if want:
            options.setdefault("listen", [])
        host = await self.host(name, **options)
        client = RelayClient(host, relays=configured)
        await self.nursery.start(client.run)
        for other in relays:
            await self.connect(host, other)
        client.want(want)
        return host, client

    async def trio(self, **options: Any) -> tuple[Host, RelayServer, Host, RelayClient, Host]:
        """A relay, a host that is reached through it and echoes, and one that may reach it."""
        relay, server = await self.relay(**options)
        hidden, client = await self.client("hidden", relay, want=1)
        hidden.serve_stream("/echo", self.echo, access=Access.STRANGER)
        await self.until(lambda: client.addrs)
        caller, _ = await self.client("caller")
        return relay, server, hidden, client, caller

    @staticmethod
    async def say(host: Host, peer: PeerId, data: bytes) -> bytes:
        """Send `data`, then wait for it to come back."""
        stream = await host.open_stream(peer, "/echo")
        await stream.send(data)
        return await stream.receive_exactly(len(data))

    @staticmethod
    async def talk(host: Host, peer: PeerId, data: bytes = b"hello") -> bytes:
        """What comes back of `data` while it is sent."""
        stream = await host.open_stream(peer, "/echo")
        got = bytearray()

        async def write() -> None:
            await stream.send(data)
            await stream.send_eof()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write)
            while piece := await stream.receive_some():
                got += piece
        return bytes(got)


@pytest.fixture
def play_relays() -> Callable[..., None]:
    """As `play`, in a world that knows relays."""

    def run(scenario: Callable[[RelayWorld], Awaitable[None]], *, seed: int = 1) -> None:
        async def main() -> None:
            options = InternetOptions(seed=seed, link=LinkOptions(latency_s=0.02))
            async with internet(options) as net, trio.open_nursery() as nursery:
                await scenario(RelayWorld(net, nursery))
                nursery.cancel_scope.cancel()

        clock.run(main, seed)

    return run


@pytest.fixture
def town() -> Callable[..., None]:
    """`town(scenario)` runs it in virtual time."""

    def run(scenario: TownScenario, *, seed: int = 1, latency_s: float = 0.02) -> None:
        async def main() -> None:
            options = InternetOptions(seed=seed, link=LinkOptions(latency_s=latency_s))
            async with internet(options) as net, trio.open_nursery() as nursery:
                await scenario(Town(net, nursery))
                nursery.cancel_scope.cancel()

        clock.run(main, seed)

    return run
