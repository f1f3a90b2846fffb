"""News that one neighbour has not been told: which authors, and from where on.

A neighbour that takes its time gets the latest state of each document once, not every step of it, and is not
told what it told this node itself. Where it answers that it knew an author's news already, that author's
following news does not go this way for a while: what remains are the ways by which news came first, a tree
for each author. So it is in Plumtree (Leitao, Pereira, Rodrigues, "Epidemic Broadcast Trees", 2007); what a
broken branch misses is found here by comparing, and goes every way from there.
"""

from __future__ import annotations

import math

import trio

from mycel.dht.doc.library import Library
from mycel.dht.doc.message import NOWHERE, Part, Version
from mycel.protocol.limits_doc import DocumentLimits
from mycel.protocol.mesh import PeerId


class Outbox:
    """What a neighbour should be told."""

    def __init__(self, library: Library, limits: DocumentLimits) -> None:
        self._library = library
        self._bytes_max = limits.reply_bytes
        self._quiet_s = limits.quiet_s
        self._quiet_until: dict[PeerId, float] = {}
        self._waiting: dict[PeerId, Version] = {}
        self._known: dict[PeerId, Version] = {}
        self._news = trio.Event()

    def put(self, author: PeerId, before: Version, *, even_if_quiet: bool = False) -> None:
        """`author`'s document went on from `before`."""
        if self._quiet_until.get(author, -math.inf) > trio.current_time() and not even_if_quiet:
            return
        self._waiting.setdefault(author, before)
        self._news.set()

    def has(self, author: PeerId, version: Version) -> None:
        """The neighbour is there with `author`."""
        self._known[author] = max(self._known.get(author, NOWHERE), version)

    def knew(self, author: PeerId) -> None:
        """The neighbour hears of `author` sooner from others."""
        self._quiet_until[author] = trio.current_time() + self._quiet_s

    def speak_again(self) -> None:
        """Who is connected with whom changed: branches may be broken."""
        self._quiet_until.clear()

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
            found = self._library.since(author, begin)
            self.has(author, self._library.version(author))
            size += sum(part.size for part in found)
            parts += found
        if not self._waiting:
            self._news = trio.Event()
        return parts
