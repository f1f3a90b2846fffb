"""Documents on disk, written beside trio's thread.

A write to the disk takes milliseconds, and a sync of a slow one a tenth of a second: in that time nothing
else would move. So what is to be kept is queued here, the latest state of each document, and a thread writes
the queue as one transaction while the next one fills. An author that writes quickly is written as often as
the disk can, not as often as it writes. `synced` waits for what was queued as durable, and what is told to
others waits for `synced`.

What could not be written stays in the queue, and is tried again until it can be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

import trio

from mycel.dht.doc.message import Part, Version
from mycel.dht.doc.store import SqliteStore
from mycel.protocol.errors import UsageProblem
from mycel.protocol.mesh import PeerId

WRITER = "pycrdt"
"""What own documents are written with. It takes 60 ms to load, and is loaded before it is needed."""
RETRY_S = 1.0
"""After a disk that took nothing, before it is tried again."""


@dataclass(frozen=True, slots=True)
class Kept:
    """A document as it should be on disk; None: not at all."""

    whole: Part | None
    anew: bool
    """Whether it may not continue what is there."""


@dataclass(slots=True)
class Batch:
    """What one transaction is to write."""

    documents: dict[PeerId, Kept] = field(default_factory=dict)
    is_durable: bool = False
    written: trio.Event = field(default_factory=trio.Event)
    error: UsageProblem | None = None


class DiskStore:
    """A `DocumentStore` in one SQLite file. `run` must be running for anything to be kept."""

    def __init__(self, store: SqliteStore, kept: Sequence[Part]) -> None:
        self._store = store
        self._loaded = list(kept)
        self._on_disk = {whole.head.author: whole.head.version for whole in kept}
        self._queue = Batch()
        self._writing: Batch | None = None
        self._news = trio.Event()
        self._one = trio.CapacityLimiter(1)

    @classmethod
    async def open(cls, path: Path) -> DiskStore:
        """Open or make the file. Raises `UsageProblem` for one that is damaged or none of ours."""
        store = await trio.to_thread.run_sync(_open, path)
        return cls(store, await trio.to_thread.run_sync(store.load))

    # --- DocumentStore

    def load(self) -> list[Part]:
        """See `DocumentStore.load`; as it was when the file was opened, and once."""
        loaded, self._loaded = self._loaded, []
        return loaded

    def save(self, whole: Part, kept: Version | None, *, durable: bool) -> None:
        """See `DocumentStore.save`."""
        author = whole.head.author
        before = self._queue.documents.get(author)
        anew = kept is None or (before is not None and before.anew)
        self._queue.is_durable |= durable
        self._put(author, Kept(whole, anew))

    def forget(self, author: PeerId) -> None:
        """See `DocumentStore.forget`."""
        self._put(author, Kept(None, anew=True))

    async def synced(self) -> None:
        """See `DocumentStore.synced`."""
        for batch in (self._writing, self._queue):
            if batch is not None and batch.is_durable:
                await batch.written.wait()
                if batch.error is not None:
                    raise batch.error

    def _put(self, author: PeerId, kept: Kept) -> None:
        self._queue.documents[author] = kept
        self._news.set()

    # --- the service

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Write until cancelled; then what is left, and close."""
        task_status.started()
        try:
            await trio.to_thread.run_sync(import_module, WRITER)
            while True:
                await self._news.wait()
                self._news = trio.Event()
                batch = self._begin()
                await trio.to_thread.run_sync(self._write, batch, limiter=self._one)
                self._end(batch)
                if batch.error is not None:
                    await trio.sleep(RETRY_S)
                    self._news.set()
        finally:
            if self._writing is not None:  # cancelled before its thread began
                self._keep_for_later(self._writing)
            rest = self._begin()
            self._write(rest)
            self._end(rest)
            self._store.close()

    def _begin(self) -> Batch:
        batch, self._queue = self._queue, Batch()
        self._writing = batch
        return batch

    def _write(self, batch: Batch) -> None:
        """In the thread."""
        saves, forgotten = [], []
        for author, kept in batch.documents.items():
            if kept.whole is None:
                forgotten.append(author)
            else:
                saves.append((kept.whole, None if kept.anew else self._on_disk.get(author)))
        try:
            self._store.change(saves, forgotten, durable=batch.is_durable)
        except UsageProblem as error:
            batch.error = error

    def _end(self, batch: Batch) -> None:
        self._writing = None
        if batch.error is not None:
            self._keep_for_later(batch)
        else:
            for author, kept in batch.documents.items():
                if kept.whole is not None:
                    self._on_disk[author] = kept.whole.head.version
        batch.written.set()

    def _keep_for_later(self, batch: Batch) -> None:
        self._queue.is_durable |= batch.is_durable
        for author, kept in batch.documents.items():
            newer = self._queue.documents.get(author, kept)
            self._queue.documents[author] = Kept(newer.whole, newer.anew or kept.anew)


def _open(path: Path) -> SqliteStore:
    path.touch(mode=0o600)  # what SQLite puts beside it gets the same mode
    return SqliteStore(path)
