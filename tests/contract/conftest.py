"""Two worlds for one battery: real TCP on loopback, and the internet in memory.

`play(scenario)` runs `scenario(place)` to its end in the world of the parametrised test. A scenario may use
deadlines freely: they are real seconds in one world and virtual ones in the other.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import trio
from multiaddr import Multiaddr

from mycel.node.tcp import TcpListener, TcpNetwork, TcpPipe
from mycel.protocol.network import Listener, Network, Pipe
from mycel.simnet import clock
from mycel.simnet.internet import BufferOptions, InternetOptions, internet
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
SCENARIO_S = 30.0


def play_tcp(scenario: Scenario) -> None:
    """On loopback, in real time."""
    opened: list[TcpPipe | TcpListener] = []

    async def main() -> None:
        loopback = Multiaddr("/ip4/127.0.0.1/tcp/0")
        place = Place(
            kind="tcp",
            near=TcpNetwork(),
            far=TcpNetwork(),
            far_any=loopback,
            far_any6=Multiaddr("/ip6/::1/tcp/0"),
            far_host="127.0.0.1",
            near_any=loopback,
            unreachable=Multiaddr("/ip4/255.255.255.255/tcp/9"),
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
