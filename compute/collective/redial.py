"""Members that are not connected are dialled, where they last said that they listen.

A peer says so a moment after it is up, and the mesh tells nobody when it has: it is looked again whenever
that peer says something.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import trio

from mycel.compute.collective.epoch import Epoch
from mycel.protocol.errors import MycelError
from mycel.protocol.limits_group import GroupLimits
from mycel.protocol.mesh import Mesh, PeerDown, PeerId


class Redial:
    """Knows where a group's peers listen. `on_miss` is called for whoever was dialled in vain."""

    def __init__(self, mesh: Mesh, limits: GroupLimits, on_miss: Callable[[PeerId], None]) -> None:
        self._mesh = mesh
        self._limits = limits
        self._on_miss = on_miss
        self._addresses: OrderedDict[PeerId, tuple[str, ...]] = OrderedDict()
        self._dialled: dict[PeerId, None] = {}

    def note(self, peer: PeerId, *, anew: bool = False) -> None:
        """Remember where a connected peer listens; `anew`: also where that is known."""
        info = self._mesh.peers.get(peer) if anew or peer not in self._addresses else None
        if info is None or not info.listen_addrs:
            return
        self._addresses[peer] = tuple(str(addr) for addr in info.listen_addrs)
        self._addresses.move_to_end(peer)
        while len(self._addresses) > self._limits.members:
            self._addresses.popitem(last=False)

    def lost(self, event: PeerDown, epoch: Epoch | None, nursery: trio.Nursery | None) -> None:
        """A connection broke. Who left is not there any more; others may be."""
        if event.reason == "left":
            self._addresses.pop(event.peer, None)
        elif epoch is not None:
            self.dial(epoch, nursery)

    def dial(self, epoch: Epoch, nursery: trio.Nursery | None) -> None:
        """Dial members that are not connected and have said where they listen, in `nursery`."""
        for peer in epoch.peers:
            addrs = self._addresses.get(peer, ())
            if addrs and peer not in self._mesh.peers and peer not in self._dialled and nursery is not None:
                self._dialled[peer] = None
                nursery.start_soon(self._dial, peer, addrs)

    async def _dial(self, peer: PeerId, addrs: tuple[str, ...]) -> None:
        try:
            await self._mesh.connect(addrs, timeout=self._limits.patience_s)
        except MycelError:  # it is gone, then
            self._on_miss(peer)
        finally:
            del self._dialled[peer]
