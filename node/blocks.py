"""What this node keeps and serves as blocks, and how it comes by those of others.

    cid = await blocks.add_bytes(data, pin="value/7")     # one block, at most 2 MiB
    data = await blocks.fetch(cid, holders)               # from whoever has it, `holders` first
    root = await blocks.add_file(path, pin="job/1")       # of any size
    await blocks.fetch_file(root, path, holders)
    await blocks.unpin("value/7")

What is pinned stays; what is not goes when others need the room, the least recently used first. A fetch asks
the members that this node is connected with, those who come meanwhile included; holders that are named are
asked even where there are more members than one fetch talks to.

The store is opened beside everything else, for one of a terabyte takes seconds to look at. Who needs it
waits.
"""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import trio

from mycel.dht.block.disk import disk_store
from mycel.dht.block.exchange import Exchange, Progress
from mycel.dht.block.file import add_file, fetch_file
from mycel.dht.block.manifest import Want
from mycel.protocol.blockstore import BlockStore
from mycel.protocol.cid import Cid, cid_of
from mycel.protocol.errors import LimitExceeded
from mycel.protocol.limits import DEFAULT_BLOCK_LIMITS
from mycel.protocol.mesh import Mesh, PeerId

OpenStore = Callable[[], AbstractAsyncContextManager[BlockStore]]
"""Opens a store for the time of a block."""


class Blocks:
    """The service. `upload_bytes_per_s` 0: as fast as it goes."""

    def __init__(self, mesh: Mesh, open_store: OpenStore, *, upload_bytes_per_s: float = 0) -> None:
        self.opened = trio.Event()
        """Set once the store can be used."""
        self._mesh = mesh
        self._open_store = open_store
        self._upload_bytes_per_s = upload_bytes_per_s
        self._exchange: Exchange | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep and serve blocks until cancelled; started at once. Raises as opening the store does."""
        task_status.started()
        async with self._open_store() as store:
            self._exchange = Exchange(self._mesh, store, upload_bytes_per_s=self._upload_bytes_per_s)
            self.opened.set()
            await trio.sleep_forever()

    async def exchange(self) -> Exchange:
        """The exchange, once there is one."""
        await self.opened.wait()
        assert self._exchange is not None
        return self._exchange

    @property
    def exchange_now(self) -> Exchange | None:
        """The exchange, None while the store is being opened."""
        return self._exchange

    async def add_bytes(self, data: bytes, *, pin: str | None = None) -> Cid:
        """Keep `data` as one block, pinned under `pin` if given, beside nothing else; its name.

        Raises `LimitExceeded` beyond 2 MiB and where there is no room.
        """
        if len(data) > DEFAULT_BLOCK_LIMITS.block_bytes:
            raise LimitExceeded(
                f"{len(data)} bytes are more than one block of {DEFAULT_BLOCK_LIMITS.block_bytes}: "
                "write them to a file and use add_file"
            )
        exchange = await self.exchange()
        cid = cid_of(data)
        if pin is not None:
            await exchange.store.pin(pin, [cid])
        await exchange.store.put(cid, data)
        exchange.announce(cid)
        return cid

    async def fetch(self, cid: Cid, holders: Sequence[PeerId] = ()) -> bytes:
        """The block, from here or from whoever has it. Raises as `Exchange.fetch` does."""
        exchange = await self.exchange()
        data = await exchange.store.get(cid)
        if data is not None:
            return data
        return await exchange.get(Want(cid, None), first=holders)

    async def add_file(self, path: Path, *, pin: str) -> Cid:
        """Keep the file at `path` as blocks; the name to fetch it by. Raises as `mycel.dht.block.file`."""
        exchange = await self.exchange()
        root = await add_file(exchange.store, path, pin)
        for cid in exchange.store.pinned(pin):
            exchange.announce(cid)
        return root

    async def fetch_file(
        self, root: Cid, path: Path, holders: Sequence[PeerId] = (), progress: Progress | None = None
    ) -> None:
        """Write the file that `root` names to `path`. Raises as `mycel.dht.block.file`."""
        exchange = await self.exchange()
        await fetch_file(exchange, root, path, first=holders, progress=progress)

    async def unpin(self, pin: str) -> None:
        """Let go what was pinned so: it stays until others need the room."""
        await (await self.exchange()).store.unpin(pin)


@asynccontextmanager
async def store_in(folder: Path, quota_bytes: int) -> AsyncIterator[BlockStore]:
    """A store on disk; `quota_bytes` 0: half of what is free beside it. Raises as `DiskStore` does."""
    async with disk_store(folder, quota_bytes) as store:
        if not quota_bytes:
            free = (await trio.to_thread.run_sync(shutil.disk_usage, folder)).free
            store.shelf.quota_bytes = (store.used_bytes + free) // 2
        yield store
