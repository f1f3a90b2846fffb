"""A node at a site: the real stack, driven by one line of JSON at a time.

`python -m netlab.player` loads everything once, then forks a child for each player that standard input names:
the child enters its namespace and is a node, composed as the daemon composes it up to reach
(`mycel.node.daemon`), but without a gatherer: it dials whom it is told to. What it can be asked for are the
methods of `Player`.

Asked on its socket: {"do": NAME, ...}; answered: {...}, with {"error": TEXT} where it failed.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import trio

from mycel.node.config import PRESETS, Config
from mycel.node.contacts import Contacts
from mycel.node.gather import Gather
from mycel.node.host import Host
from mycel.node.memory import VolatileMemory
from mycel.node.reach.outward import Outward
from mycel.node.reach.reach import Reach
from mycel.node.tcp import TcpNetwork
from mycel.protocol.address import peer_of
from mycel.protocol.errors import MycelError
from mycel.protocol.identity import SigningKey
from mycel.protocol.keys import OwnKey
from mycel.protocol.membership import Credentials, Membership, found_swarm
from mycel.protocol.mesh import Access, PathKind, PeerId
from mycel.protocol.rpc import Call, Method, Rpc
from mycel.protocol.ticket import issue_ticket, parse_ticket
from netlab.space import die_with_parent, enter

LISTEN = "/ip4/0.0.0.0/tcp/4001"
CALL_S = 10.0
POLL_S = 0.005

ECHO = Method("netlab.echo", bytes, bytes)

Answer = dict[str, Any]


class Player:
    """One node. Every method answers what is put on the wire."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._network = TcpNetwork()
        self._identity = OwnKey(os.urandom(32))
        self._host: Host | None = None
        self._rpc: Rpc | None = None
        self._reach: Reach | None = None

    @property
    def host(self) -> Host:
        """The node's host."""
        assert self._host is not None, "found or join first"
        return self._host

    async def found(self) -> Answer:
        """Found a swarm; a ticket to it."""
        root = SigningKey(os.urandom(32))
        await self._start(found_swarm(self._identity.peer_id, root, time.time()))
        ticket = issue_ticket(root, access=Access.MEMBER, now=time.time(), entropy=os.urandom)
        return {"ticket": ticket.with_bootstrap(self.host.listen_addrs).text()}

    async def join(self, ticket: str) -> Answer:
        """Join the swarm and be connected with who is named in the ticket."""
        parsed = parse_ticket(ticket)
        chain = parsed.chain_for(self._identity.peer_id)
        await self._start(Credentials(self._identity.peer_id, parsed.root, chain))
        return await self.meet([str(addr) for addr in parsed.bootstrap])

    async def meet(self, addrs: Sequence[str]) -> Answer:
        """Be connected with the peer at `addrs`."""
        peer = await self.host.connect(addrs)
        return {"peer": peer, "path": self.host.peers[peer].path.value}

    async def told(self) -> Answer:
        """Where this node tells others to dial it, and what it takes itself for."""
        assert self._reach is not None
        addrs = [str(addr) for addr in self.host.listen_addrs]
        return {"peer": self.host.peer_id, "addrs": addrs, "kind": self._reach.verdict.kind.value}

    async def path(self, peer: str) -> Answer:
        """How this node is connected with `peer`: direct, relayed or none."""
        info = self.host.peers.get(PeerId(peer))
        return {"path": "none" if info is None else info.path.value, "addr": str(info.addr) if info else ""}

    async def drop(self, peer: str) -> Answer:
        """End the connections with `peer`."""
        self.host.disconnect(PeerId(peer), "the test says so")
        return {}

    async def call(self, addrs: Sequence[str], watch_s: float) -> Answer:
        """Call the peer at `addrs`, wait up to `watch_s` for a direct connection, and call again.

        Answers whether both calls came back, the paths at first and at last, and the seconds to the first
        connection (`up_s`) and from there to the direct one (`direct_s`, None where there was none).
        """
        assert self._rpc is not None
        (peer,) = {peer_of(addr) for addr in addrs}
        assert peer is not None
        began = time.monotonic()
        await self.host.connect(addrs)
        up = time.monotonic()
        first = self.host.peers[peer].path
        calls = [await self._echo(peer)]
        direct = await self._wait_direct(peer, up + watch_s)
        calls.append(await self._echo(peer))
        info = self.host.peers.get(peer)
        return {
            "call_ok": all(calls),
            "first": first.value,
            "last": info.path.value if info is not None else "none",
            "up_s": up - began,
            "direct_s": None if direct is None else direct - up,
        }

    async def _wait_direct(self, peer: PeerId, until: float) -> float | None:
        while time.monotonic() < until:
            info = self.host.peers.get(peer)
            if info is not None and info.path is PathKind.DIRECT:
                return time.monotonic()
            await trio.sleep(POLL_S)
        return None

    async def _echo(self, peer: PeerId) -> bool:
        assert self._rpc is not None
        said = os.urandom(128)
        return await self._rpc.call(peer, ECHO, said, deadline_s=CALL_S) == said

    async def _start(self, credentials: Credentials) -> None:
        config = Config(**{**PRESETS["wan"], "home": Path("nowhere"), "preset": "wan", "listen": (LISTEN,)})
        outward = Outward(self._network)
        membership = Membership(credentials, self._network.wall, limits=config.limits())
        self._host = Host(
            outward, self._identity, listen=[LISTEN], membership=membership, limits=config.limits()
        )
        self._rpc = Rpc(self._host)
        self._rpc.serve(ECHO, _echo, inline=True)
        contacts = Contacts(self._host.peer_id, redial_s=config.redial_s, redial_max_s=config.redial_max_s)
        gather = Gather(self._host, self._rpc, contacts, VolatileMemory())
        self._reach = Reach(config, outward, self._host, contacts, gather)
        for service in (self._host.run, self._rpc.run, self._reach.run):
            await self._nursery.start(service)


