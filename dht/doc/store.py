"""Where documents are kept: SQLite, one transaction for each change.

Write-ahead logging: a process that is killed at any moment leaves a database that holds every transaction
that was committed and nothing of one that was not. Own changes are synced to the disk before the write
returns, so they survive a loss of power too; what came from others can come again, and is synced at
checkpoints only.

A document's head, its snapshot and its log lie apart, so that one more update writes that update and a head.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from mycel.dht.doc.message import Head, Part, Version
from mycel.protocol.errors import UsageProblem
from mycel.protocol.mesh import PeerId

SCHEMA_VERSION = 1

_SCHEMA = """
CREATE TABLE head (author TEXT PRIMARY KEY, edition INTEGER, sequence INTEGER, digest BLOB, signature BLOB);
CREATE TABLE snapshot (author TEXT PRIMARY KEY, content BLOB, chain BLOB);
CREATE TABLE log (author TEXT, sequence INTEGER, content BLOB, PRIMARY KEY (author, sequence)) WITHOUT ROWID;
"""
_BUSY_S = 5.0


class DocumentStore(Protocol):
    """Keeps documents over restarts."""

    def load(self) -> list[Part]:
        """Every document, whole, ordered by author."""

    def save(self, whole: Part, kept: Version | None, *, durable: bool) -> None:
        """Keep a document, of which `kept` was kept before (None: nothing that it continues). On return, or
        where the store says so once `synced` returns, it is safe from the process's death, and from a loss
        of power where `durable`. Raises `UsageProblem` where it cannot be kept.
        """

    def forget(self, author: PeerId) -> None:
        """Keep this author's document no longer."""

    async def synced(self) -> None:
        """Until everything that was saved as durable is. Raises `UsageProblem` where it could not be kept."""


class VolatileStore:
    """Keeps documents as long as this object lives: simulated disks, and nodes that want none."""

    def __init__(self) -> None:
        self._documents: dict[PeerId, Part] = {}

    def load(self) -> list[Part]:
        """See `DocumentStore.load`."""
        return [self._documents[author] for author in sorted(self._documents)]

    def save(self, whole: Part, kept: Version | None, *, durable: bool) -> None:
        """See `DocumentStore.save`."""
        self._documents[whole.head.author] = whole

    def forget(self, author: PeerId) -> None:
        """See `DocumentStore.forget`."""
        self._documents.pop(author, None)

    async def synced(self) -> None:
        """See `DocumentStore.synced`: nothing survives here."""


class SqliteStore:
    """Keeps documents in one SQLite file. Any thread may use it, one at a time."""

    def __init__(self, path: Path) -> None:
        """Open or make the file at `path`. Raises `UsageProblem` for a file that is none of ours."""
        self._path = path
        try:
            self._database = sqlite3.connect(
                path, isolation_level=None, timeout=_BUSY_S, check_same_thread=False
            )
            self._database.execute("PRAGMA journal_mode = WAL")
            self._prepare()
        except sqlite3.DatabaseError as error:
            raise self._unusable(str(error)) from None

    def _prepare(self) -> None:
        with self._transaction():
            (schema,) = self._database.execute("PRAGMA user_version").fetchone()
            if schema == 0:
                for statement in _SCHEMA.strip().splitlines():
                    self._database.execute(statement)
                self._database.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            elif schema != SCHEMA_VERSION:
                raise self._unusable(f"it is of schema {schema}, this program reads {SCHEMA_VERSION}")

    def _unusable(self, why: str) -> UsageProblem:
        return UsageProblem(
            f"{self._path} cannot be used: {why}; move it away, and documents come again from peers"
        )

    @contextmanager
    def _transaction(self, *, durable: bool = True) -> Iterator[None]:
        self._database.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
        self._database.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:  # why: a transaction ends either way, also when cancelled; raised again
            self._database.execute("ROLLBACK")
            raise
        self._database.execute("COMMIT")

    def load(self) -> list[Part]:
        """See `DocumentStore.load`. Raises `UsageProblem` for a damaged file."""
        try:
            return list(self._read())
        except sqlite3.DatabaseError as error:
            raise self._unusable(str(error)) from None

    def _read(self) -> Iterator[Part]:
        heads = self._database.execute(
            "SELECT author, edition, sequence, digest, signature, content, chain"
            " FROM head JOIN snapshot USING (author) ORDER BY author"
        ).fetchall()
        for author, edition, sequence, digest, signature, snapshot, chain in heads:
            rows = self._database.execute(
                "SELECT content FROM log WHERE author = ? ORDER BY sequence", (author,)
            )
            head = Head(author, edition, sequence, digest, signature)
            yield Part(head, 0, snapshot, tuple(content for (content,) in rows), chain)

    def save(self, whole: Part, kept: Version | None, *, durable: bool) -> None:
        """See `DocumentStore.save`."""
        self.change([(whole, kept)], [], durable=durable)

    def forget(self, author: PeerId) -> None:
        """See `DocumentStore.forget`."""
        self.change([], [author], durable=False)

    async def synced(self) -> None:
        """See `DocumentStore.synced`: everything is when `save` returns."""

    def change(
        self, saves: Sequence[tuple[Part, Version | None]], forgotten: Sequence[PeerId], *, durable: bool
    ) -> None:
        """Forget authors and save documents, each as `save` has it, in one transaction.

        Raises `UsageProblem`: then nothing of it was done.
        """
        try:
            with self._transaction(durable=durable):
                for author in forgotten:
                    for table in ("head", "snapshot", "log"):
                        self._database.execute(f"DELETE FROM {table} WHERE author = ?", (author,))
                for whole, kept in saves:
                    self._save(whole, kept)
        except sqlite3.Error as error:
            raise UsageProblem(f"{self._path}: {error}; see to it that its disk has room") from None

    def _save(self, whole: Part, kept: Version | None) -> None:
        head = whole.head
        author = head.author
        first = 0
        if kept is None or kept.edition != head.edition or kept.sequence > head.sequence:
            self._database.execute("DELETE FROM log WHERE author = ?", (author,))
            self._database.execute(
                "INSERT OR REPLACE INTO snapshot VALUES (?, ?, ?)", (author, whole.snapshot, whole.chain)
            )
        else:
            first = kept.sequence
        self._database.executemany(
            "INSERT INTO log VALUES (?, ?, ?)",
            [(author, number, whole.updates[number]) for number in range(first, head.sequence)],
        )
        self._database.execute(
            "INSERT OR REPLACE INTO head VALUES (?, ?, ?, ?, ?)",
            (author, head.edition, head.sequence, head.digest, head.signature),
        )

    def close(self) -> None:
        """Close the file."""
        self._database.close()
