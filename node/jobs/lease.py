"""Who coordinates a job: a lease by majority vote of the job's electors. No I/O here.

An elector promises one candidate at a time: for an epoch above all that it promised before, and not while
its last promise, to somebody else, is in force. A promise is in force for `lease_s` of the elector's own
clock from when it was given or renewed. A candidate whom a majority promised the same epoch holds the lease,
for somewhat less than `lease_s` of its own clock from when it *asked*; it renews before that, or stops.

What follows, as long as clocks differ in rate by no more than `drift` (they need not show the same time) and
electors remember their promises:

- no epoch has two holders: two majorities share an elector, and it promised that epoch once;
- no moment has two holders: that elector did not promise the second while the first could hold it;
- epochs rise from holder to holder: that elector promised the second a higher one.

An elector that starts anew remembers whom it promised and not when; it waits a whole `lease_s` before it
promises somebody else. Votes are signed, so a lease can be shown to anybody: documents repeat it, and every
order of a coordinator carries it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import msgspec
from msgspec import Meta

from mycel.node.jobs.spec import ID_CHARS, Job, PeerText
from mycel.protocol.errors import Refused
from mycel.protocol.identity import in_domain
from mycel.protocol.limits_jobs import DEFAULT_JOB_LIMITS, JobLimits
from mycel.protocol.mesh import PeerId

DOMAIN = "job lease 1"
JobId = Annotated[str, Meta(min_length=ID_CHARS, max_length=ID_CHARS)]
Epoch = Annotated[int, Meta(ge=1, le=DEFAULT_JOB_LIMITS.epoch_max)]


class Vote(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """An elector's promise to a lease's holder."""

    elector: PeerText
    signature: Annotated[bytes, Meta(max_length=64)]


class Lease(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Who coordinates a job, with the votes that prove it. That it is still in force it does not say."""

    job: JobId
    epoch: Epoch
    holder: PeerText
    votes: Annotated[tuple[Vote, ...], Meta(max_length=DEFAULT_JOB_LIMITS.electors)]


def vote_bytes(job: str, epoch: int, holder: PeerId) -> bytes:
    """What an elector signs."""
    return in_domain(DOMAIN, f"{job}\n{epoch}\n{holder}".encode())


def check_lease(lease: Lease, job: Job, verify: Callable[[PeerId, bytes, bytes], bool]) -> None:
    """Raise `Refused` (unproven) unless a majority of the job's electors signed for the lease's holder."""
    signed = vote_bytes(lease.job, lease.epoch, PeerId(lease.holder))
    votes = {
        vote.elector: None
        for vote in lease.votes
        if vote.elector in job.electors and verify(PeerId(vote.elector), signed, vote.signature)
    }
    if lease.job != job.id or lease.holder not in job.electors or len(votes) < job.majority:
        raise Refused(
            f"{len(votes)} of {len(job.electors)} electors of job {job.id[:8]} signed for {lease.holder} at"
            f" epoch {lease.epoch}; it takes {job.majority}",
            reason="unproven",
        )


class Promise(msgspec.Struct, frozen=True, array_like=True):
    """What an elector remembers of a job."""

    epoch: int
    holder: str


class Answer(msgspec.Struct, frozen=True):
    """What an elector says to a candidate."""

    granted: bool
    epoch: int
    """The highest that was promised."""
    holder: str
    """To whom."""
    wait_s: float
    """How long that promise keeps others out, if it is not renewed."""


