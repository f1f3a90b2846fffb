"""What a node says of jobs to its faces: plain data, as JSON for scripts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from mycel.node.jobs.book import Book, Entry
from mycel.node.jobs.spec import Job
from mycel.protocol.mesh import PeerId


class ArtefactView(msgspec.Struct, frozen=True):
    """A result of a job."""

    name: str
    nbytes: int


class JobView(msgspec.Struct, frozen=True):
    """A job."""

    id: str
    name: str
    kind: str
    submitter: str
    submitter_label: str
    created: float
    """Seconds since 1970."""
    phase: str
    """ "waiting" (for its electors), "running", "stopping", "done", "failed" or "stopped"."""
    coordinator: str
    """Who holds its lease; "" where nobody did yet."""
    coordinator_label: str
    epoch: int
    step: int
    steps: int
    """0: not known."""
    metrics: dict[str, float]
    artefacts: tuple[ArtefactView, ...]
    text: str
    """Why it failed, or the last try did."""
    failures: int
    electors: tuple[str, ...]
    updated: float
    """When the coordinator said something last, seconds since 1970."""

    @property
    def is_ended(self) -> bool:
        """Whether nothing more will happen."""
        return self.phase in ("done", "failed", "stopped")


class RefusalView(msgspec.Struct, frozen=True):
    """Something about a job that this node did not take, and why."""

    job: str
    author: str
    reason: str
    text: str


class JobsView(msgspec.Struct, frozen=True):
    """All jobs that are known, oldest first."""

    jobs: tuple[JobView, ...]
    refused: tuple[RefusalView, ...] = ()


class LogLine(msgspec.Struct, frozen=True):
    """A line of a job's log."""

    at: float
    """Seconds since 1970."""
    peer: str
    label: str
    number: int
    """Counts the peer's lines."""
    text: str


class SubmitAsk(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A job to submit: what its file says, and the paths of the files it brings, by key."""

    job: dict[str, Any]
    files: dict[str, str] = {}


class JobAsk(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A job, by its name, or its id or the beginning of it."""

    job: str


class LogsAsk(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A job's log, until it ends where `follow`."""

    job: str
    follow: bool = False


class ContentAsk(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A result of a job."""

    job: str
    name: str


def job_view(entry: Entry, job: Job, label: Callable[[PeerId], str]) -> JobView:
    """How a job stands by this node's book."""
    state = entry.state
    phase = "waiting" if state is None else state.phase
    if entry.stop is not None and not entry.is_ended:
        phase = "stopping"
    coordinator = "" if state is None else state.lease.holder
    artefacts = {} if state is None else state.artefacts
    return JobView(
        id=job.id,
        name=job.name,
        kind=job.kind,
        submitter=job.submitter,
        submitter_label=label(job.submitter),
        created=job.created,
        phase=phase,
        coordinator=coordinator,
        coordinator_label=label(PeerId(coordinator)) if coordinator else "",
        epoch=0 if state is None else state.lease.epoch,
        step=0 if state is None else state.step,
        steps=0 if state is None else state.steps,
        metrics={} if state is None else dict(sorted(state.metrics.items())),
        artefacts=tuple(ArtefactView(name, blob.nbytes) for name, blob in sorted(artefacts.items())),
        text="" if state is None else state.text,
        failures=0 if state is None else state.failures,
        electors=job.electors,
        updated=job.created if state is None else state.updated,
    )


def jobs_view(book: Book, label: Callable[[PeerId], str]) -> JobsView:
    """All of them."""
    refused = tuple(RefusalView(one.job, one.author, one.reason, one.text) for one in book.refusals)
    return JobsView(tuple(job_view(entry, job, label) for entry, job in book.entries()), refused)
