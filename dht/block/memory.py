"""A block store in memory: for simulated nodes, where no thread may run and no disk is."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import trio

from mycel.dht.block.extents import write_all
from mycel.dht.block.shelf import Shelf
from mycel.protocol.blockstore import CorruptBlock
from mycel.protocol.cid import Cid, cid_of, cid_text


class MemoryStore:
    """A `BlockStore` that ends with its process."""

    def __init__(self, quota_bytes: int = 0) -> None:
        self.shelf = Shelf(quota_bytes)
        self._blocks: dict[Cid, bytes] = {}

    @property
    def used_bytes(self) -> int:
        """See `BlockStore.used_bytes`."""
        return self.shelf.used_bytes

    @property
    def quota_bytes(self) -> int:
        """See `BlockStore.quota_bytes`."""
        return self.shelf.quota_bytes

    def has(self, cid: Cid) -> bool:
        """See `BlockStore.has`."""
        return cid in self.shelf

    async def get(self, cid: Cid) -> bytes | None:
        """See `BlockStore.get`."""
        await trio.lowlevel.checkpoint()
        self.shelf.touch(cid)
        return self._blocks.get(cid)

    async def append(self, cid: Cid, descriptor: int) -> bool:
        """See `BlockStore.append`."""
        data = await self.get(cid)
        if data is None:
            return False
        write_all(descriptor, data)
        return True

    async def put(self, cid: Cid, data: bytes) -> None:
        """See `BlockStore.put`."""
        await trio.lowlevel.checkpoint()
        if cid in self.shelf:
            self.shelf.touch(cid)
            return
        if cid_of(data) != cid:
            raise CorruptBlock(f"{len(data)} bytes that are not {cid_text(cid)}")
        for gone in self.shelf.reserve(len(data)):
            del self._blocks[gone]
        self.shelf.place(cid, len(data))
        self._blocks[cid] = data

    async def pin(self, name: str, cids: Sequence[Cid]) -> None:
        """See `BlockStore.pin`."""
        await trio.lowlevel.checkpoint()
        self.shelf.pin(name, cids)

    def pinned(self, name: str) -> Sequence[Cid]:
        """See `BlockStore.pinned`."""
        return self.shelf.pins.get(name, ())

    def pins(self) -> Sequence[str]:
        """See `BlockStore.pins`."""
        return sorted(self.shelf.pins)

    async def unpin(self, name: str) -> None:
        """See `BlockStore.unpin`."""
        await trio.lowlevel.checkpoint()
        self.shelf.unpin(name)


@asynccontextmanager
async def memory_store(quota_bytes: int = 0) -> AsyncIterator[MemoryStore]:
    """A store that is gone at the end."""
    await trio.lowlevel.checkpoint()
    yield MemoryStore(quota_bytes)
