"""One peer of bench/churn.py, a process of its own: a node on a socket, and eight reduces that never end.

Reads lines of JSON, the peers there are (`{"peers": {id: [number, address]}}`), and connects to all of them,
again and again. Writes a line for each reduce that ended: its name, its contributors, a digest of the result
and whether every item of it is the sum of the contributors' numbers.
"""

from __future__ import annotations

import hashlib
import json
import sys

import numpy as np
import trio
from member import Member, say

from mycel.compute.collective.outcome import Fenced, GroupClosed
from mycel.compute.collective.policy import Policy
from mycel.compute.collective.service import Group

TAGS = 8
ITEMS = 1 << 18


class Peer(Member):
    """A member that never rests."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
        self.group = Group(self.host, self.rpc, self.mover, "churn", Policy(quorum="any"))

    async def run(self) -> None:
        """Until the process ends, or its input."""
        async with trio.open_nursery() as nursery:
            await self.start(nursery)
            await nursery.start(self.group.run)
            nursery.start_soon(self.redial)
            for tag in range(TAGS):
                nursery.start_soon(self.reduce, tag)
            while line := await trio.to_thread.run_sync(sys.stdin.readline):
                self.known = json.loads(line)["peers"]
            nursery.cancel_scope.cancel()

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
