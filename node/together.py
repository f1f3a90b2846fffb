"""Groups that this node is in: what a job, or a script of one's own, needs to compute with other peers.

Lanes and the mover are started with the first group and stay: their sockets are worth keeping, and a node
that is in no group opens none, and does not import numpy. Each group lives as long as its `async with` block.

    async with node.together.group("my-run", least=2) as (group, state):
        await state.sync({"weights": weights})
        await group.all_reduce(gradients)
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Protocol

import trio

from mycel.protocol.errors import LocalProtocolError
from mycel.protocol.lane import Lanes
from mycel.protocol.mesh import Mesh
from mycel.protocol.rpc import Rpc

if TYPE_CHECKING:
    from trio._core._run import TaskStatus

    from mycel.compute.collective.mover import RingMover
    from mycel.compute.collective.service import Group
    from mycel.compute.collective.state import SharedState


class RunningLanes(Lanes, Protocol):
    """Lanes that are a service."""

    async def run(self, *, task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Carry until cancelled."""


OpenLanes = Callable[[Mesh, Rpc], RunningLanes]
"""Makes a node's lanes."""


def stream_lanes(mesh: Mesh, rpc: Rpc) -> RunningLanes:
    """Lanes over the mesh's own streams: no further socket, no thread."""
    from mycel.compute.collective.streams import StreamLanes

    return StreamLanes(mesh)


def socket_lanes(bytes_per_s: float) -> OpenLanes:
    """Makes lanes over sockets of their own, with a bound on what the node sends over them; 0 for none."""

    def open_lanes(mesh: Mesh, rpc: Rpc) -> RunningLanes:
        from mycel.node.lanes import LaneOptions, SocketLanes

        return SocketLanes(mesh, rpc, LaneOptions(bytes_per_s=bytes_per_s))

    return open_lanes


class Together:
    """The groups of a node. `run` must be running."""

    def __init__(self, mesh: Mesh, rpc: Rpc, open_lanes: OpenLanes = stream_lanes) -> None:
        self._mesh = mesh
        self._rpc = rpc
        self._open_lanes = open_lanes
        self._mover: RingMover | None = None
        self._starting = trio.Lock()
        self._nursery: trio.Nursery | None = None

    async def run(self, *, task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled."""
        async with trio.open_nursery() as self._nursery:
            task_status.started()
            await trio.sleep_forever()

    @asynccontextmanager
    async def group(
        self, name: str, *, quorum: str = "majority", least: int = 1, founds: bool = True
    ) -> AsyncIterator[tuple[Group, SharedState]]:
        """This node's part in the group `name`, whose members share state; it is joined at borders.

        `quorum` "any" lets a part that is no majority go on; `least` members must be there before anything
        begins; `founds`: begin the group where there is none. Leaves it at the end.
        """
        from mycel.compute.collective.policy import Policy
        from mycel.compute.collective.service import Group
        from mycel.compute.collective.state import SharedState

        if quorum not in ("majority", "any"):
            raise LocalProtocolError(f'quorum {quorum!r} is none: "majority" or "any"')
        policy = Policy("any" if quorum == "any" else "majority", "border", least, founds)
        group = Group(self._mesh, self._rpc, await self._ready(), name, policy)
        state = SharedState(group, self._rpc)
        failure: Exception | None = None
        async with trio.open_nursery() as nursery:
            await nursery.start(group.run)
            await nursery.start(state.run)
            try:
                yield group, state
            except Exception as error:  # boundary: the caller's own; a nursery would wrap it into a group
                failure = error
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure

    async def _ready(self) -> RingMover:
        from mycel.compute.collective.mover import RingMover

        if self._nursery is None:
            raise LocalProtocolError("this node is in no groups before Together.run")
        async with self._starting:
            if self._mover is None:
                lanes = self._open_lanes(self._mesh, self._rpc)
                mover = RingMover(self._mesh, lanes)
                await self._nursery.start(lanes.run)
                await self._nursery.start(mover.run)
                self._mover = mover
        return self._mover
