"""Keeps out coordinators whose lease is over: see `mycel.node.jobs.runner.Fence`. No I/O here."""

from __future__ import annotations

from mycel.node.jobs.book import Book
from mycel.node.jobs.lease import Lease, check_lease
from mycel.node.jobs.record import Verify
from mycel.node.jobs.spec import Job
from mycel.protocol.errors import Refused
from mycel.protocol.mesh import PeerId


class Gate:
    """A node's fence. What it saw it remembers while the job is known."""

    def __init__(self, book: Book, verify: Verify) -> None:
        self._book = book
        self._verify = verify
        self._latest: dict[str, Lease] = {}
        """The lease of the highest epoch that was shown here, by job; its votes were checked."""

    def check(self, peer: PeerId, lease: Lease) -> Job:
        """See `Fence.check`."""
        entry = self._book.get(lease.job)
        if entry is None or entry.job is None:
            raise Refused(f"job {lease.job[:8]} is not known here (yet)", reason="unknown-job")
        if entry.is_ended or entry.stop is not None:
            raise Refused(f"job {lease.job[:8]} is ended", reason="ended")
        if lease.holder != peer:
            raise Refused(f"{peer} shows a lease of {lease.holder}", reason="unproven")
        latest = self._latest.get(lease.job)
        if lease != latest:
            check_lease(lease, entry.job, self._verify)
        seen = max(one.epoch for one in (latest, entry.lease, lease) if one is not None)
        if lease.epoch < seen:
            raise Refused(
                f"epoch {lease.epoch} of job {lease.job[:8]} is over: {seen} was seen here",
                reason="stale-epoch",
            )
        self._latest[lease.job] = lease
        return entry.job

    def forget(self, job: str) -> None:
        """A job is gone."""
        self._latest.pop(job, None)
