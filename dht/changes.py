"""What each reader of facts has not read yet."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from mycel.protocol.board import Fact
from mycel.protocol.errors import LocalProtocolError, StreamReset
from mycel.protocol.mesh import PeerId


class Changes:
    """Changes that one reader has not read: the latest of each fact, in the order they were made."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._waiting: dict[tuple[str, PeerId], Fact] = {}
        self._news = trio.Event()
        self._reading = False
        self._ended: Exception | None = None

    def end(self, error: Exception | None) -> None:
        """Raise `error` at the reader, now and from now on."""
        self._ended = error or StreamReset("the peer takes no more facts")
        self._news.set()

    def put(self, change: Fact) -> None:
        """Add a change."""
        if change.key.startswith(self._prefix):
            self._waiting.pop((change.key, change.author), None)
            self._waiting[change.key, change.author] = change
            self._news.set()

    def __aiter__(self) -> AsyncIterator[Fact]:
        return self

    async def __anext__(self) -> Fact:
        if self._reading:
            raise LocalProtocolError("two tasks read one watch")
        self._reading = True
        try:
            while not self._waiting and self._ended is None:
                self._news = trio.Event()
                await self._news.wait()
            if self._ended is not None:
                raise self._ended
            return self._waiting.pop(next(iter(self._waiting)))
        finally:
            self._reading = False


class Watches:
    """The readers of one collection of facts; true while there are any."""

    def __init__(self) -> None:
        self._readers: dict[int, Changes] = {}

    def __bool__(self) -> bool:
        return bool(self._readers)

    def tell(self, change: Fact) -> None:
        """Give `change` to every reader."""
        for reader in self._readers.values():
            reader.put(change)

    @asynccontextmanager
    async def watch(self, prefix: str) -> AsyncIterator[AsyncIterator[Fact]]:
        """Changes under `prefix` from the moment of entering; a slow reader gets the latest of each fact."""
        changes = Changes(prefix)
        self._readers[id(changes)] = changes
        try:
            yield changes
        finally:
            del self._readers[id(changes)]
