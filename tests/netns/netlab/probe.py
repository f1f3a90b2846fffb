"""What plain sockets find out about a site: how it maps, who may come in, and whether a punch gets through.

Nothing of Mycel is in here. `verify` tells what kind a site is by behaviour alone, so that the rules of
`netlab.boxes` are known to do what their names say. `punch` is the yardstick for Mycel's own: it knows both
true mappings and starts both ends at the same instant, which no real node can; where it fails, the boxes
allow no direct connection that could be arranged beforehand.

All sockets of a probe live in this process, each in its site's namespace.
"""

from __future__ import annotations

import os
import random
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

import trio

from netlab.lab import Site
from netlab.space import Space

KNOCK_S = 1.5
"""A knock that nobody has answered by then is not answered: one SYN retransmission is in it."""
PUNCH_S = 4.0
"""A punch tries for so long: two SYN retransmissions (after 1 and 3 s), and a margin."""
UDP_S = 1.5
MAPPED_S = 10.0
DIAL_S = 0.6
LAST_WORD_S = 0.25
REDIAL_S = 0.06
"""The longest pause before a dial is repeated; drawn each time, or two ends that refuse each other's packets
out of step would stay so."""
UDP_PORT = 7

Address = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Behaviour:
    """How a site treats TCP, as seen from outside."""

    keeps_port: bool
    is_symmetric: bool
    stranger: str
    """What happens to a SYN from an address that was never written to: in, refused or silent."""
    acquaintance: str
    """The same from an address that was written to, but from another port of it."""
    udp: bool
    """Whether a datagram out gets its answer."""


def tcp(space: Space, port: int = 0) -> trio.socket.SocketType:
    """A TCP socket inside, bound to `port` together with others of its owner."""
    plain = space.socket()
    plain.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    plain.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    plain.bind(("0.0.0.0", port))
    return trio.socket.from_stdlib_socket(plain)


