"""Peers by number, and whole networks of Kademlia nodes in virtual time."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Awaitable, Callable

import base58
import pytest
import trio

from mycel.dht.kad.service import Kademlia
from mycel.dht.kad.table import Contact
from mycel.protocol.limits import DEFAULT_KAD_LIMITS
from mycel.protocol.mesh import PeerId
from mycel.simnet import clock
from mycel.simnet.mesh import MeshOptions, mesh_world


@functools.cache
def _contact(number: int) -> Contact:
    raw = b"\x00\x24\x08\x01\x12\x20" + hashlib.sha256(b"peer %d" % number).digest()
    return Contact(PeerId(base58.b58encode(raw).decode()), (b"address %d" % number,))


@pytest.fixture(scope="session")
def contact() -> Callable[[int], Contact]:
    """`contact(n)`: the n-th peer of all there could be."""
    return _contact


class Town:
    """A mesh world with Kademlia nodes that have joined."""

    def __init__(self, world, nursery):
        self.world = world
        self.nursery = nursery
        self.nodes = []

    async def grow(self, count, limits=DEFAULT_KAD_LIMITS, **options):
        """Add nodes that join one after the other, each through another one."""
        for _ in range(count):
            mesh = self.world.add()
            kad = Kademlia(mesh, limits=limits, **options)
            await self.nursery.start(kad.run)
            if self.nodes:
                await mesh.connect(self.nodes[len(self.nodes) * 7 % len(self.nodes)][0].listen_addrs)
                await kad.bootstrap()
            self.nodes.append((mesh, kad))
        return self.nodes


@pytest.fixture
def town() -> Callable[..., object]:
    """`town(scenario, nodes=N, limits=..., **mesh options)`: `scenario(town)` in virtual time, N joined."""

    def run(
        scenario: Callable[[Town], Awaitable[object]], *, nodes: int, limits=DEFAULT_KAD_LIMITS, **options
    ) -> object:
        async def main():
            async with mesh_world(MeshOptions(**options)) as world, trio.open_nursery() as nursery:
                town = Town(world, nursery)
                await town.grow(nodes, limits)
                with trio.fail_after(24 * 3600):
                    result = await scenario(town)
                nursery.cancel_scope.cancel()
            return result

        return clock.run(main, options.get("seed", 0))

    return run
