"""Members whose connection broke are dialled again, where they last said that they listen.

A peer says so a moment after it is up, and the mesh tells nobody when it has: it is looked again whenever
that peer says something.
"""

from __future__ import annotations

from collections.abc import Callable

import trio

from mycel.protocol.errors import MycelError
from mycel.protocol.mesh import Mesh, PeerDown, PeerId


class Redial:
    """Knows where a group's peers listen. `on_miss` is called for whoever was dialled in vain."""

    def __init__(self, mesh: Mesh, patience_s: float, on_miss: Callable[[PeerId], None]) -> None:
        self._mesh = mesh
        self._patience_s = patience_s
        self._on_miss = on_miss
        self._addresses: dict[PeerId, tuple[str, ...]] = {}

    def note(self, peer: PeerId, *, anew: bool = False) -> None:
        """Remember where a connected peer listens; `anew`: also where that is known."""
        info = self._mesh.peers.get(peer) if anew or not self._addresses.get(peer) else None
        if info is not None:
            self._addresses[peer] = tuple(str(addr) for addr in info.listen_addrs)

    def begin(self, event: PeerDown, nursery: trio.Nursery | None) -> None:
        """A connection broke: dial that peer in `nursery`, where there is one, unless it left."""
        addrs = self._addresses.pop(event.peer, ())
        if addrs and event.reason != "left" and nursery is not None:
            nursery.start_soon(self._dial, event.peer, addrs)

    async def _dial(self, peer: PeerId, addrs: tuple[str, ...]) -> None:
        try:
            await self._mesh.connect(addrs, timeout=self._patience_s)
        except MycelError:  # it is gone, then
            self._on_miss(peer)
