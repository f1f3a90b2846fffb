"""What this node says of jobs in its own document, written together and not too often.

Progress and log lines wait for the next turn, half a second at most; what must not be lost (a new job, a
checkpoint, an end) is written at once. Lines that no longer fit into the document go into blocks, and the
document names those.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

import msgspec
import trio

from mycel.dht.doc.sync import Documents
from mycel.node.jobs.keep import LOGS, NEW_LOGS, Blobs
from mycel.node.jobs.record import LOG, PREFIX, LogTail, key_of
from mycel.node.jobs.spec import Blob
from mycel.protocol.errors import LimitExceeded, MycelError
from mycel.protocol.limits_jobs import DEFAULT_JOB_LIMITS, JobLimits
from mycel.protocol.mesh import Mesh

log = logging.getLogger("mycel.jobs")

LINE_OVERHEAD = 16
"""Bytes of a line beside its text, at most."""


class Journal:
    """This node's lines about one job."""

    def __init__(self, tail: LogTail | None, limits: JobLimits = DEFAULT_JOB_LIMITS) -> None:
        """`tail` is what this node said of the job before."""
        self._limits = limits
        self._first = 0 if tail is None else tail.first
        self._lines = [] if tail is None else list(tail.lines)
        self._chunks = [] if tail is None else list(tail.chunks)
        self.is_news = False

    def add(self, at: float, line: str) -> None:
        """One more line, without what would steer a terminal."""
        text = "".join(char if char.isprintable() else " " for char in line[: self._limits.line_chars])
        self._lines.append((at, text))
        self.is_news = True

    def surplus(self) -> tuple[int, list[tuple[float, str]]]:
        """The oldest lines that do not fit beside the others, and the number of the first."""
        size = 0
        for count, (_, text) in enumerate(reversed(self._lines)):
            size += len(text.encode()) + LINE_OVERHEAD
            if size > self._limits.log_bytes:
                kept = count // 2 if count > 1 else count  # so that blocks hold more than a line
                return self._first, self._lines[: len(self._lines) - kept]
        return self._first, []

    def put_away(self, count: int, blob: Blob | None) -> list[Blob]:
        """The oldest `count` lines are in `blob` now, or lost; the blobs that are referred to."""
        if blob is not None:
            self._chunks.append((self._first, blob))
            del self._chunks[: -self._limits.log_chunks]
        self._first += count
        del self._lines[:count]
        return [chunk for _, chunk in self._chunks]

    def tail(self) -> LogTail:
        """What stands in the document."""
        self.is_news = False
        return LogTail(self._first, tuple(self._lines), tuple(self._chunks))


class Desk:
    """Writes. `run` must be running for what is not written at once."""

    def __init__(
        self, mesh: Mesh, documents: Documents, blobs: Blobs, limits: JobLimits = DEFAULT_JOB_LIMITS
    ) -> None:
        self._mesh = mesh
        self._documents = documents
        self._blobs = blobs
        self._limits = limits
        self._waiting: dict[str, bytes | None] = {}
        self._journals: dict[str, Journal] = {}
        self._news = trio.Event()
        self.lost = 0
        """Writes that found no room."""
        self.make_room: Callable[[Sequence[str]], str | None] = lambda gone: None
        """Names a job that need not stand in this node's document any more, beside those that are gone."""

    async def run(self) -> None:
        """Write what waits, until cancelled."""
        while True:
            await self._news.wait()
            self._news = trio.Event()
            await self._write_journals()
            self._write({})
            await trio.sleep(self._limits.mirror_s)

    def say(self, key: str, value: bytes | None) -> None:
        """Write with the next turn; None: say it no more."""
        self._waiting[key] = value
        self._news.set()

    async def say_now(self, changes: Mapping[str, bytes | None]) -> None:
        """Write at once, with what waits; it is on the disk when this returns.

        Raises `LimitExceeded` where the document is full, and what its store raises.
        """
        self._write(changes, must=True)
        await self._documents.synced()

    async def end(self) -> None:
        """Write what waits: this node leaves."""
        await self._write_journals()
        self._write({})

    def journal(self, job: str) -> Journal:
        """This node's lines about a job, which go on where they were before a restart."""
        if job not in self._journals:
            tail: LogTail | None = None
            for fact in self._documents.read(key_of(job, LOG)):
                if fact.author == self._mesh.peer_id and fact.value is not None:
                    tail = msgspec.msgpack.decode(fact.value, type=LogTail)
            self._journals[job] = Journal(tail, self._limits)
        return self._journals[job]

    def log(self, job: str, line: str) -> None:
        """Add a line with the next turn."""
        self.journal(job).add(self._mesh.wall(), line)
        self._news.set()

    def own_jobs(self) -> list[str]:
        """Jobs of which something stands in this node's document, or is about to, in order."""
        own = [fact.key for fact in self._documents.read(PREFIX) if fact.author == self._mesh.peer_id]
        return sorted({key.split("/")[1]: None for key in (*own, *self._waiting)})

    def forget(self, job: str) -> None:
        """Say nothing of a job any more."""
        self._journals.pop(job, None)
        own = [
            fact.key for fact in self._documents.read(f"{PREFIX}{job}/") if fact.author == self._mesh.peer_id
        ]
        self._waiting.update(dict.fromkeys(own))
        self._news.set()

    async def _write_journals(self) -> None:
        for job, journal in sorted(self._journals.items()):
            if not journal.is_news:
                continue
            _, lines = journal.surplus()
            if lines:
                await self._put_away(job, journal, lines)
            self._waiting[key_of(job, LOG)] = msgspec.msgpack.encode(journal.tail())

    async def _put_away(self, job: str, journal: Journal, lines: list[tuple[float, str]]) -> None:
        """Put the oldest lines into a block."""
        blob: Blob | None = None
        try:
            blob = await self._blobs.add(job, msgspec.msgpack.encode(lines), NEW_LOGS)
        except MycelError as error:
            log.warning("%d lines about job %s are lost: %s", len(lines), job, error)
        kept = journal.put_away(len(lines), blob)
        try:
            with trio.move_on_after(self._limits.call_s):  # older ones may be gone from this disk
                await self._blobs.hold(job, LOGS, kept)
                await self._blobs.settle(self._blobs.fresh(job, NEW_LOGS))
        except MycelError as error:
            log.warning("old lines about job %s may be lost: %s", job, error)

    def _write(self, changes: Mapping[str, bytes | None], *, must: bool = False) -> None:
        waiting = {**self._waiting, **changes}
        if not waiting:
            return
        gone: list[str] = []
        while True:
            try:
                self._documents.write(waiting)
            except LimitExceeded as error:
                job = self.make_room(gone)
                if job is not None:
                    gone.append(job)
                    self._journals.pop(job, None)
                    waiting.update(dict.fromkeys(self._own_keys(job)))
                    continue
                self.lost += 1
                if must:
                    raise
                log.warning("what this node knows of jobs finds no room in its document: %s", error)
            except MycelError as error:  # the disk is full, say
                if must:
                    raise
                log.warning("what this node knows of jobs cannot be written: %s", error)
            else:
                self._waiting.clear()
            return

    def _own_keys(self, job: str) -> list[str]:
        prefix = f"{PREFIX}{job}/"
        own = [fact.key for fact in self._documents.read(prefix) if fact.author == self._mesh.peer_id]
        return [*own, *(key for key in self._waiting if key.startswith(prefix))]
