"""Worlds for the batteries. For networks: real TCP on loopback, and the internet in memory. For meshes: the
light one, and the real host over both networks.

`play(scenario)` runs `scenario(place)` to its end in the world of the parametrised test. A scenario may use
deadlines freely: they are real seconds in one world and virtual ones in the other. `play_mesh` does the same
for meshes.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from multiaddr import Multiaddr

from mycel.node.host import Host
from mycel.node.reach.circuit import StreamPipe
from mycel.node.reach.relay_server import RelayServer
from mycel.node.stream import HostStream
from mycel.node.tcp import TcpListener, TcpNetwork, TcpPipe
from mycel.node.tls import server_context
from mycel.node.transports import Transports
from mycel.protocol.delimited import receive_prefixed
from mycel.protocol.keys import OwnKey
from mycel.protocol.mesh import Access, Mesh, Stream
from mycel.protocol.network import Listener, Network, Pipe
from mycel.protocol.relay import HOP, STOP, Kind, Message, Status, read_hop, write_hop, write_stop
from mycel.simnet import clock
from mycel.simnet.internet import BufferOptions, InternetOptions, internet
from mycel.simnet.mesh import MeshOptions, mesh_world
from mycel.simnet.network import SimNetwork


@dataclass(frozen=True)
class Place:
    """Two networks that reach each other, and addresses to try them with."""

    kind: str
    near: Network
    far: Network
    far_any: Multiaddr
    far_any6: Multiaddr
    far_host: str
    near_any: Multiaddr
    unreachable: Multiaddr
    far_name: str

    async def connect(self) -> tuple[Listener, Pipe, Pipe]:
        """A listener at the far side and the two ends of a connection to it."""
        listener = await self.far.listen(self.far_any)
        near = await self.near.dial(listener.addr)
        return listener, near, await listener.accept()


@contextmanager
def remember(opened: list[TcpPipe | TcpListener]) -> Iterator[None]:
    """Keep what a scenario opens, so that it can be closed at the end.

    A descriptor that the network itself lost is not among them and fails the test with a ResourceWarning.
    """
    with pytest.MonkeyPatch.context() as patch:
        for kind in (TcpPipe, TcpListener):

            def init(self, sock, original=kind.__init__):
                original(self, sock)
                opened.append(self)

            patch.setattr(kind, "__init__", init)
        yield


Scenario = Callable[[Place], Awaitable[None]]
NOWHERE = Multiaddr("/ip4/192.0.2.1/tcp/1")
SCENARIO_S = 30.0


def play_tcp(scenario: Scenario) -> None:
    """On loopback, in real time."""
    play_real(scenario, "tcp", TcpNetwork(), "")


def play_ws(scenario: Scenario) -> None:
    """WebSocket on loopback."""
    play_real(scenario, "ws", Transports(TcpNetwork()), "/ws")


def play_wss(scenario: Scenario) -> None:
    """WebSocket in TLS on loopback."""
    with tempfile.TemporaryDirectory() as folder:
        context = server_context(*write_certificate(Path(folder)))
    play_real(scenario, "wss", Transports(TcpNetwork(), server_tls=context), "/tls/ws")


def write_certificate(folder: Path) -> tuple[Path, Path]:
    """A self-signed certificate and its key, as PEM files."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "node.example")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    paths = folder / "certificate.pem", folder / "key.pem"
    paths[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    paths[1].write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return paths


def play_real(scenario: Scenario, kind: str, network: Network, suffix: str) -> None:
    """Over sockets of this machine, at addresses that end in `suffix`."""
    opened: list[TcpPipe | TcpListener] = []

    async def main() -> None:
        loopback = Multiaddr(f"/ip4/127.0.0.1/tcp/0{suffix}")
        place = Place(
            kind=kind,
            near=network,
            far=network,
            far_any=loopback,
            far_any6=Multiaddr(f"/ip6/::1/tcp/0{suffix}"),
            far_host="127.0.0.1",
            near_any=loopback,
            unreachable=Multiaddr(f"/ip4/255.255.255.255/tcp/9{suffix}"),
            far_name="localhost",
        )
        try:
            with trio.fail_after(SCENARIO_S):
                await scenario(place)
        finally:
            for thing in opened:
                thing.close()

    with remember(opened):
        trio.run(main, strict_exception_groups=True)


def play_simnet(scenario: Scenario) -> None:
    """In memory, in virtual time."""

    async def main() -> None:
        buffers = BufferOptions(send_max=1 << 20, receive_max=1 << 20)
        async with internet(InternetOptions(seed=5, buffers=buffers)) as net:
            near, far = net.add("near"), net.add("far")
            net.names["far.example"] = far.ips
            place = Place(
                kind="simnet",
                near=SimNetwork(near),
                far=SimNetwork(far),
                far_any=Multiaddr(f"/ip4/{far.ips[0]}/tcp/0"),
                far_any6=Multiaddr(f"/ip6/{far.ips[1]}/tcp/0"),
                far_host=far.ips[0],
                near_any=Multiaddr("/ip4/0.0.0.0/tcp/0"),
                unreachable=Multiaddr("/ip4/11.255.255.1/tcp/9"),
                far_name="far.example",
            )
            with trio.fail_after(SCENARIO_S):
                await scenario(place)

    clock.run(main, seed=5)


@pytest.fixture(params=[play_tcp, play_simnet], ids=["tcp", "simnet"])
def play(request: pytest.FixtureRequest) -> Callable[[Scenario], None]:
    """The world of this test."""
    return request.param


def key_of_name(name: str) -> OwnKey:
    """A key made of its name."""
    return OwnKey(hashlib.sha256(name.encode()).digest())


@dataclass(frozen=True)
class StreamPlace:
    """Two hosts whose streams are taken as pipes, through a third one or not."""

    near: Host
    far: Host
    relay: Host | None = None

    async def connect(self) -> tuple[None, Pipe, Pipe]:
        """The two ends of a stream, as pipes."""
        arrived: list[HostStream] = []
        here, done = trio.Event(), trio.Event()

        async def keep(stream: Stream) -> None:
            assert isinstance(stream, HostStream)
            if self.relay is None:
                await stream.receive_exactly(1)
            else:
                await receive_prefixed(stream, 4096)
                await stream.send(write_stop(Message(Kind.STATUS, status=Status.OK)))
            arrived.append(stream)
            here.set()
            await done.wait()

        self.far.serve_stream("/pipe" if self.relay is None else STOP, keep)
        if self.relay is None:
            await self.near.connect(self.far.listen_addrs)
            stream = await self.near.open_stream(self.far.peer_id, "/pipe")
            await stream.send(b"!")
        else:
            await self._ask(self.far, Message(Kind.RESERVE))
            stream = await self._ask(self.near, Message(Kind.CONNECT, self.far.peer_id))
        await here.wait()
        ends = [StreamPipe(one, local=NOWHERE, remote=NOWHERE) for one in (stream, arrived[0])]
        return None, ends[0], ends[1]

    async def _ask(self, host: Host, request: Message) -> HostStream:
        """A request to the relay that is granted."""
        assert self.relay is not None
        await host.connect(self.relay.listen_addrs)
        stream = await host.open_stream(self.relay.peer_id, HOP)
        await stream.send(write_hop(request))
        assert read_hop(await receive_prefixed(stream, 4096)).status == Status.OK
        return stream


def play_streams(scenario: Callable[[StreamPlace], Awaitable[None]], *, relayed: bool = False) -> None:
    """Streams between hosts in virtual time."""

    async def main() -> None:
        async with internet(InternetOptions(seed=6)) as net, trio.open_nursery() as nursery:
            hosts = [
                Host(SimNetwork(net.add(name)), key_of_name(name), listen=["/ip4/0.0.0.0/tcp/4001"],
                     default_access=Access.MEMBER)
                for name in ("near", "far", "relay")
            ]  # fmt: skip
            for host in hosts:
                await nursery.start(host.run)
            server = RelayServer(hosts[2])
            await nursery.start(server.run)
            server.serve(True)
            with trio.fail_after(SCENARIO_S):
                await scenario(StreamPlace(hosts[0], hosts[1], hosts[2] if relayed else None))
            nursery.cancel_scope.cancel()

    clock.run(main, seed=6)


def play_circuit(scenario: Callable[[StreamPlace], Awaitable[None]]) -> None:
    """Streams that a relay joins, in virtual time."""
    play_streams(scenario, relayed=True)


@pytest.fixture(
    params=[play_tcp, play_simnet, play_ws, play_wss, play_streams, play_circuit],
    ids=["tcp", "simnet", "ws", "wss", "stream", "circuit"],
)
def play_pipe(request: pytest.FixtureRequest) -> Callable[[Scenario], None]:
    """As `play`, with the pipes that are layered over others."""
    return request.param


@dataclass(frozen=True)
class MeshPlace:
    """Nodes that can reach each other. `strict` takes everybody for a stranger; the others are members."""

    a: Mesh
    b: Mesh
    c: Mesh
    strict: Mesh
    nobody: Multiaddr
    kill_b: Callable[[], None]
    silence_b: Callable[[], None] | None

    async def connect(self) -> None:
        """Connect a to b, both sides knowing it."""
        await self.a.connect(self.b.listen_addrs)
        await self.until(lambda: self.a.peer_id in self.b.peers)

    async def streams(self, protocol: str = "/test/pair/1") -> tuple[Stream, Stream]:
        """Both ends of a fresh stream from a to b, which ends with the scenario."""
        ends: list[Stream] = []
        done = trio.Event()

        async def keep(stream: Stream) -> None:
            assert await stream.receive_exactly(1) == b"!"
            ends.append(stream)
            done.set()
            await trio.sleep_forever()

        self.b.serve_stream(protocol, keep)
        near = await self.a.open_stream(self.b.peer_id, protocol)
        await near.send(b"!")
        await done.wait()
        return near, ends[0]

    @staticmethod
    async def until(holds: Callable[[], object]) -> None:
        """Wait for what comes in its own time."""
        while True:
            if holds():
                return
            await trio.sleep(0.01)

    @staticmethod
    async def echo(stream: Stream) -> None:
        """A handler that sends back what comes, to the end."""
        while data := await stream.receive_some():
            await stream.send(data)
        await stream.send_eof()


MeshScenario = Callable[[MeshPlace], Awaitable[None]]
NOBODY = "12D3KooWGCGBjEbTgUhGcZ8dpwDqg6aCTYL9J4JiiUQXYoQoMRyw"


def play_light(scenario: MeshScenario) -> None:
    """Nodes of the simulated mesh."""

    async def main() -> None:
        async with mesh_world(MeshOptions(seed=3)) as world:
            a, b, c = (world.add(name) for name in "abc")
            strict = world.add("strict", swarm="another")
            place = MeshPlace(
                a=a,
                b=b,
                c=c,
                strict=strict,
                nobody=Multiaddr(f"/ip4/10.200.0.1/tcp/4001/p2p/{NOBODY}"),
                kill_b=lambda: world.kill(b),
                silence_b=lambda: world.silence(b),
            )
            with trio.fail_after(SCENARIO_S):
                await scenario(place)

    clock.run(main, seed=3)


async def run_hosts(
    scenario: MeshScenario,
    networks: dict[str, Network],
    listen: str,
    nobody: str,
    silence_b: Callable[[], None] | None,
) -> None:
    """Real hosts over these networks. Each listens before the scenario begins."""
    scopes = {name: trio.CancelScope() for name in networks}
    hosts = {
        name: Host(
            network,
            key_of_name(name),
            listen=[listen],
            default_access=Access.STRANGER if name == "strict" else Access.MEMBER,
        )
        for name, network in networks.items()
    }

    async def run(name: str, *, task_status: trio.TaskStatus[None]) -> None:
        with scopes[name]:
            await hosts[name].run(task_status=task_status)

    async with trio.open_nursery() as nursery:
        for name in hosts:
            await nursery.start(run, name)
        place = MeshPlace(
            **hosts,
            nobody=Multiaddr(f"{nobody}/p2p/{NOBODY}"),
            kill_b=scopes["b"].cancel,
            silence_b=silence_b,
        )
        with trio.fail_after(SCENARIO_S):
            await scenario(place)
        nursery.cancel_scope.cancel()


NAMES = ("a", "b", "c", "strict")


def play_host_tcp(scenario: MeshScenario) -> None:
    """Hosts on loopback, in real time."""

    async def main() -> None:
        networks: dict[str, Network] = {name: TcpNetwork() for name in NAMES}
        await run_hosts(scenario, networks, "/ip4/127.0.0.1/tcp/0", "/ip4/127.0.0.1/tcp/1", None)

    trio.run(main, strict_exception_groups=True)


def play_host_simnet(scenario: MeshScenario) -> None:
    """Hosts in memory, in virtual time."""

    async def main() -> None:
        async with internet(InternetOptions(seed=4)) as net:
            networks: dict[str, Network] = {name: SimNetwork(net.add(name)) for name in NAMES}
            silence = net.machines["b"].silence
            nobody = "/ip4/11.255.255.1/tcp/9"
            await run_hosts(scenario, networks, "/ip4/0.0.0.0/tcp/4001", nobody, silence)

    clock.run(main, seed=4)


@pytest.fixture(
    params=[play_light, play_host_tcp, play_host_simnet], ids=["light", "host-tcp", "host-simnet"]
)
def play_mesh(request: pytest.FixtureRequest) -> Callable[[MeshScenario], None]:
    """The mesh of this test."""
    return request.param
