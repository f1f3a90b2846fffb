"""One peer of bench/churn.py, a process of its own: a node on a socket, and eight reduces that never end.

Reads lines of JSON, the peers there are (`{"peers": {id: [number, address]}}`), and connects to all of them,
again and again. Writes a line for each reduce that ended: its name, its contributors, a digest of the result
and whether every item of it is the sum of the contributors' numbers.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import time
from typing import Any

import numpy as np
import trio

from mycel.compute.collective.mover import RingMover
from mycel.compute.collective.outcome import Fenced, GroupClosed
from mycel.compute.collective.policy import Policy
from mycel.compute.collective.service import Group
from mycel.node.host import Host
from mycel.node.lanes import LaneOptions, SocketLanes
from mycel.node.tcp import TcpNetwork
from mycel.protocol.errors import MycelError
from mycel.protocol.keys import OwnKey
from mycel.protocol.mesh import Access
from mycel.protocol.rpc import Rpc

TAGS = 8
ITEMS = 1 << 18
REDIAL_S = 0.3


def say(**what: Any) -> None:
    """A line to the bench, with the time that all processes of a machine share."""
    print(json.dumps({"t": time.monotonic(), **what}), flush=True)


class Peer:
    """The node, and whom it knows."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.known: dict[str, tuple[int, str]] = {}
        self.host = Host(
            TcpNetwork(),
            OwnKey(os.urandom(32)),
            listen=["/ip4/127.0.0.1/tcp/0"],
            default_access=Access.MEMBER,
        )
        self.rpc = Rpc(self.host)
        self.lanes = SocketLanes(self.host, self.rpc, LaneOptions(host="127.0.0.1"))
        self.mover = RingMover(self.host, self.lanes)
        self.group = Group(self.host, self.rpc, self.mover, "churn", Policy(quorum="any"))

    async def run(self) -> None:
        """Until the process ends, or its input."""
        async with trio.open_nursery() as nursery:
            for service in (self.host.run, self.rpc.run, self.lanes.run, self.mover.run, self.group.run):
                await nursery.start(service)
            say(id=str(self.host.peer_id), address=str(self.host.listen_addrs[0]))
            nursery.start_soon(self.redial)
            for tag in range(TAGS):
                nursery.start_soon(self.reduce, tag)
            while line := await trio.to_thread.run_sync(sys.stdin.readline):
                self.known = json.loads(line)["peers"]
            nursery.cancel_scope.cancel()

    async def redial(self) -> None:
        """Be connected to everybody there is."""
        while True:
            for peer, (_, address) in list(self.known.items()):
                if peer != self.host.peer_id and peer not in self.host.peers:
                    with contextlib.suppress(MycelError):
                        await self.host.connect([address], timeout=1)
            await trio.sleep(REDIAL_S)

    async def reduce(self, tag: int) -> None:
        """Sum arrays for ever; sizes differ from tag to tag."""
        array = np.empty(ITEMS >> tag % 4, np.float32)
        while True:
            array[:] = self.number
            try:
                outcome = await self.group.all_reduce(array, op="sum", tag=f"t{tag}")
            except (Fenced, GroupClosed):
                untouched = bool((array == self.number).all())
                say(fenced=True, untouched=untouched)
                await trio.sleep(0.05)
                continue
            first = float(array[0])
            say(
                name=outcome.name,
                of=outcome.contributors,
                sum=first if bool((array == first).all()) else None,
                digest=hashlib.blake2b(array.data, digest_size=8).hexdigest(),
                attempts=outcome.attempts,
            )


if __name__ == "__main__":
    trio.run(Peer(int(sys.argv[1])).run)