class Elector:
    """One elector's promises for all its jobs."""

    def __init__(
        self, kept: Mapping[str, Promise], now: float, limits: JobLimits = DEFAULT_JOB_LIMITS
    ) -> None:
        """`kept` are the promises of before; times are seconds of this node's clock."""
        self._limits = limits
        self.promises = dict(kept)
        """To be kept before an answer that grants leaves this node."""
        self._until = dict.fromkeys(kept, now + limits.lease_s)

    def ask(self, job: str, epoch: int, candidate: PeerId, now: float) -> Answer:
        """`candidate` wants the lease of `job` for `epoch`."""
        last = self.promises.get(job)
        if last is not None:
            is_taken = last.holder != candidate and now < self._until[job]
            if epoch <= last.epoch or is_taken:  # the same candidate too: it may have died since and forgot
                return self._answer(job, False, now)
        if not 0 < epoch < self._limits.epoch_max:
            return self._answer(job, False, now)
        self.promises[job] = Promise(epoch, candidate)
        self._until[job] = now + self._limits.lease_s
        return self._answer(job, True, now)

    def renew(self, job: str, epoch: int, holder: PeerId, now: float) -> Answer:
        """The holder of `epoch` goes on. Granted also late, as long as nobody else was promised."""
        granted = self.promises.get(job) == Promise(epoch, holder)
        if granted:
            self._until[job] = now + self._limits.lease_s
        return self._answer(job, granted, now)

    def release(self, job: str, epoch: int, holder: PeerId, now: float) -> None:
        """The candidate of `epoch` does not hold the lease, or no longer: others need not wait."""
        if self.promises.get(job) == Promise(epoch, holder):
            self._until[job] = now

    def close(self, job: str) -> None:
        """The job has ended: nobody is promised anything any more, also when its end is long forgotten and
        somebody who was away brings the job back. So many ended jobs are remembered, the latest."""
        self.promises.pop(job, None)
        self.promises[job] = Promise(self._limits.epoch_max, "")
        self._until[job] = float("-inf")
        closed = [name for name in self.promises if self.is_closed(name)]
        for name in closed[: -self._limits.closed]:
            del self.promises[name], self._until[name]

    def is_closed(self, job: str) -> bool:
        """Whether the job is known to have ended."""
        promise = self.promises.get(job)
        return promise is not None and promise.epoch == self._limits.epoch_max

    def forget(self, job: str) -> None:
        """The job is gone. That it ended is remembered."""
        if not self.is_closed(job):
            self.promises.pop(job, None)
            self._until.pop(job, None)

    def _answer(self, job: str, granted: bool, now: float) -> Answer:
        last = self.promises.get(job, Promise(0, ""))
        return Answer(granted, last.epoch, last.holder, max(0.0, self._until.get(job, now) - now))


class Ballot:
    """One candidate's votes for one epoch, and how long they carry."""

    def __init__(
        self, electors: Sequence[PeerId], epoch: int, limits: JobLimits = DEFAULT_JOB_LIMITS
    ) -> None:
        self.epoch = epoch
        self._majority = len(electors) // 2 + 1
        self._held_s = limits.lease_s * (1 - limits.drift) / (1 + limits.drift)
        self._until: dict[PeerId, float] = {}

    def granted(self, elector: PeerId, asked_at: float) -> None:
        """`elector` said yes to a question that was sent at `asked_at`, by this node's clock."""
        self._until[elector] = max(self._until.get(elector, asked_at), asked_at + self._held_s)

    def denied(self, elector: PeerId) -> None:
        """`elector` has promised somebody else."""
        self._until.pop(elector, None)

    @property
    def until(self) -> float:
        """The lease is held until then, by this node's clock; minus infinity where it is not."""
        if len(self._until) < self._majority:
            return float("-inf")
        return sorted(self._until.values(), reverse=True)[self._majority - 1]

    @property
    def promised(self) -> list[PeerId]:
        """Electors that said yes, in order."""
        return sorted(self._until)


@dataclass(slots=True)
class Prospect:
    """What a candidate knows of a job's lease while it does not hold it, and when it stands again."""

    electors: Sequence[PeerId]
    rank: int
    """Its place among the candidates: they stand one after the other."""
    limits: JobLimits = DEFAULT_JOB_LIMITS
    seen: int = 0
    """The highest epoch heard of."""

    def next_epoch(self) -> int:
        """The epoch to stand for."""
        return self.seen + 1

    def note(self, epoch: int) -> None:
        """An epoch was heard of."""
        self.seen = max(self.seen, min(epoch, self.limits.epoch_max - 2))

    def is_over(self, denials: Mapping[PeerId, Answer]) -> bool:
        """Whether a majority says that the job has ended long ago."""
        over = [answer for answer in denials.values() if answer.epoch == self.limits.epoch_max]
        return len(over) > len(self.electors) // 2

    def pause_s(self, denials: Mapping[PeerId, Answer]) -> float:
        """How long to wait after a lost ballot, by what electors said: until so many of them are free as to
        make a majority with those who did not say no."""
        for answer in denials.values():
            self.note(answer.epoch)
        majority = len(self.electors) // 2 + 1
        waits = sorted(answer.wait_s for answer in denials.values())
        needed = majority - (len(self.electors) - len(waits))
        wait_s = waits[needed - 1] if needed > 0 else 0.0
        return wait_s * (1 + 2 * self.limits.drift) + self.limits.stand_s * (1 + self.rank)
