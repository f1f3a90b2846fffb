"""One member of bench/allreduce.py, a process of its own: gloo, and Mycel's nodes with and without ciphers.

Reads commands as lines of JSON, answers each with one; ends when its input ends.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
import trio

from mycel.compute.collective.attempt import Array
from mycel.compute.collective.mover import RingMover
from mycel.compute.collective.policy import Policy
from mycel.compute.collective.service import Group
from mycel.node.host import Host
from mycel.node.lanes import LaneOptions, SocketLanes
from mycel.node.tcp import TcpNetwork
from mycel.protocol.keys import OwnKey
from mycel.protocol.mesh import Access
from mycel.protocol.rpc import Rpc

CODECS = {"int8": "int8", "int4": "int4"}
"""Ways that quantize; the others send items as they are."""


class Side:
    """A node of this process, and its part in a group."""

    def __init__(self, encryption: Literal["aes-128-gcm", "none"], members: int) -> None:
        self.host = Host(
            TcpNetwork(),
            OwnKey(os.urandom(32)),
            listen=["/ip4/127.0.0.1/tcp/0"],
            default_access=Access.MEMBER,
        )
        self._rpc = Rpc(self.host)
        self._lanes = SocketLanes(self.host, self._rpc, LaneOptions("127.0.0.1", encryption=encryption))
        self._mover = RingMover(self.host, self._lanes)
        self._members = members
        self.group: Group | None = None

    async def start(self, nursery: trio.Nursery) -> str:
        """Run; returns the address."""
        for service in (self.host.run, self._rpc.run, self._lanes.run, self._mover.run):
            await nursery.start(service)
        return str(self.host.listen_addrs[0])

    async def meet(self, nursery: trio.Nursery, addrs: list[str], own: int) -> None:
        """Connect with the members before this one, and come together as a group."""
        for addr in addrs[:own]:
            await self.host.connect([addr])
        policy = Policy(least=self._members, founds=own == 0)
        self.group = Group(self.host, self._rpc, self._mover, "bench", policy)
        await nursery.start(self.group.run)
        await self.group.gather_members(self._members)

    async def reduce(self, array: Array, into: Array | None, codec: str | None) -> None:
        """An average, voted on: the input is there until all have agreed."""
        assert self.group is not None
        outcome = await self.group.all_reduce(array, codec=codec, into=into)
        assert len(outcome.contributors) == self._members


async def serve(rank: int, members: int, port: int) -> None:
    """Answer commands."""
    sides = {"encrypted": Side("aes-128-gcm", members), "plain": Side("none", members)}
    generator = np.random.default_rng(rank)
    arrays: dict[int, list[Array]] = {}

    async def measure(way: str, mib: int) -> dict[str, Any]:
        if mib not in arrays:
            arrays.clear()
            base = generator.standard_normal(mib << 18, np.float32) - np.float32(1.0)
            arrays[mib] = [base, base.copy(), np.zeros_like(base)]
        base, array, into = arrays[mib]
        np.copyto(array, base)
        into[...] = 0.0
        tensor = torch.from_numpy(array)
        side = sides["plain" if way == "plain" else "encrypted"]
        dist.barrier()
        began = time.perf_counter()
        if way == "gloo":
            dist.all_reduce(tensor)
            tensor /= members
        else:
            await side.reduce(array, None if way == "in_place" else into, CODECS.get(way))
        seconds = time.perf_counter() - began
        if way not in ("gloo", "in_place"):
            assert await trio.to_thread.run_sync(np.array_equal, array, base), "the input was not preserved"
        result = array if way in ("gloo", "in_place") else into
        digest = await trio.to_thread.run_sync(hashlib.sha256, result.data)  # others may wait for this node
        return {"s": seconds, "sha256": digest.hexdigest()}

    async with trio.open_nursery() as nursery:
        addrs = {name: await side.start(nursery) for name, side in sides.items()}
        print(json.dumps(addrs), flush=True)
        everybody = json.loads(await trio.to_thread.run_sync(sys.stdin.readline))
        for name, side in sides.items():
            await side.meet(nursery, everybody[name], rank)
        place = f"tcp://127.0.0.1:{port}"
        begin = partial(dist.init_process_group, "gloo", init_method=place, rank=rank, world_size=members)
        await trio.to_thread.run_sync(begin)
        print("{}", flush=True)
        while line := await trio.to_thread.run_sync(sys.stdin.readline):
            print(json.dumps(await measure(**json.loads(line))), flush=True)
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(serve, *map(int, sys.argv[1:4]))
