"""From where on a node asks for each author, where that is not simply how far its document is here.

Two kinds of authors are different. One whose document here does not lead to what others have (its author
lost a disk, or signed twice) is asked for as a whole. One whose document was refused for the author's sake,
or for want of room, is not asked for again until it went on, or until things may have changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mycel.dht.doc.message import NOWHERE, Head, Version, bucket_of
from mycel.protocol.mesh import PeerId

AGAIN_S = 600.0
"""After so long a refused document is asked for again: clocks are set right, and room is made."""


class Wanted:
    """The exceptions of one node, at most `most` of each kind. Times are seconds of any clock."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._torn: dict[PeerId, None] = {}
        self._left: dict[PeerId, tuple[Version, float]] = {}

    @property
    def torn(self) -> Sequence[PeerId]:
        """Authors to be asked for as a whole."""
        return list(self._torn)

    def tear(self, author: PeerId) -> None:
        """What was sent as missing does not continue what is here."""
        self._torn[author] = None
        _bound(self._torn, self._most)

    def mend(self, authors: Sequence[PeerId]) -> None:
        """These were asked for as a whole, whatever came of it."""
        for author in authors:
            self._torn.pop(author, None)

    def leave(self, head: Head, now: float) -> None:
        """A document was refused for its author's sake, or for want of room."""
        self._left.pop(head.author, None)
        self._left[head.author] = (head.version, now + AGAIN_S)
        _bound(self._left, self._most)

    def of(self, held: Mapping[PeerId, Version], buckets: Sequence[int], now: float) -> dict[PeerId, Version]:
        """What to ask with, where `held` is what is here of `buckets`."""
        asked = {author: version for author, version in held.items() if author not in self._torn}
        for author, (version, until) in self._left.items():
            if now < until and author not in self._torn and bucket_of(author) in buckets:
                asked[author] = max(version, held.get(author, NOWHERE))
        return asked

    def lets_in(self, author: PeerId, offered: Version, now: float) -> bool:
        """Whether a document that is so far is worth having."""
        version, until = self._left.get(author, (NOWHERE, now))
        return offered > version or until <= now


def _bound(kept: dict[PeerId, Any], most: int) -> None:
    while len(kept) > most:
        del kept[next(iter(kept))]
