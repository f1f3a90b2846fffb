"""Serving blocks: one stream per asking peer, one block at a time on each, no faster than its owner allows.

A peer that reads slowly holds up its own stream and nothing else: a block is read from the store when its
turn comes, and the stream's window does the rest. All streams share one upload rate.
"""

from __future__ import annotations

import trio

from mycel.dht.block.message import BLOCK_PROTOCOL, read, write
from mycel.protocol.blockstore import BlockStore
from mycel.protocol.cid import Cid
from mycel.protocol.errors import ConnectionLost, Refused, RemoteProtocolError, StreamReset
from mycel.protocol.limits import DEFAULT_BLOCK_LIMITS, KIB, BlockLimits
from mycel.protocol.mesh import Mesh, PeerId, Stream
from mycel.protocol.rate import Bucket

PACED_BYTES = 64 * KIB
"""Sent at once where there is a rate."""


class Uploads:
    """What this node serves. `bytes_per_s` 0: as fast as it goes."""

    def __init__(
        self,
        mesh: Mesh,
        store: BlockStore,
        bytes_per_s: float = 0,
        limits: BlockLimits = DEFAULT_BLOCK_LIMITS,
    ) -> None:
        self._store = store
        self._limits = limits
        self._is_paced = bytes_per_s > 0
        self._bucket = Bucket(bytes_per_s, trio.current_time())
        self._open: dict[int, _Upload] = {}
        self.bytes_sent = 0
        self.blocks_sent = 0
        self.refused = 0
        """Streams beyond the limits."""
        mesh.serve_stream(BLOCK_PROTOCOL, self._serve)

    def announce(self, cid: Cid) -> None:
        """A block came to the store: tell those who would welcome it."""
        for upload in self._open.values():
            upload.announce(cid)

    def _is_full(self, peer: PeerId) -> bool:
        of_peer = sum(upload.stream.peer == peer for upload in self._open.values())
        return len(self._open) >= self._limits.uploads or of_peer >= self._limits.uploads_per_peer

    async def _serve(self, stream: Stream) -> None:
        if self._is_full(stream.peer):
            self.refused += 1
            stream.reset()
            return
        upload = _Upload(self, stream, self._store, self._limits)
        self._open[id(upload)] = upload
        failure: Exception | None = None
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(upload.send)
                try:
                    await upload.listen()
                except (StreamReset, ConnectionLost, Refused, RemoteProtocolError) as error:
                    failure = error
                nursery.cancel_scope.cancel()
        finally:
            del self._open[id(upload)]
        if failure is not None:
            raise failure
        await stream.aclose()

    async def pace(self, count: int) -> None:
        """Wait until `count` bytes may go."""
        ready = self._bucket.ready_at(now := trio.current_time())
        while ready > now:  # others spend meanwhile
            await trio.sleep_until(ready)
            ready = self._bucket.ready_at(now := trio.current_time())
        self._bucket.spend(count)

    async def send_block(self, stream: Stream, cid: Cid, data: bytes) -> None:
        """A block and what goes before it."""
        head = write("block", [cid], len(data))
        if not self._is_paced:
            await stream.send(head)
            await stream.send(data)
        else:
            await stream.send(head)
            view = memoryview(data)
            for at in range(0, len(data), PACED_BYTES):
                piece = view[at : at + PACED_BYTES]
                await self.pace(len(piece))
                await stream.send(piece)
        self.bytes_sent += len(data)
        self.blocks_sent += 1


class _Upload:
    """One asking peer's stream."""

    def __init__(self, uploads: Uploads, stream: Stream, store: BlockStore, limits: BlockLimits) -> None:
        self.stream = stream
        self._uploads = uploads
        self._store = store
        self._limits = limits
        self._welcome: dict[Cid, None] = {}
        self._queue: dict[Cid, None] = {}
        self._have: list[Cid] = []
        self._gone: list[Cid] = []
        self._work = trio.Event()

    def announce(self, cid: Cid) -> None:
        """A block came to the store."""
        if cid in self._welcome:
            del self._welcome[cid]
            self._have.append(cid)
            self._work.set()

    async def listen(self) -> None:
        """Take what the peer asks, until it ends the stream."""
        while (message := await read(self.stream)) is not None:
            kind, cids, _ = message
            if kind == "want":
                self._take_wants(cids)
            elif kind == "get":
                self._take_gets(cids)
            elif kind == "back":
                for cid in cids:
                    if cid in self._queue:
                        del self._queue[cid]
                        self._gone.append(cid)
            else:
                raise RemoteProtocolError(f"{kind!r} from a peer that asks for blocks")
            self._work.set()

    def _take_wants(self, cids: list[Cid]) -> None:
        if len(self._welcome) + len(self._have) + len(cids) > self._limits.wants:
            raise RemoteProtocolError(f"more than {self._limits.wants} blocks wanted on one stream")
        for cid in cids:
            if self._store.has(cid):
                self._have.append(cid)
            else:
                self._welcome[cid] = None

    def _take_gets(self, cids: list[Cid]) -> None:
        if len(self._queue) + len(self._gone) + len(cids) > self._limits.asked:
            raise RemoteProtocolError(f"more than {self._limits.asked} blocks asked for at once")
        for cid in cids:
            if cid in self._queue:
                raise RemoteProtocolError("a block is asked for twice")
            self._queue[cid] = None

    async def send(self) -> None:
        """Answer. Ends where the stream does: `listen` says why."""
        try:
            while True:
                await self._work.wait()
                self._work = trio.Event()
                while self._have or self._gone or self._queue:
                    await self._answer()
        except (StreamReset, ConnectionLost, Refused):
            return

    async def _answer(self) -> None:
        if self._have:
            have, self._have = self._have, []
            await self.stream.send(write("have", have))
        elif self._gone:
            gone, self._gone = self._gone, []
            await self.stream.send(write("gone", gone))
        else:
            cid = next(iter(self._queue))
            del self._queue[cid]
            data = await self._store.get(cid)
            if data is None:
                self._gone.append(cid)
            else:
                await self._uploads.send_block(self.stream, cid, data)