async def echo(
    space: Space, port: int, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """Tell whoever connects to `port` its address as seen from here; started once it listens."""

    async def answer(peer: trio.socket.SocketType, text: bytes) -> None:
        with peer, suppress(OSError):
            await peer.send(text)
            await peer.recv(1)  # stays until the other end goes, so that its mapping does

    with tcp(space, port) as listener:
        listener.listen(128)
        async with trio.open_nursery() as nursery:
            task_status.started()
            while True:
                peer, addr = await listener.accept()
                nursery.start_soon(answer, peer, f"{addr[0]} {addr[1]}".encode())


async def answer_udp(space: Space, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
    """Send every datagram back; started once it listens."""
    with trio.socket.from_stdlib_socket(space.socket(socket.SOCK_DGRAM)) as sock:
        await sock.bind(("0.0.0.0", UDP_PORT))
        task_status.started()
        while True:
            data, addr = await sock.recvfrom(64)
            await sock.sendto(data, addr)


@asynccontextmanager
async def posts(known: Site, other: Site) -> AsyncIterator[None]:
    """Two public hosts at their posts: `known` echoes on ports 1 and 2 and answers UDP, `other` on port 1."""
    async with trio.open_nursery() as nursery:
        await nursery.start(echo, known.home, 1)
        await nursery.start(echo, known.home, 2)
        await nursery.start(echo, other.home, 1)
        await nursery.start(answer_udp, known.home)
        yield
        nursery.cancel_scope.cancel()


async def mapped(space: Space, port: int, server: Address) -> tuple[Address, trio.socket.SocketType]:
    """Where `port` of `space` shows up at an echo, and the connection that holds it open."""
    sock = tcp(space, port)
    with trio.fail_after(MAPPED_S):
        await sock.connect(server)
        host, number = (await sock.recv(64)).decode().split()
    return (host, int(number)), sock


async def knock(space: Space, to: Address) -> str:
    """Dial from a fresh port: in, refused or silent."""
    with tcp(space) as sock:
        try:
            with trio.move_on_after(KNOCK_S) as patience:
                await sock.connect(to)
            if patience.cancelled_caught:
                return "silent"
        except ConnectionRefusedError:
            return "refused"
        return "in"


async def verify(site: Site, known: Site, other: Site, stranger: Site) -> Behaviour:
    """What `site` does. It writes to `known` and `other`, which are at their `posts`, and never to
    `stranger`."""
    listener = tcp(site.home)
    listener.listen(8)
    port = listener.getsockname()[1]
    servers = ((known.addr, 1), (known.addr, 2), (other.addr, 1))
    seen, held = [], [listener]
    try:
        for server in servers:
            addr, sock = await mapped(site.home, port, server)
            seen.append(addr)
            held.append(sock)
        return Behaviour(
            keeps_port=all(addr[1] == port for addr in seen),
            is_symmetric=len(set(seen)) > 1,
            stranger=await knock(stranger.home, seen[0]),
            acquaintance=await knock(known.home, seen[0]),
            udp=await _udp(site.home, known.addr),
        )
    finally:
        for sock in held:
            sock.close()


async def _udp(space: Space, host: str) -> bool:
    with trio.socket.from_stdlib_socket(space.socket(socket.SOCK_DGRAM)) as sock:
        await sock.sendto(b"?", (host, UDP_PORT))
        with trio.move_on_after(UDP_S):
            return await sock.recv(64) == b"?"
    return False


class Puncher:
    """One end of a raw punch: a port that both dials and listens."""

    def __init__(self, space: Space, server: Address) -> None:
        self._space = space
        self._server = server
        self._listener = tcp(space)
        self._listener.listen(8)
        self._port: int = self._listener.getsockname()[1]
        self._held: list[trio.socket.SocketType] = [self._listener]

    async def outside(self) -> Address:
        """Where this end's port shows up."""
        addr, sock = await mapped(self._space, self._port, self._server)
        self._held.append(sock)
        return addr

    async def run(self, to: Address, key: bytes, done: trio.Event) -> None:
        """Dial and listen until a connection has carried `key` both ways; sets `done`."""

        async def accept() -> None:
            while True:
                sock, _ = await self._listener.accept()
                nursery.start_soon(prove, sock)

        async def dial() -> None:
            while True:
                sock = tcp(self._space, self._port)
                try:
                    with trio.fail_after(DIAL_S):
                        await sock.connect(to)
                except (OSError, trio.TooSlowError):
                    sock.close()
                    await trio.sleep(random.uniform(0, REDIAL_S))
                else:
                    await prove(sock)
                    return

        async def prove(sock: trio.socket.SocketType) -> None:
            self._held.append(sock)
            try:
                await sock.send(key)
                if await sock.recv(len(key)) == key:
                    done.set()
            except OSError:
                return

        async with trio.open_nursery() as nursery:
            nursery.start_soon(accept)
            nursery.start_soon(dial)
            await done.wait()
            await trio.sleep(LAST_WORD_S)  # the other end hears of it too
            nursery.cancel_scope.cancel()

    def close(self) -> None:
        """Let the sockets go."""
        for sock in self._held:
            sock.close()


async def punch(one: Space, two: Space, server: Address) -> float | None:
    """Seconds that a raw punch between two homes took once it started; None where it never got through.

    Both ends know where the other's port shows up at `server`, and start at the same instant.
    """
    ends = Puncher(one, server), Puncher(two, server)
    try:
        addrs = [await end.outside() for end in ends]
        key = os.urandom(16)
        done = trio.Event(), trio.Event()
        began = trio.current_time()
        with trio.move_on_after(PUNCH_S):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ends[0].run, addrs[1], key, done[0])
                nursery.start_soon(ends[1].run, addrs[0], key, done[1])
                for event in done:
                    await event.wait()
                took = trio.current_time() - began
                nursery.cancel_scope.cancel()
                return took
        return None
    finally:
        for end in ends:
            end.close()
