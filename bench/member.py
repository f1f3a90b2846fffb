"""A member of a group that is a process of its own, for benchmarks whose peers come and go.

Such a process reads commands as lines of JSON and writes what happens as such lines, each with the time,
which all processes of a machine share.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from typing import Any, TypeVar

import trio

from mycel.compute.collective.mover import RingMover
from mycel.node.host import Host
from mycel.node.lanes import LaneOptions, SocketLanes
from mycel.node.tcp import TcpNetwork
from mycel.protocol.errors import MycelError
from mycel.protocol.keys import OwnKey
from mycel.protocol.mesh import Access
from mycel.protocol.rpc import Rpc

REDIAL_S = 0.3
LANE_OPTIONS = LaneOptions(host="127.0.0.1")

HostKind = TypeVar("HostKind", bound=Host)


def say(**what: Any) -> None:
    """A line to the bench, with the time."""
    print(json.dumps({"t": time.monotonic(), **what}), flush=True)


def new_host(kind: type[HostKind]) -> HostKind:
    """A node of `kind` under a key of its own, on any free port of this machine."""
    listen = ["/ip4/127.0.0.1/tcp/0"]
    return kind(TcpNetwork(), OwnKey(os.urandom(32)), listen=listen, default_access=Access.MEMBER)


class Member:
    """The node on a socket, and whom it knows. Parts of it can be given, to stand in for the usual ones."""

    def __init__(
        self, host: Host | None = None, rpc: Rpc | None = None, lanes: SocketLanes | None = None
    ) -> None:
        self.known: dict[str, tuple[int, str]] = {}
        """The peers there are: number and address."""
        self.host = host or new_host(Host)
        self.rpc = rpc or Rpc(self.host)
        self.lanes = lanes or SocketLanes(self.host, self.rpc, LANE_OPTIONS)
        self.mover = RingMover(self.host, self.lanes)

    async def start(self, nursery: trio.Nursery) -> None:
        """Run, and say who this is and where."""
        for service in (self.host.run, self.rpc.run, self.lanes.run, self.mover.run):
            await nursery.start(service)
        say(id=str(self.host.peer_id), address=str(self.host.listen_addrs[0]))

    async def redial(self) -> None:
        """Be connected to everybody there is."""
        while True:
            for peer, (_, address) in list(self.known.items()):
                if peer != self.host.peer_id and peer not in self.host.peers:
                    with contextlib.suppress(MycelError):
                        await self.host.connect([address], timeout=1)
            await trio.sleep(REDIAL_S)
