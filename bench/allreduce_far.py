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
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import trio

from mycel.compute.collective.attempt import Attempt, Rule, Staged
from mycel.compute.collective.mover import RingMover
from mycel.node.host import Host
from mycel.node.lanes import LaneOptions, SocketLanes
from mycel.node.tcp import TcpNetwork
from mycel.protocol.keys import OwnKey
from mycel.protocol.mesh import Access, PeerId
from mycel.protocol.rpc import Rpc

CODECS = {"int8": "int8", "int4": "int4"}
"""Ways that quantize; the others send items as they are."""


class Side:
    """A node of this process: host, calls, lanes, mover."""

    def __init__(self, encryption: str) -> None:
        self.host = Host(
            TcpNetwork(),
            OwnKey(os.urandom(32)),
            listen=["/ip4/127.0.0.1/tcp/0"],
            default_access=Access.MEMBER,
        )
        rpc = Rpc(self.host)
        self.lanes = SocketLanes(self.host, rpc, LaneOptions(host="127.0.0.1", encryption=encryption))  # type: ignore[arg-type]
        self.mover = RingMover(self.host, self.lanes)
        self.rpc = rpc
        self.order: tuple[PeerId, ...] = ()
        self.number = 0
        self.agreed: Staged | None = None

    async def start(self, nursery: trio.Nursery) -> str:
        """Run; returns the address."""
        for service in (self.host.run, self.rpc.run, self.lanes.run, self.mover.run):
            await nursery.start(service)
        return str(self.host.listen_addrs[0])

    async def meet(self, addrs: list[str], own: int) -> None:
        """Connect with the members before this one."""
        for addr in addrs[:own]:
            await self.host.connect([addr])
        self.order = tuple(PeerId(addr.rsplit("/", 1)[1]) for addr in addrs)

    async def reduce(
        self, array: np.ndarray[Any, Any], into: np.ndarray[Any, Any] | None, codec: str | None
    ) -> None:
        """An average and a vote, as a group does them: the inputs are there until all have agreed."""
        self.number += 1
        attempt = Attempt("bench", 1, bytes(8), "array", self.number, self.order)
        staged = await self.mover.all_reduce(attempt, array, Rule("float32", "avg", codec), into)
        vote = np.ones(1, np.int8)
        agreed = await self.mover.all_reduce(
            Attempt("bench", 1, bytes(8), "vote", self.number, self.order), vote, Rule("int8", "min")
        )
        assert vote[0] == 1
        if self.agreed is not None:
            self.agreed.keep()  # the one before: of this one nobody knows yet whether all have it
        self.agreed = agreed
        staged.keep()


async def serve(rank: int, members: int, port: int) -> None:
    """Answer commands."""
    sides = {"encrypted": Side("aes-128-gcm"), "plain": Side("none")}
    generator = np.random.default_rng(rank)
    arrays: dict[int, list[np.ndarray[Any, Any]]] = {}

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
            assert np.array_equal(array, base), "the input was not preserved"
        result = array if way in ("gloo", "in_place") else into
        return {"s": seconds, "sha256": hashlib.sha256(result.data).hexdigest()}

    async with trio.open_nursery() as nursery:
        addrs = {name: await side.start(nursery) for name, side in sides.items()}
        print(json.dumps(addrs), flush=True)
        everybody = json.loads(await trio.to_thread.run_sync(sys.stdin.readline))
        for name, side in sides.items():
            await side.meet(everybody[name], rank)
        place = f"tcp://127.0.0.1:{port}"
        begin = partial(dist.init_process_group, "gloo", init_method=place, rank=rank, world_size=members)
        await trio.to_thread.run_sync(begin)
        print("{}", flush=True)
        while line := await trio.to_thread.run_sync(sys.stdin.readline):
            print(json.dumps(await measure(**json.loads(line))), flush=True)
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(serve, *map(int, sys.argv[1:4]))
