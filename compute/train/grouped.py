"""A group, for a thread beside trio's: `mycel.compute.train.peers.Peers` over `mycel.compute.collective`.

The thread that trains calls and waits; trio's thread does what is asked. Arrays are handed over, not copied:
the caller waits, or has promised not to touch them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Future
from functools import partial
from typing import TypeVar

import trio

from mycel.compute.collective.outcome import Fenced, GroupClosed, Outcome
from mycel.compute.collective.service import Group
from mycel.compute.collective.state import SharedState
from mycel.compute.train.peers import Array, LeftOut, Reduced
from mycel.protocol.errors import MycelError
from mycel.protocol.mesh import PeerId

Result = TypeVar("Result")


class GroupPeers:
    """Made in trio's thread, used in another one. `nursery` runs what is not waited for."""

    def __init__(self, group: Group, state: SharedState, nursery: trio.Nursery) -> None:
        self._group = group
        self._state = state
        self._nursery = nursery
        self._trio = trio.lowlevel.current_trio_token()

    @property
    def count(self) -> int:
        """See `Peers.count`; 0 while this node is outside."""
        epoch = self._group.epoch
        return 0 if epoch is None else len(epoch.members)

    @property
    def members(self) -> list[str]:
        """Their ids in their order, this node's among them; none while it is outside."""
        epoch = self._group.epoch
        return [] if epoch is None else list(epoch.peers)

    def all_reduce(
        self, array: Array, *, op: str = "avg", tag: str = "", codec: str | None = None
    ) -> Reduced:
        """See `Peers.all_reduce`. Raises `OperationRefused` for what cannot be added up, `GroupClosed`."""
        reduce = partial(self._group.all_reduce, array, op=op, tag=tag, codec=codec)
        return _reduced(self._do(reduce))

    def reduce_scatter(
        self, array: Array, *, op: str = "avg", tag: str = "", codec: str | None = None
    ) -> tuple[Reduced, Array]:
        """As `all_reduce`, but each member gets only its part of the result, and `array` stays as it is."""
        outcome, part = self._do(partial(self._group.reduce_scatter, array, op=op, tag=tag, codec=codec))
        return _reduced(outcome), part

    def all_gather(self, part: Array, *, tag: str = "", codec: str | None = None) -> tuple[Reduced, Array]:
        """Every member's `part`, flat, one after the other as in `members`. Raises as `all_reduce`."""
        outcome, whole = self._do(partial(self._group.all_gather, part, tag=tag, codec=codec))
        return _reduced(outcome), whole

    def broadcast(self, array: Array, root: str, *, tag: str = "", codec: str | None = None) -> Reduced:
        """Replace everybody's `array` by that of the member `root`. Raises as `all_reduce`."""
        send = partial(self._group.broadcast, array, PeerId(root), tag=tag, codec=codec)
        return _reduced(self._do(send))

    def barrier(self, *, tag: str = "barrier") -> Reduced:
        """Wait until all members have called it. Raises as `all_reduce`."""
        return _reduced(self._do(partial(self._group.barrier, tag=tag)))

    def begin_all_reduce(
        self, array: Array, *, op: str = "avg", tag: str = "", codec: str | None = None
    ) -> PendingReduction:
        """See `Peers.begin_all_reduce`."""
        pending = PendingReduction()
        reduce = partial(self._group.all_reduce, array, op=op, tag=tag, codec=codec)
        try:
            trio.from_thread.run_sync(
                self._nursery.start_soon, pending.carry_out, reduce, trio_token=self._trio
            )
        except (trio.RunFinishedError, RuntimeError) as error:
            raise GroupClosed("this node has left the group") from error
        return pending

    def is_awaited(self, tag: str) -> bool:
        """See `Peers.is_awaited`."""
        return self._group.is_awaited(tag)

    def sync(self, state: Mapping[str, Array]) -> bool:
        """See `Peers.sync`. Raises `StateLost`, `GroupClosed`."""
        return self._do(partial(self._state.agree, state)).replaced

    def _do(self, what: Callable[[], Awaitable[Result]]) -> Result:
        try:
            return trio.from_thread.run(what, trio_token=self._trio)
        except Fenced as error:
            raise LeftOut(str(error)) from error
        except (trio.RunFinishedError, trio.Cancelled) as error:
            raise GroupClosed("this node has left the group") from error


class PendingReduction:
    """See `Pending`."""

    def __init__(self) -> None:
        self._done: Future[Outcome] = Future()

    async def carry_out(self, reduce: Callable[[], Awaitable[Outcome]]) -> None:
        """In trio's thread: do it, whatever comes of it."""
        try:
            self._done.set_result(await reduce())
        except MycelError as error:
            self._done.set_exception(error)
        except BaseException as error:  # why: whoever waits must not wait for ever; raised again
            self._done.set_exception(GroupClosed(f"this node has left the group: {error!r}"))
            raise

    def wait(self) -> Reduced:
        """See `Pending.wait`. Raises `LeftOut`, `OperationRefused`, `GroupClosed`."""
        try:
            return _reduced(self._done.result())
        except Fenced as error:
            raise LeftOut(str(error)) from error


def _reduced(outcome: Outcome) -> Reduced:
    return Reduced(len(outcome.contributors), outcome.epoch)
