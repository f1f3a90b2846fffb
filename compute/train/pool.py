"""Who can be asked: members that say they take part in a job, followed as they come and go.

Every connected member is asked once (`train.offer`), and again when it comes back, or after a while: its
owner may have offered the data since. Its reason not to take part is logged once. Who loses its connection is
out at once.
"""

from __future__ import annotations

from collections.abc import Callable

import trio

from mycel.compute.train.orders import OFFER, Claim
from mycel.protocol.errors import LimitExceeded, MycelError
from mycel.protocol.limits_train import DEFAULT_FEDERATED_LIMITS, FederatedLimits
from mycel.protocol.mesh import Access, Mesh, PeerDown, PeerId, PeerUp
from mycel.protocol.rpc import Rpc


class Pool:
    """The clients of one job. `run` must be running while it is used."""

    def __init__(
        self,
        mesh: Mesh,
        rpc: Rpc,
        claim: Claim,
        log: Callable[[str], None] = lambda line: None,
        limits: FederatedLimits = DEFAULT_FEDERATED_LIMITS,
    ) -> None:
        self._mesh = mesh
        self._rpc = rpc
        self._claim = claim
        self._log = log
        self._limits = limits
        self._clients: dict[PeerId, None] = {}
        self._asking: dict[PeerId, trio.CancelScope] = {}
        self._said: dict[PeerId, str] = {}
        self._changed = trio.Event()
        self._looked = False

    @property
    def clients(self) -> list[PeerId]:
        """Who takes part and is connected, ordered by id; this node too, if it does."""
        return sorted(self._clients)

    async def wait_changed(self) -> None:
        """Park until somebody comes or goes."""
        await self._changed.wait()

    async def wait_settled(self) -> None:
        """Park until every member that is connected has said whether it takes part, or had time to."""
        while self._asking or not self._looked:
            await self._changed.wait()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Follow members until cancelled."""
        async with trio.open_nursery() as nursery:
            task_status.started()
            nursery.start_soon(self._ask_again, nursery)
            while True:
                try:
                    async with self._mesh.events() as events:
                        self._look(nursery)
                        async for event in events:
                            if isinstance(event, PeerDown):
                                self._out(event.peer)
                            elif isinstance(event, PeerUp) and event.access >= Access.MEMBER:
                                self._begin(nursery, event.peer)
                except LimitExceeded:  # too far behind: look again from the start
                    continue

    def _look(self, nursery: trio.Nursery) -> None:
        members = [peer for peer, info in self._mesh.peers.items() if info.access >= Access.MEMBER]
        for peer in [peer for peer in self._clients if peer not in [*members, self._mesh.peer_id]]:
            self._out(peer)
        for peer in [self._mesh.peer_id, *sorted(members)]:
            self._begin(nursery, peer)
        self._looked = True

    async def _ask_again(self, nursery: trio.Nursery) -> None:
        pause = self._limits.ask_again_s / 32
        while True:
            await trio.sleep(pause)
            self._look(nursery)
            pause = min(2 * pause, self._limits.ask_again_s)

    def _begin(self, nursery: trio.Nursery, peer: PeerId) -> None:
        if peer not in self._clients and peer not in self._asking:
            self._asking[peer] = trio.CancelScope()
            nursery.start_soon(self._ask, peer)

    async def _ask(self, peer: PeerId) -> None:
        said_yes = False
        try:
            with self._asking[peer]:
                await self._rpc.call(peer, OFFER, self._claim, deadline_s=self._limits.call_s)
                said_yes = True
        except MycelError as error:
            if self._said.get(peer) != str(error):
                self._said[peer] = str(error)
                self._log(f"{peer} does not take part: {error}")
            return
        finally:
            del self._asking[peer]
            self._tell()
        if said_yes and (peer == self._mesh.peer_id or peer in self._mesh.peers):
            self._clients[peer] = None
            self._tell()

    def _out(self, peer: PeerId) -> None:
        if peer in self._asking:
            self._asking[peer].cancel()
        if self._clients.pop(peer, 0) is None:
            self._tell()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = trio.Event()
