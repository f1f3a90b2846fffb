"""A small world of hosts on the internet in memory, in virtual time."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio

from mycel.node.host import Host
from mycel.protocol.keys import OwnKey
from mycel.protocol.mesh import Access, PeerDown, PeerEvent, PeerId
from mycel.simnet import clock
from mycel.simnet.internet import BufferOptions, Internet, InternetOptions, internet
from mycel.simnet.link import LinkOptions
from mycel.simnet.machine import Machine
from mycel.simnet.network import SimNetwork


class World:
    """Hosts by name; each has its machine in `net.machines`."""

    def __init__(self, net: Internet, nursery: trio.Nursery) -> None:
        self.net = net
        self.nursery = nursery

    def machine(self, name: str) -> Machine:
        return self.net.machines[name]

    async def host(self, name: str, *, link: LinkOptions | None = None, **options: Any) -> Host:
        """A running host on a machine of its own."""
        machine = self.net.add(name, link=link)
        options.setdefault("default_access", Access.MEMBER)
        key = OwnKey(hashlib.sha256(name.encode()).digest())
        host = Host(SimNetwork(machine), key, listen=["/ip4/0.0.0.0/tcp/4001"], **options)
        await self.nursery.start(self._run, machine, host)
        return host

    async def _run(self, machine: Machine, host: Host, *, task_status: trio.TaskStatus[None]) -> None:
        async def program() -> None:
            async with trio.open_nursery() as nursery:
                await nursery.start(host.run)
                task_status.started()

        await machine.run(program)

    async def pair(self, **options: Any) -> tuple[Host, Host, PeerId]:
        """`a` connected to `b`, and b's id."""
        a, b = await self.host("a", **options), await self.host("b", **options)
        peer = await a.connect(b.listen_addrs)
        await self.up(b, a.peer_id)
        return a, b, peer

    async def up(self, host: Host, peer: PeerId) -> None:
        """Return once `peer` is up at `host`."""
        with trio.fail_after(20):
            while peer not in host.peers:  # noqa: ASYNC110
                await trio.sleep(0.001)

    async def down(self, host: Host, peer: PeerId) -> PeerDown:
        """The next time that `peer` goes down at `host`."""
        with trio.fail_after(60):
            async with host.events() as events:
                async for event in events:
                    if isinstance(event, PeerDown) and event.peer == peer:
                        return event
        raise AssertionError

    async def collect(self, host: Host, into: list[PeerEvent]) -> None:
        """Note every event of `host`."""
        async with host.events() as events:
            async for event in events:
                into.append(event)  # noqa: PERF401


Scenario = Callable[[World], Awaitable[None]]


@pytest.fixture
def play() -> Callable[..., None]:
    """`play(scenario)` runs it in virtual time; keywords vary the world."""

    def run(
        scenario: Scenario,
        *,
        seed: int = 1,
        latency_s: float = 0.005,
        buffers: BufferOptions | None = None,
    ) -> None:
        async def main() -> None:
            options = InternetOptions(
                seed=seed, link=LinkOptions(latency_s=latency_s), buffers=buffers or BufferOptions()
            )
            async with internet(options) as net, trio.open_nursery() as nursery:
                await scenario(World(net, nursery))
                nursery.cancel_scope.cancel()

        clock.run(main, seed)

    return run
