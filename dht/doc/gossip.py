"""News that one neighbour has not been told: which authors, and from where on.

A neighbour that takes its time gets the latest state of each document once, not every step of it, and is not
told what it told this node itself.
"""

from __future__ import annotations

import trio

from mycel.dht.doc.message import NOWHERE, Part, Position
from mycel.dht.doc.replica import Replica
from mycel.protocol.mesh import PeerId


class Outbox:
    """What a neighbour should be told."""

    def __init__(self, replica: Replica, bytes_max: int) -> None:
        self._replica = replica
        self._bytes_max = bytes_max
        self._waiting: dict[PeerId, Position] = {}
        self._known: dict[PeerId, Position] = {}
        self._news = trio.Event()

    def put(self, author: PeerId, before: Position) -> None:
        """`author`'s document went on from `before`."""
        self._waiting.setdefault(author, before)
        self._news.set()

    def has(self, author: PeerId, position: Position) -> None:
        """The neighbour is there with `author`."""
        self._known[author] = max(self._known.get(author, NOWHERE), position)

    async def wait(self) -> None:
        """Until there is something to tell."""
        await self._news.wait()

    def take(self) -> list[Part]:
        """What to tell now: as much as goes into one message, at least one document's part."""
        parts: list[Part] = []
        size = 0
        while self._waiting and size < self._bytes_max:
            author = next(iter(self._waiting))
            begin = max(self._waiting.pop(author), self._known.get(author, NOWHERE))
            found = self._replica.since(author, begin)
            self.has(author, self._replica.position(author))
            size += sum(part.size for part in found)
            parts += found
        if not self._waiting:
            self._news = trio.Event()
        return parts
