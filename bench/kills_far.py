"""One member of bench/kills.py, a process of its own: it does as it is told, and dies where a trap is set.

Commands, each a line of JSON with one word:

    {"peers": {id: [number, address]}}      who there is; it connects to all of them, again and again
    {"join": {"group", "quorum", "admits", "founds"}}     leave the group it is in, and want into this one
    {"meet": [ids]}                         say so once the group's epoch has just these members
    {"trap": [{"at", "count", "do", "also"}]}             see bench/traps.py
    {"reduce": times}                       sum arrays of 32 MB, so often
    {"sync": value}                         share a state of 24 MB, which holds `value` here before
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from functools import partial
from typing import Any

import numpy as np
import trio
from member import LANE_OPTIONS, Member, new_host, say
from traps import Trap, TrapHost, TrapLanes, TrapMover, TrapRpc

from mycel.compute.collective.attempt import Array
from mycel.compute.collective.inventory import root_of, take_stock
from mycel.compute.collective.outcome import Fenced, GroupClosed, OperationRefused
from mycel.compute.collective.policy import Policy
from mycel.compute.collective.service import Group
from mycel.compute.collective.state import SharedState, StateLost
from mycel.protocol.mesh import PeerDown

ITEMS = 8 << 20
STATE_ITEMS = 6 << 20
PATTERN = 1021
"""Items repeat after so many; all sums of them are whole numbers that float32 holds."""
LOOK_S = 0.02


class Victim(Member):
    """A member with traps."""

    def __init__(self, number: int) -> None:
        self.number = number
        host = new_host(TrapHost)
        self.trap = host.trap = Trap(self.cut)
        rpc = TrapRpc(host)
        rpc.trap = self.trap
        lanes = TrapLanes(host, rpc, LANE_OPTIONS)
        lanes.trap = self.trap
        super().__init__(host, rpc, lanes)
        self.trapped = TrapMover(self.mover, self.trap, self.is_own)
        self.numbers = {str(host.peer_id): number}
        self.pattern = (np.arange(ITEMS) % PATTERN).astype(np.float32)
        self.own = self.pattern * number
        self.array = self.own.copy()
        self.group: Group | None = None
        self.shared: SharedState | None = None
        self.scope = trio.CancelScope()
        self.token: trio.lowlevel.TrioToken | None = None

    def cut(self) -> None:
        """End all connections, soon, as a router does that restarts."""
        assert self.token is not None
        for peer in list(self.host.peers):
            self.token.run_sync_soon(self.host.disconnect, peer, "a router restarts")

    def is_own(self, array: Array) -> bool:
        """Whether it holds what this member puts in."""
        return bool(np.array_equal(array, self.own))

    async def run(self) -> None:
        """Until the process ends, or its input."""
        self.token = trio.lowlevel.current_trio_token()
        async with trio.open_nursery() as nursery:
            await self.start(nursery)
            await nursery.start(self.mourn)
            nursery.start_soon(self.redial)
            while line := await trio.to_thread.run_sync(sys.stdin.readline):
                for word, what in json.loads(line).items():
                    await self.obey(nursery, word, what)
            nursery.cancel_scope.cancel()

    async def obey(self, nursery: trio.Nursery, word: str, what: Any) -> None:
        """One command."""
        match word:
            case "peers":
                self.known = what
                self.numbers.update((peer, number) for peer, (number, _) in what.items())
            case "join":
                self.scope.cancel()
                self.scope = trio.CancelScope()
                await nursery.start(partial(self.join, self.scope, **what))
            case "meet":
                nursery.start_soon(self.meet, sorted(what))
            case "trap":
                self.trap.set(what)
            case "reduce":
                nursery.start_soon(self.reduce, what)
            case "sync":
                nursery.start_soon(self.sync, what)

    async def join(
        self, scope: trio.CancelScope, group: str, quorum: Any, admits: Any, founds: bool, task_status: Any
    ) -> None:
        """Be in a group until the scope is cancelled."""
        with scope:
            policy = Policy(quorum, admits, founds=founds)
            self.group = Group(self.host, self.rpc, self.trapped, group, policy)
            async with trio.open_nursery() as nursery:
                await nursery.start(self.group.run)
                if admits == "border":
                    self.shared = SharedState(self.group, self.rpc)
                    await nursery.start(self.shared.run)
                task_status.started()
                say(joined=group)
                await trio.sleep_forever()

    async def meet(self, who: list[str]) -> None:
        """Say when they are the group."""
        assert self.group is not None
        while self.group.epoch is None or sorted(self.group.epoch.peers) != who:  # noqa: ASYNC110 - from outside
            await trio.sleep(LOOK_S)
        say(met=self.group.epoch.peers, epoch=self.group.epoch.number)

    async def mourn(self, *, task_status: Any) -> None:
        """Say who is lost."""
        async with self.host.events() as events:
            task_status.started()
            async for event in events:
                if isinstance(event, PeerDown):
                    say(down=event.peer, reason=event.reason)

    async def reduce(self, times: int) -> None:
        """Sum arrays."""
        assert self.group is not None
        for _ in range(times):
            np.copyto(self.array, self.own)
            try:
                outcome = await self.group.all_reduce(self.array, op="sum", tag="x")
            except (Fenced, GroupClosed, OperationRefused) as error:
                say(result=type(error).__name__, why=str(error), right=self.is_own(self.array))
                return
            at = time.monotonic()
            total = sum(self.numbers[peer] for peer in outcome.contributors)
            right = bool(np.array_equal(self.array, self.pattern * np.float32(total)))
            digest = await trio.to_thread.run_sync(lambda: hashlib.sha256(self.array.data).hexdigest())
            say(
                result="kept",
                at=at,
                of=outcome.contributors,
                name=outcome.name,
                attempts=outcome.attempts,
                right=right,
                sha256=digest,
            )

    async def sync(self, value: float) -> None:
        """Share a state."""
        assert self.shared is not None
        state = {"big": np.full(STATE_ITEMS, value, np.float32), "small": np.arange(7)}
        try:
            synced = await self.shared.sync(state)
        except (Fenced, GroupClosed, OperationRefused, StateLost) as error:
            untouched = bool((state["big"] == value).all())
            say(synced=type(error).__name__, why=str(error), untouched=untouched)
            return
        root = root_of(take_stock(state)).hex()
        say(synced="kept", replaced=synced.replaced, behind=synced.behind, of=synced.members, root=root)


if __name__ == "__main__":
    trio.run(Victim(int(sys.argv[1])).run)
