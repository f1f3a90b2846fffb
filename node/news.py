"""Who came and went, for those who watch: each watcher has a bounded backlog of its own."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import trio

from mycel.protocol.errors import LimitExceeded
from mycel.protocol.mesh import PeerEvent


class _Watcher:
    """One watcher's backlog."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._backlog: deque[PeerEvent] = deque()
        self._lagged = False
        self._lot = trio.lowlevel.ParkingLot()

    def put(self, event: PeerEvent) -> None:
        """Add news; a watcher that lags too far behind loses the backlog and is told so."""
        if len(self._backlog) >= self._limit:
            self._lagged = True
            self._backlog.clear()
        if not self._lagged:
            self._backlog.append(event)
        self._lot.unpark_all()

    def __aiter__(self) -> _Watcher:
        return self

    async def __anext__(self) -> PeerEvent:
        await trio.lowlevel.checkpoint_if_cancelled()
        while not self._backlog:
            if self._lagged:
                raise LimitExceeded(
                    f"this watcher fell more than limits.events = {self._limit} peer events behind; "
                    "watch again and start from Mesh.peers"
                )
            await self._lot.park()
        return self._backlog.popleft()


class News:
    """The watchers of one host."""

    def __init__(self, limit: int) -> None:
        """`limit` is how many events a watcher may lag behind."""
        self._limit = limit
        self._watchers: list[_Watcher] = []

    def tell(self, event: PeerEvent) -> None:
        """Give `event` to every watcher."""
        for watcher in self._watchers:
            watcher.put(event)

    @asynccontextmanager
    async def watch(self) -> AsyncIterator[AsyncIterator[PeerEvent]]:
        """See `Mesh.events`."""
        with self._watching() as watcher:
            yield watcher

    @contextmanager
    def _watching(self) -> Iterator[_Watcher]:
        watcher = _Watcher(self._limit)
        self._watchers.append(watcher)
        try:
            yield watcher
        finally:
            self._watchers.remove(watcher)
