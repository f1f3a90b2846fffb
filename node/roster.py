"""Who is connected: one `Peering` per peer, the public view of them, and news of changes."""

from __future__ import annotations

from collections import OrderedDict

import trio

from mycel.node.link import Link
from mycel.node.news import News
from mycel.node.peering import Peering
from mycel.protocol import yamux
from mycel.protocol.errors import ConnectionLost
from mycel.protocol.identify import Identity
from mycel.protocol.mesh import Access, PeerDown, PeerId, PeerInfo, PeerUp

WINDOWS_MAX = 4096
"""Peers whose learned receive window is remembered."""


class Roster:
    """The connected peers of one node."""

    def __init__(self, own: PeerId, news: News) -> None:
        self._own = own
        self._news = news
        self._peerings: dict[PeerId, Peering] = {}
        self._windows: OrderedDict[PeerId, int] = OrderedDict()
        self.peers: dict[PeerId, PeerInfo] = {}
        """Peers that are up."""
        self.changed = trio.lowlevel.ParkingLot()
        """Unparked whenever a link opens, drains or ends, or a peer settles."""

    def get(self, peer: PeerId) -> Peering | None:
        """The peer's peering, up or not."""
        return self._peerings.get(peer)

    def primary(self, peer: PeerId) -> Link:
        """The link for new streams to `peer`. Raises `ConnectionLost` where it is not connected."""
        peering = self._peerings.get(peer)
        if peering is None:
            raise ConnectionLost(f"not connected to {peer}; connect first", reason="closed")
        return peering.primary

    def add(self, link: Link) -> Peering:
        """A link's peer is proven."""
        peering = self._peerings.get(link.peer)
        if peering is None:
            peering = self._peerings[link.peer] = Peering(self._own, link.peer)
        peering.add(link)
        self._refresh(peering)
        self.changed.unpark_all()
        return peering

    def settle(self, peering: Peering, access: Access) -> None:
        """The peer's role is known: it is up."""
        if peering.up or self._peerings.get(peering.peer) is not peering:
            return
        peering.up = True
        peering.gate.access = access
        self._refresh(peering)
        self._news.tell(PeerUp(peering.peer, access))
        peering.gate.settle(access)
        self.changed.unpark_all()

    def identified(self, peering: Peering, said: Identity) -> None:
        """The peer told about itself."""
        peering.identity = said
        self._refresh(peering)

    def refresh(self, link: Link) -> None:
        """Something about the peer's links changed."""
        peering = self._peerings.get(link.peer)
        if peering is not None:
            self._refresh(peering)
            self.changed.unpark_all()

    def remove(self, link: Link, lost: ConnectionLost) -> None:
        """A link ended; the last one takes the peer down."""
        self.changed.unpark_all()
        if link.key is None:
            return
        peering = self._peerings.get(link.peer)
        if peering is None or link not in peering.links:
            return
        peering.links.remove(link)
        self._remember(link)
        if lost.reason == "left":
            peering.goodbye = lost
        if peering.links:
            self._refresh(peering)
            if not link.superseded and all(other.draining for other in peering.links):
                peering.goodbye = peering.goodbye or lost
                for other in list(peering.links):  # they open no streams, and keep others from dialling
                    other.end("closed", "the connection that took over from it is lost")
            return
        del self._peerings[peering.peer]
        if peering.up:
            del self.peers[peering.peer]
            lost = peering.goodbye or lost
            self._news.tell(PeerDown(peering.peer, lost.reason, str(lost)))

    def window(self, peer: PeerId | None) -> int:
        """The receive window that `peer` filled on an earlier connection, in bytes."""
        return yamux.INITIAL_WINDOW if peer is None else self._windows.get(peer, yamux.INITIAL_WINDOW)

    def _remember(self, link: Link) -> None:
        if link.window > yamux.INITIAL_WINDOW:
            self._windows[link.peer] = link.window
            self._windows.move_to_end(link.peer)
            if len(self._windows) > WINDOWS_MAX:
                self._windows.popitem(last=False)

    def _refresh(self, peering: Peering) -> None:
        if peering.up and peering.links:
            self.peers[peering.peer] = peering.info()
