"""What the boxes between two machines allow, found out by bare connections: the yardstick for hole punching.

Nothing of Mycel's own punching is in here. Both ends know where the other's port shows up at a third machine,
and the other's address inside, and start at the same instant, which no real node can arrange so well. Where
this does not get through, no direct connection can be had that was arranged beforehand.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import trio
from multiaddr import Multiaddr

from mycel.protocol.address import endpoint_of, tcp_addr
from mycel.protocol.errors import DialError, PipeBroken
from mycel.simnet.machine import Machine
from mycel.simnet.network import SimNetwork
from mycel.simnet.packet import Address
from mycel.simnet.pipe import SimPipe

ECHO_PORTS = (1, 2)
KNOCK_S = 0.5
"""A knock that nobody has answered by then is not answered: twelve round trips of 40 ms."""
PUNCH_S = 2.5
"""A punch tries for so long: two repetitions of a SYN (1 s each), and a margin."""
DIAL_S = 0.6
REDIAL_S = 0.06
"""The longest pause before a dial is repeated; drawn each time, or two ends that refuse each other's packets
out of step would stay so."""
PROOF_BYTES = 17


async def read_exactly(pipe: SimPipe, count: int) -> bytes:
    """`count` bytes, fewer where the stream ends before. Raises `PipeBroken`."""
    data = bytearray(count)
    filled = 0
    while filled < count:
        got = pipe.try_recv_into(memoryview(data)[filled:])
        if got is None:
            await pipe.wait_readable()
        elif got:
            filled += got
        else:
            break
    return bytes(data[:filled])


@asynccontextmanager
async def echoes(machine: Machine) -> AsyncIterator[Address]:
    """Let a public machine tell whoever connects to `ECHO_PORTS` its address as seen from there.

    Gives the first of its addresses to ask.
    """
    network = SimNetwork(machine)

    async def answer(pipe: SimPipe) -> None:
        host = endpoint_of(pipe.remote)
        pipe.try_send(f"{host.host} {host.port}".ljust(64).encode())
        try:
            await read_exactly(pipe, 1)  # it stays until the other end goes, so that its mapping does
        except PipeBroken:
            return
        pipe.close()

    async def serve(port: int, *, task_status: trio.TaskStatus[None]) -> None:
        listener = await network.listen(tcp_addr("0.0.0.0", port))
        task_status.started()
        while True:
            nursery.start_soon(answer, await listener.accept())

    async with trio.open_nursery() as nursery:
        for port in ECHO_PORTS:
            await nursery.start(serve, port)
        yield machine.ips[0], ECHO_PORTS[0]
        nursery.cancel_scope.cancel()


async def seen_from(network: SimNetwork, local: Multiaddr, server: Address) -> tuple[Address, SimPipe]:
    """Where `local` shows up at an echo, and the connection that holds it open. Raises `DialError`."""
    pipe = await network.dial(tcp_addr(*server), local=local)
    host, port = (await read_exactly(pipe, 64)).decode().split()
    return (host, int(port)), pipe


async def knock(network: SimNetwork, to: Address) -> str:
    """Dial from a fresh port: in, refused or silent."""
    with trio.move_on_after(KNOCK_S):
        try:
            pipe = await network.dial(tcp_addr(*to))
        except DialError as error:
            return "refused" if "refused" in str(error) else "unreachable"
        pipe.close()
        return "in"
    return "silent"


class Puncher:
    """One end: a port that both dials and listens."""

    def __init__(self, network: SimNetwork, rng: random.Random) -> None:
        self._network = network
        self._rng = rng
        self._held: list[SimPipe] = []
        self.done = trio.Event()

    async def locate(self, server: Address) -> tuple[Address, Address]:
        """Open the port; returns where it shows up at an echo, and where it is inside."""
        self._listener = await self._network.listen(tcp_addr("0.0.0.0", 0), shared=True)
        outside, pipe = await seen_from(self._network, self._listener.addr, server)
        self._held.append(pipe)
        return outside, (self._network.machine.ips[0], self._listener.at[1])

    async def run(self, targets: Sequence[Address], own: bytes, other: bytes) -> None:
        """Dial and accept until cancelled; `done` once a connection has brought the other end's proof."""
        async with trio.open_nursery() as nursery:
            for target in targets:
                nursery.start_soon(self._dial, target, own, other)
            while True:
                nursery.start_soon(self._prove, await self._listener.accept(), own, other)

    async def _dial(self, target: Address, own: bytes, other: bytes) -> None:
        while True:
            try:
                with trio.fail_after(DIAL_S):
                    pipe = await self._network.dial(tcp_addr(*target), local=self._listener.addr)
            except (DialError, trio.TooSlowError):
                await trio.sleep(self._rng.uniform(0, REDIAL_S))
            else:
                await self._prove(pipe, own, other)
                return

    async def _prove(self, pipe: SimPipe, own: bytes, other: bytes) -> None:
        self._held.append(pipe)
        try:
            pipe.try_send(own)
            if await read_exactly(pipe, len(other)) == other:
                self.done.set()
        except PipeBroken:
            return

    def close(self) -> None:
        """Let the port and its connections go."""
        self._listener.close()
        for pipe in self._held:
            pipe.reset()


async def punch(one: SimNetwork, two: SimNetwork, server: Address, *, inside: bool = False) -> float | None:
    """Seconds until both ends held a proven connection, None where they never did.

    `inside`: they try each other's addresses inside as well.
    """
    net = one.machine.internet
    rng = random.Random(f"punch {net.options.seed} {one.machine.name} {two.machine.name}")
    ends = Puncher(one, rng), Puncher(two, rng)
    found = [await end.locate(server) for end in ends]
    targets = [addrs if inside else addrs[:1] for addrs in found]
    key = rng.randbytes(PROOF_BYTES - 1)
    began = trio.current_time()
    took: float | None = None
    with trio.move_on_after(PUNCH_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ends[0].run, targets[1], key + b"1", key + b"2")
            nursery.start_soon(ends[1].run, targets[0], key + b"2", key + b"1")
            for end in ends:
                await end.done.wait()
            took = trio.current_time() - began
            nursery.cancel_scope.cancel()
    for end in ends:
        end.close()
    return took