def _echo(call: Call, request: bytes) -> bytes:
    return request


async def play(control: socket.socket) -> None:
    """Answer until the other end of `control` closes."""
    stream = trio.SocketStream(trio.socket.from_stdlib_socket(control))
    async with trio.open_nursery() as nursery:
        player = Player(nursery)
        methods: Mapping[str, Callable[..., Awaitable[Answer]]] = {
            name: getattr(player, name) for name in ("found", "join", "meet", "told", "path", "drop", "call")
        }
        text = b""
        async for data in stream:
            *lines, text = (text + data).split(b"\n")
            for line in lines:
                asked = json.loads(line)
                try:
                    answer = await methods[asked.pop("do")](**asked)
                except MycelError as error:
                    answer = {"error": f"{type(error).__name__}: {error}"}
                await stream.send_all(json.dumps(answer).encode() + b"\n")
        nursery.cancel_scope.cancel()


def main() -> None:
    """Fork the players, wait for all of them."""
    parts = json.loads(sys.stdin.readline())
    gc.freeze()
    children = []
    for part in parts:
        child = os.fork()
        if child == 0:
            _become(part, parts)
        children.append(child)
    for part in parts:
        os.close(part["control"])
    for child in children:
        os.waitpid(child, 0)


def _become(part: Mapping[str, Any], parts: Sequence[Mapping[str, Any]]) -> None:
    """Be that player in this process, to its end."""
    die_with_parent()
    enter(part["space"])
    for other in parts:
        if other is not part:
            os.close(other["control"])
    log = os.open(part["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    logging.basicConfig(level=logging.DEBUG, format="%(relativeCreated)d %(name)s %(message)s")
    trio.run(play, socket.socket(fileno=part["control"]))
    os._exit(0)


if __name__ == "__main__":
    main()
