"""A small world of hosts on the internet in memory, in virtual time, and whom each of them dialled."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio

from mycel.node.host import Host
from mycel.node.reach.outward import Outward
from mycel.protocol.keys import OwnKey
from mycel.protocol.mesh import Access, PeerId
from mycel.simnet import clock
from mycel.simnet.internet import Internet, InternetOptions, internet
from mycel.simnet.link import LinkOptions
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


Scenario = Callable[[World], Awaitable[None]]


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
