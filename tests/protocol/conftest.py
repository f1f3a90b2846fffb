"""Two nodes that can call each other, over every mesh there is."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass

import pytest
import trio

from mycel.node.host import Host
from mycel.node.tcp import TcpNetwork
from mycel.protocol.keys import OwnKey
from mycel.protocol.limits import DEFAULT_CALL_LIMITS, CallLimits
from mycel.protocol.mesh import Access, Mesh, PeerId
from mycel.protocol.network import Network
from mycel.protocol.rpc import Rpc
from mycel.simnet.internet import InternetOptions, internet
from mycel.simnet.link import LinkOptions
from mycel.simnet.mesh import MeshOptions, mesh_world
from mycel.simnet.network import SimNetwork


async def until(holds: Callable[[], bool]) -> None:
    """Return once `holds()`; for what has no event to wait for."""
    with trio.fail_after(10):
        while not holds():  # noqa: ASYNC110
            await trio.sleep(0.001)


@dataclass
class Duo:
    """`near` and `far` are connected; `far` is what tests call."""

    near_mesh: Mesh
    far_mesh: Mesh
    near: Rpc
    far: Rpc

    @property
    def peer(self) -> PeerId:
        return self.far_mesh.peer_id

    def cut(self) -> None:
        """End the connection, as a broken cable would."""
        self.near_mesh.disconnect(self.peer, "cut by the test")

    async def apart(self) -> None:
        """Return once both sides know that the connection is gone."""
        near = self.near_mesh.peer_id
        await until(lambda: self.peer not in self.near_mesh.peers and near not in self.far_mesh.peers)

    async def join(self) -> None:
        """Connect, and return when both sides know it."""
        await self.near_mesh.connect(self.far_mesh.listen_addrs)
        near = self.near_mesh.peer_id
        await until(lambda: self.peer in self.near_mesh.peers and near in self.far_mesh.peers)


Meshes = AbstractAsyncContextManager[tuple[Mesh, Mesh]]


@asynccontextmanager
async def sim_meshes(access: Access) -> AsyncIterator[tuple[Mesh, Mesh]]:
    """Two nodes of the simulated mesh, half a millisecond apart; the first has the role `access`."""
    async with mesh_world(MeshOptions(seed=1, latency_s_min=0.0005, latency_s_max=0.0005)) as world:
        yield world.add("near", access=access), world.add("far")


@asynccontextmanager
async def hosts(
    networks: Sequence[Network], ips: Sequence[str], access: Access
) -> AsyncIterator[tuple[Mesh, Mesh]]:
    """Two hosts, each listening on its IP address; the first has the role `access` at the second."""
    keys = [OwnKey(bytes([number]) * 32) for number in (1, 2)]
    roles = [Access.MEMBER, access]
    near, far = (
        Host(network, key, listen=[f"/ip4/{ip}/tcp/0"], default_access=role)
        for network, key, ip, role in zip(networks, keys, ips, roles, strict=True)
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(near.run)
        await nursery.start(far.run)
        yield near, far
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def tcp_hosts(access: Access) -> AsyncIterator[tuple[Mesh, Mesh]]:
    """Two hosts over loopback."""
    async with hosts([TcpNetwork(), TcpNetwork()], ["127.0.0.1"] * 2, access) as meshes:
        yield meshes


@asynccontextmanager
async def sim_hosts(access: Access) -> AsyncIterator[tuple[Mesh, Mesh]]:
    """Two hosts in the simulated internet."""
    async with internet(InternetOptions(seed=1, link=LinkOptions(latency_s=0.0002))) as net:
        machines = [net.add("near"), net.add("far")]
        networks = [SimNetwork(machine) for machine in machines]
        async with hosts(networks, [machine.ips[0] for machine in machines], access) as meshes:
            yield meshes


WORLDS: dict[str, Callable[[Access], Meshes]] = {
    "sim-mesh": sim_meshes,
    "tcp-host": tcp_hosts,
    "sim-host": sim_hosts,
}


@pytest.fixture(params=WORLDS)
def world(request: pytest.FixtureRequest) -> str:
    """The name of a kind of mesh."""
    name: str = request.param
    return name


@dataclass
class MakeDuo:
    """Opens a duo with roles and limits of the test's choice."""

    world: str

    @asynccontextmanager
    async def __call__(
        self,
        *,
        access: Access = Access.MEMBER,
        near_limits: CallLimits = DEFAULT_CALL_LIMITS,
        far_limits: CallLimits = DEFAULT_CALL_LIMITS,
    ) -> AsyncIterator[Duo]:
        async with WORLDS[self.world](access) as (near, far), trio.open_nursery() as nursery:
            duo = Duo(near, far, Rpc(near, near_limits), Rpc(far, far_limits))
            await nursery.start(duo.near.run)
            await nursery.start(duo.far.run)
            await duo.join()
            yield duo
            nursery.cancel_scope.cancel()


@pytest.fixture
def make_duo(world: str) -> MakeDuo:
    """`async with make_duo() as duo:` over each kind of mesh."""
    return MakeDuo(world)


@pytest.fixture
async def duo(make_duo: MakeDuo) -> AsyncIterator[Duo]:
    """A connected duo of members with the usual limits."""
    async with make_duo() as ready:
        yield ready
