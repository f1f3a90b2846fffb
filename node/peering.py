"""Everything about one connected peer: its links, its role, and which link new streams take.

Two nodes that dial each other at the same time get two connections; both must give up the same one. Of
links in different directions made at about the same time the one dialed by the smaller peer id stays. Of
links that one side made at about the same time, by dialing several addresses, the first stays; since the two
ends may have seen them open in different orders, the dialer alone gives up the others. Later on the newest
stays, for a peer that dials again has lost the old one. A direct link stays before any relayed one.

The loser is drained, not cut: each side says go-away, serves what is open, and closes once both said so and
no stream is left, or when `Limits.drain_s` is over: long-lived streams see `ConnectionLost` then and are
opened anew on the other link.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from mycel.node.gate import Gate
from mycel.protocol.errors import ConnectionLost
from mycel.protocol.identify import Identity
from mycel.protocol.mesh import Access, PathKind, PeerId, PeerInfo

if TYPE_CHECKING:
    from mycel.node.link import Link

SIMULTANEOUS_S = 10.0
"""Links made within this time may stem from simultaneous dials: a dial and a handshake at their longest."""


class Made(Protocol):
    """What the choice between links looks at."""

    @property
    def dialer(self) -> bool: ...

    @property
    def since(self) -> float: ...

    @property
    def is_relayed(self) -> bool: ...


def choose(links: Sequence[Made], own: PeerId, peer: PeerId) -> int:
    """Index of the link to keep; `links` in the order in which they opened here."""
    best = 0
    for index in range(1, len(links)):
        older, newer = links[best], links[index]
        if older.is_relayed != newer.is_relayed:
            best = index if older.is_relayed else best
            continue
        if newer.since - older.since <= SIMULTANEOUS_S:
            better = older.dialer != newer.dialer and newer.dialer == (own < peer)
        else:
            better = True
        best = index if better else best
    return best


def is_theirs_to_choose(one: Made, other: Made) -> bool:
    """Whether the peer made both links by dialing several addresses at once: it gives one up."""
    at_once = abs(one.since - other.since) <= SIMULTANEOUS_S
    return at_once and not one.dialer and not other.dialer and one.is_relayed == other.is_relayed


class Peering:
    """One connected peer."""

    __slots__ = ("_own", "gate", "goodbye", "identity", "links", "peer", "up")

    def __init__(self, own: PeerId, peer: PeerId) -> None:
        self._own = own
        self.peer = peer
        self.links: list[Link] = []
        self.gate = Gate()
        self.identity: Identity | None = None
        self.goodbye: ConnectionLost | None = None
        """What the peer said when it left on one of its links: why it is gone, however the last one ends."""
        self.up = False
        """Whether others were told of this peer."""

    def add(self, link: Link) -> None:
        """A link to the peer opened; all but one are drained, within bounds."""
        self.links.append(link)
        self.goodbye = None
        keep = self.links[choose(self.links, self._own, self.peer)]
        for other in self.links:
            if other is not keep and not other.superseded and not is_theirs_to_choose(keep, other):
                other.superseded = True
                other.drain(link.since + link.limits.drain_s)

    @property
    def primary(self) -> Link:
        """The link for new streams: the newest one not draining, else the newest."""
        for link in reversed(self.links):
            if not link.draining:
                return link
        return self.links[-1]

    def info(self) -> PeerInfo:
        """What services see."""
        link = self.primary
        said = self.identity
        return PeerInfo(
            peer=self.peer,
            access=self.gate.access if self.gate.access is not None else Access.STRANGER,
            addr=link.remote,
            path=PathKind.RELAYED if link.is_relayed else PathKind.DIRECT,
            agent=said.agent if said else "",
            listen_addrs=said.listen_addrs if said else (),
            protocols=said.protocols if said else (),
            inbound=not link.dialer,
            since=link.since,
        )
