"""What jobs keep: inputs, checkpoints, results, logs, as blocks here and at the job's other electors.

A blob is a file in blocks as `mycel.dht.block.file` has it: pieces of 2 MiB and a block that lists them. It
is pinned under `job/ID/SLOT`, one slot for each purpose, so that what a slot kept before is let go when it
keeps something new, and everything of a job when the job is forgotten.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from pathlib import Path

import msgspec

from mycel.dht.block.exchange import Exchange
from mycel.dht.block.file import add_file, read_list
from mycel.dht.block.manifest import Pieces, Want, cut, wants_of
from mycel.dht.block.model import ANYBODY, Sources
from mycel.node.jobs.spec import Blob
from mycel.protocol.cid import CID_BYTES, Cid, cid_of, cids_from
from mycel.protocol.errors import LimitExceeded, RemoteProtocolError
from mycel.protocol.limits import DEFAULT_BLOCK_LIMITS
from mycel.protocol.limits_jobs import DEFAULT_JOB_LIMITS as LIMITS
from mycel.protocol.mesh import PeerId

CHECKPOINT, FRESH, INPUTS, LOGS, NEW_LOGS = "checkpoint", "fresh", "inputs", "logs", "new-logs"


class Blobs:
    """The blobs of a node's jobs."""

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange
        self._store = exchange.store
        self._added = 0

    async def add(self, job: str, content: bytes | Path, slot: str = FRESH) -> Blob:
        """Keep `content` for now: until `settle`.

        Raises `LimitExceeded` for more than a list can name, or where there is no room; `OSError`; for a file
        that changes meanwhile `UsageProblem`.
        """
        self._added += 1
        pin = pin_of(job, f"{slot}/{self._added}")
        if isinstance(content, Path):
            root = await add_file(self._store, content, pin)
        else:
            root = await self._add(pin, content)
        for cid in self._store.pinned(pin):
            self.exchange.announce(cid)
        listed = await self._store.get(root)
        if listed is None:
            raise LimitExceeded("the store did not keep a block that was added; raise its quota")
        return Blob(root, len(listed), read_list(listed).nbytes)

    async def _add(self, pin: str, content: bytes) -> Cid:
        pieces, at = [], 0
        for size in cut(len(content)):
            pieces.append(content[at : at + size])
            at += size
        if len(pieces) > (DEFAULT_BLOCK_LIMITS.block_bytes - 64) // CID_BYTES:
            raise LimitExceeded(f"{len(content)} bytes are too many for one file of a job: cut it in two")
        cids = [cid_of(piece) for piece in pieces]
        listed = msgspec.msgpack.encode(Pieces(len(content), b"".join(cids)))
        root = cid_of(listed)
        await self._store.pin(pin, [root, *cids])
        for cid, piece in zip(cids, pieces, strict=True):
            await self._store.put(cid, piece)
        await self._store.put(root, listed)
        return root

    def fresh(self, job: str, slot: str = FRESH) -> Sequence[str]:
        """Names of what was added and is not settled."""
        return [name for name in self._store.pins() if name.startswith(pin_of(job, f"{slot}/"))]

    async def settle(self, names: Sequence[str]) -> None:
        """What was added so is held in its slot by now, or not wanted."""
        for name in names:
            await self._store.unpin(name)

    async def hold(self, job: str, slot: str, blobs: Sequence[Blob], sources: Sources = ANYBODY) -> None:
        """Bring these here and let the slot keep them, and nothing else. Raises as `Exchange.fetch`."""
        cids: list[Cid] = []
        name = pin_of(job, slot)
        before = list(self._store.pinned(name))
        for blob in blobs:
            pieces = await self._list(blob, sources)
            cids += [blob.cid, *cids_from(pieces.cids)]
            await self._store.pin(name, [*before, *cids])
            await self.exchange.fetch(wants_of(pieces), peers=sources.only, first=sources.first)
        await (self._store.pin(name, cids) if cids else self._store.unpin(name))

    async def read(self, blob: Blob, *, first: Sequence[PeerId] = ()) -> AsyncGenerator[bytes, None]:
        """Its content, piece by piece, from wherever it is. Raises as `Exchange.fetch`, and
        `RemoteProtocolError` where the root lists something else."""
        pieces = await self._list(blob, Sources(first=first))
        wants = wants_of(pieces)
        await self.exchange.fetch(wants, first=first)
        for want in wants:
            yield await self.exchange.get(want, first=first)

    async def whole(self, blob: Blob, *, first: Sequence[PeerId] = ()) -> bytes:
        """Its content. Raises as `read`."""
        return b"".join([piece async for piece in self.read(blob, first=first)])

    async def forget(self, job: str) -> None:
        """Let go of everything that the job kept here."""
        for name in self._store.pins():
            if name.startswith(pin_of(job, "")):
                await self._store.unpin(name)

    async def _list(self, blob: Blob, sources: Sources) -> Pieces:
        want = Want(blob.cid, blob.root_bytes)
        pieces = read_list(await self.exchange.get(want, peers=sources.only, first=sources.first))
        if pieces.nbytes != blob.nbytes or pieces.nbytes > LIMITS.blob_bytes:
            raise RemoteProtocolError(f"a blob of {blob.nbytes} bytes lists {pieces.nbytes}")
        return pieces


def pin_of(job: str, slot: str) -> str:
    """The name that pins what a job keeps in a slot."""
    return f"job/{job}/{slot}"
