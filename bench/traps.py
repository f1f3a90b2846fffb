"""Places at which a member of a group can be made to die, in the very phase: for bench/kills_far.py.

The phases show at the seams that the group's own code uses: the mesh below it, its calls, the lanes, the
mover. Each is stood in for by one that does the same and, where a trap is set, springs it there. What the
group, the shared state and the lanes do is production code and knows nothing of this.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import trio
from member import say

from mycel.compute.collective.attempt import Array, Attempt, Mover, Rule, Staged
from mycel.compute.collective.epoch import Accept, Bundle, Hello, News, Prepare, Vote
from mycel.compute.collective.ring import SUM
from mycel.node.host import Host
from mycel.node.lanes import SocketLanes
from mycel.protocol.lane import PART, Body, Head, Taker
from mycel.protocol.mesh import PeerId
from mycel.protocol.method import Call, Method
from mycel.protocol.rpc import Rpc

TOLD = {"vote-told": Vote, "prepare-told": Prepare, "accept-told": Accept, "news-told": News, "knock": Hello}
"""Traps that spring when a message of this kind has come to one member, and not to any other."""
SMALL_BYTES = 32 * 1024
"""Parts up to this are not what a phase is known by."""


@dataclass(frozen=True)
class Step:
    """What happens at a place when it is passed for the `count`th time."""

    at: str
    count: int = 1
    do: str = "kill"
    """"kill" and "stop" (SIGKILL, SIGSTOP) this process; "cut" its connections."""
    also: tuple[int, ...] = ()
    """Processes that are killed in the same moment."""
    wait_s: float = 0.0
    """How long a task waits there first, so that the others are further."""


@dataclass
class Trap:
    """Steps, one after the other. Places are passed in any thread."""

    cut: Callable[[], None]
    steps: deque[Step] = field(default_factory=deque)
    passed: int = 0
    turn: threading.Lock = field(default_factory=threading.Lock)

    def set(self, steps: list[dict[str, Any]]) -> None:
        """From now on these."""
        with self.turn:
            self.steps = deque(Step(**step) for step in steps)
            self.passed = 0

    def is_set(self, at: str) -> bool:
        """Whether this is the place of the next step."""
        return bool(self.steps) and self.steps[0].at == at

    async def wait(self, at: str) -> None:
        """A task is about to pass this place."""
        if self.is_set(at):
            await trio.sleep(self.steps[0].wait_s)

    def spring(self, at: str) -> None:
        """This place is passed."""
        if not self.is_set(at):
            return
        with self.turn:
            if not self.is_set(at):
                return
            self.passed += 1
            if self.passed < self.steps[0].count:
                return
            step = self.steps.popleft()
            self.passed = 0
        if step.do == "cut":
            say(cut=at)
            self.cut()
            return
        line = json.dumps({"t": time.monotonic(), "fell": at})
        os.write(1, line.encode() + b"\n")  # not through a buffer that another thread may be writing to
        for other in step.also:
            os.kill(other, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGSTOP if step.do == "stop" else signal.SIGKILL)


class TrapHost(Host):
    """A mesh that is trapped where it dials, and when it has."""

    trap: Trap

    async def connect(self, addrs: Any, *, timeout: float | None = None) -> PeerId:
        """See `Mesh.connect`."""
        self.trap.spring("dial")
        peer = await super().connect(addrs, timeout=timeout)
        self.trap.spring("dialled")
        return peer


class TrapRpc(Rpc):
    """Calls that are trapped when one member was told something, and around a state's chunks."""

    trap: Trap
    _first: PeerId | None = None

    async def call(self, peer: PeerId, method: Any, request: Any, **more: Any) -> Any:
        """See `Rpc.call`."""
        told = isinstance(request, Bundle)
        if told:
            for at, kind in TOLD.items():
                if self.trap.is_set(at) and any(isinstance(m, kind) for m in request.messages):
                    await self._tell_one(at, peer, method, request, **more)
        answer = await super().call(peer, method, request, **more)
        if method.name.startswith("state.get/"):
            self.trap.spring("state-receiver")
        return answer

    async def _tell_one(self, at: str, peer: PeerId, method: Any, request: Any, **more: Any) -> None:
        if self._first not in (None, peer):
            await trio.sleep_forever()  # the trap springs before the others hear of it
        self._first = peer
        await self.trap.wait(at)
        await super().call(peer, method, request, **more)
        self.trap.spring(at)

    def serve(self, method: Method[Any, Any], handler: Any, *, inline: bool = False) -> None:
        """See `Rpc.serve`."""
        super().serve(method, self._trapped(method.name, handler), inline=inline)

    def _trapped(self, name: str, handler: Any) -> Any:
        def take(call: Call, bundle: Bundle) -> None:
            for message in bundle.messages:
                if isinstance(message, News) and self._own in message.epochs[-1].peers:
                    self.trap.spring("admitted")
            handler(call, bundle)

        async def give(call: Call, ask: Any) -> Any:
            self.trap.spring("state-sender")
            return await handler(call, ask)

        if name.startswith("group/"):
            return take
        return give if name.startswith("state.get/") else handler


class TrapTaker:
    """Takes pieces of arrays, and is trapped at them."""

    def __init__(self, taker: Taker, trap: Trap) -> None:
        self._taker = taker
        self._trap = trap

    def take(self, peer: PeerId, head: Head, body: Body) -> None:
        """See `Taker.take`."""
        if head.kind == PART and head.length > SMALL_BYTES:
            self._trap.spring("reduce-scatter" if head.phase == SUM else "all-gather")
        self._taker.take(peer, head, body)

    def lost(self, peer: PeerId, why: str) -> None:
        """See `Taker.lost`."""
        self._taker.lost(peer, why)


class TrapLanes(SocketLanes):
    """Lanes whose taker is trapped."""

    trap: Trap

    def attach(self, taker: Taker) -> None:
        """See `Lanes.attach`."""
        super().attach(TrapTaker(taker, self.trap))


class TrapStaged:
    """A result that is held back, trapped before it is kept."""

    def __init__(self, staged: Staged, trap: Trap) -> None:
        self._staged = staged
        self._trap = trap

    def keep(self) -> None:
        """See `Staged.keep`."""
        self._trap.spring("commit")
        self._staged.keep()

    def drop(self) -> None:
        """See `Staged.drop`."""
        self._staged.drop()
        say(attempt="dropped")


class TrapMover:
    """A mover that says what becomes of its all-reduces, and is trapped at their beginning and end."""

    def __init__(self, mover: Mover, trap: Trap, own: Callable[[Array], bool]) -> None:
        """`own`: whether an array holds what this member puts in."""
        self._mover = mover
        self._trap = trap
        self._own = own

    def __getattr__(self, name: str) -> Any:
        return getattr(self._mover, name)

    async def all_reduce(
        self, attempt: Attempt, array: Array, rule: Rule, into: Array | None = None
    ) -> Staged:
        """See `Mover.all_reduce`."""
        began = time.monotonic()
        self._trap.spring("begin")
        say(attempt="begun", at=began, epoch=attempt.epoch, restored=self._own(array))
        async with self._told_if_failed():
            staged = await self._mover.all_reduce(attempt, array, rule, into)
            await self._trap.wait("vote")
        self._trap.spring("vote")
        return TrapStaged(staged, self._trap)

    @asynccontextmanager
    async def _told_if_failed(self) -> AsyncIterator[None]:
        try:
            yield
        except BaseException as error:  # why: an attempt that is cancelled has failed too; raised again
            say(attempt="failed", why=f"{type(error).__name__}: {error}"[:200])
            raise
