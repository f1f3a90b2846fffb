"""Models in Kademlia: this node says what it keeps, and meets those who keep what it wants.

The board tells of members in sight. In a swarm where not everybody is connected with everybody, a root alone
leads to whoever provides it, and an announcer that is not connected is looked up and dialled.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from functools import partial

import trio

from mycel.dht.kad.table import Contact
from mycel.node.discovery import Discovery
from mycel.protocol.cid import Cid, cid_text
from mycel.protocol.errors import LimitExceeded, LocalProtocolError, MycelError
from mycel.protocol.mesh import Mesh, PeerId

log = logging.getLogger("mycel.node")

MEET_S = 5.0
"""How long those who keep a model are dialled before what is wanted is asked of those who came."""
MEET_MAX = 8


class Providers:
    """The service."""

    def __init__(self, mesh: Mesh, discovery: Discovery) -> None:
        self._mesh = mesh
        self._discovery = discovery
        self._told: dict[Cid, None] = {}
        self._send, self._receive = trio.open_memory_channel[Cid](math.inf)

    def tell(self, root: Cid) -> None:
        """Say from now on that this node provides `root`."""
        if root not in self._told:
            self._told[root] = None
            self._send.send_nowait(root)

    def withdraw(self, root: Cid) -> None:
        """Say so no more."""
        self._told.pop(root, None)
        self._discovery.kad.unprovide(root)

    async def run(self) -> None:
        """Tell until cancelled; Kademlia tells again by itself."""
        async for root in self._receive:
            if root not in self._told:
                continue
            try:
                count = await self._discovery.kad.provide(root)
            except LocalProtocolError:  # Kademlia ended a moment before this service: the node is ending
                return
            except LimitExceeded as error:
                log.warning("%s is not told of in Kademlia: %s", cid_text(root), error)
                continue
            log.debug("%d peers know that %s is here", count, cid_text(root))

    async def meet(self, root: Cid, announcers: Sequence[PeerId]) -> list[PeerId]:
        """Connect with those who keep something of a model: announcers first, else providers; who they are.

        Takes at most `MEET_S`, and no time where enough of them are connected.
        """
        found = list(announcers)
        with trio.move_on_after(MEET_S):
            if not found:
                contacts = await self._discovery.kad.providers(root, MEET_MAX)
                found = [one.peer for one in contacts]
                meet = [partial(self._dial, one) for one in contacts]
            else:
                meet = [partial(self._look_up, peer) for peer in found]
            apart = [act for act, peer in zip(meet, found, strict=True) if peer not in self._mesh.peers]
            near = len(found) - len(apart)
            async with trio.open_nursery() as nursery:
                for act in apart[: max(0, MEET_MAX - near)]:
                    nursery.start_soon(act)
        return found

    async def _dial(self, contact: Contact) -> None:
        try:
            await self._discovery.kad.asker.connect(contact)
        except MycelError as error:
            log.info("%s, which provides a model, cannot be reached: %s", contact.peer, error)

    async def _look_up(self, peer: PeerId) -> None:
        try:
            await self._discovery.connect(peer)
        except (MycelError, ValueError) as error:
            log.info("%s, which keeps a model, cannot be reached: %s", peer, error)
