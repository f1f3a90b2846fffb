"""Machines on simulated lines, and pipes between them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
import trio
from multiaddr import Multiaddr

from mycel.simnet import clock
from mycel.simnet.internet import Internet, InternetOptions, internet
from mycel.simnet.network import SimNetwork

PORT = 4001


class Scene:
    """An internet and what tests do on it again and again."""

    def __init__(self, net: Internet) -> None:
        self.net = net

    def network(self, name, **options):
        """A new machine's network."""
        return SimNetwork(self.net.add(name, **options))

    async def listen(self, network):
        """A listener on the machine's first address."""
        return await network.listen(Multiaddr(f"/ip4/{network.machine.ips[0]}/tcp/{PORT}"))

    async def connect(self, near, far):
        """The two ends of a fresh connection."""
        listener = await self.listen(far)
        pipe = await near.dial(listener.addr)
        accepted = await listener.accept()
        listener.close()
        return pipe, accepted

    @staticmethod
    async def send(pipe, data):
        view = memoryview(data)
        while view:
            count = pipe.try_send(view)
            if not count:
                await pipe.wait_writable()
            view = view[count:]

    @staticmethod
    async def receive(pipe, count):
        """Read `count` bytes (fewer at the end of the stream); returns them."""
        data = bytearray()
        buffer = bytearray(1 << 20)
        while len(data) < count:
            got = pipe.try_recv_into(memoryview(buffer)[: count - len(data)])
            if got is None:
                await pipe.wait_readable()
            elif got == 0:
                break
            else:
                data += buffer[:got]
        return bytes(data)

    async def transfer(self, near, far, size):
        """Virtual seconds from the first write to the last byte read."""
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.send, near, bytes(size))
            assert len(await self.receive(far, size)) == size
        return trio.current_time() - began


@pytest.fixture
def play() -> Callable[..., object]:
    """`play(scenario, **options)`: run `scenario(scene)` in virtual time; returns what it returns."""

    def run(scenario: Callable[[Scene], Awaitable[object]], *, seed: int = 0, **options: object) -> object:
        async def main():
            async with internet(InternetOptions(seed=seed, **options)) as net:
                with trio.fail_after(3600):
                    return await scenario(Scene(net))

        return clock.run(main, seed)

    return run
