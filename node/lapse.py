"""Ends connections whose peer's membership has ended since it was shown.

A chain is judged when a connection settles; a connection may live longer. Who has a newer chain by then is
back at once with it, anybody else is refused and told why.
"""

from __future__ import annotations

import logging

import trio

from mycel.protocol.membership import Membership
from mycel.protocol.mesh import Mesh

log = logging.getLogger("mycel.node")

LOOK_S = 10.0
"""Between two looks: little beside the tolerance for clocks that differ."""


async def end_lapsed(membership: Membership, mesh: Mesh) -> None:
    """Disconnect peers whose chain has ended, until cancelled."""
    while True:
        await trio.sleep(LOOK_S)
        for peer in membership.expired(mesh.peers):
            log.info("the membership of %s has ended", peer)
            mesh.disconnect(peer, "the membership that you showed has ended; it takes a newer one to go on")
