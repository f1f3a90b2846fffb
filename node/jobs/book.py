"""The jobs of a swarm as one node knows them, from everybody's documents. No I/O here.

Facts go in as documents tell them, in any order, from anybody; what does not hold is counted by its reason
and changes nothing. What is said of a job before the job itself is here waits for it, within bounds.

Of several states the one counts that ended the job, else the one of the highest epoch: nobody but its epoch's
one holder can have written it. A job is known as long as it stands in somebody's document. In the end that is
the document of whoever ended it, so that job and end go together when they go.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from mycel.node.jobs.lease import Lease
from mycel.node.jobs.record import (
    JOB,
    LOG,
    PREFIX,
    STATE,
    STOP,
    AccessOf,
    LogTail,
    State,
    Stop,
    Verify,
    check_state,
    check_stop,
    decode,
    open_envelope,
)
from mycel.node.jobs.spec import ID_CHARS, Envelope, Job
from mycel.protocol.board import Fact
from mycel.protocol.errors import Refused
from mycel.protocol.limits_jobs import DEFAULT_JOB_LIMITS, JobLimits
from mycel.protocol.mesh import PeerId

UNKNOWN_MAX = 256
"""Jobs of which something is known and not yet the job itself."""
REFUSALS_MAX = 64


@dataclass(slots=True)
class Entry:
    """What is known of one job."""

    id: str
    job: Job | None = None
    envelope: bytes = b""
    carriers: dict[PeerId, None] = field(default_factory=dict)
    """In whose documents the job stands."""
    state: State | None = None
    """The one that counts."""
    stop: Stop | None = None
    states: dict[PeerId, State] = field(default_factory=dict)
    logs: dict[PeerId, LogTail] = field(default_factory=dict)
    early: dict[tuple[PeerId, str], bytes] = field(default_factory=dict)
    """What came before the job."""

    @property
    def ender(self) -> PeerId | None:
        """In whose document the job stands with its end, None where that is nobody's."""
        if self.state is None or not self.state.is_ended:
            return None
        author = PeerId(self.state.lease.holder)
        return author if author in self.carriers else None

    @property
    def is_ended(self) -> bool:
        """Whether nothing is left to do."""
        return self.state is not None and self.state.is_ended

    @property
    def lease(self) -> Lease | None:
        """The one of the highest epoch that is proven here; None where nobody coordinated yet."""
        leases = [self.states[author].lease for author in sorted(self.states)]
        return max(leases, key=lambda lease: lease.epoch, default=None)


@dataclass(frozen=True, slots=True)
class Refusal:
    """Something about a job that was not taken."""

    job: str
    author: PeerId
    reason: str
    text: str


class Book:
    """Jobs by id."""

    def __init__(self, access_of: AccessOf, verify: Verify, limits: JobLimits = DEFAULT_JOB_LIMITS) -> None:
        self._access_of = access_of
        self._verify = verify
        self._limits = limits
        self._entries: dict[str, Entry] = {}
        self._takers: dict[str, Callable[[Entry, PeerId, bytes], None]] = {
            JOB: self._take_job,
            STOP: self._take_stop,
            STATE: self._take_state,
            LOG: self._take_log,
        }
        self.refused: dict[str, int] = {}
        """What was not taken, by reason."""
        self.refusals: list[Refusal] = []
        """The latest of it."""

    def get(self, job: str) -> Entry | None:
        """What is known of a job that is here."""
        entry = self._entries.get(job)
        return entry if entry is not None and entry.job is not None and entry.carriers else None

    def entries(self) -> list[tuple[Entry, Job]]:
        """All jobs, oldest first."""
        found = self._entries.values()
        known = [(entry, entry.job) for entry in found if entry.job is not None and entry.carriers]
        return sorted(known, key=lambda pair: (pair[1].created, pair[1].id))

    def active(self) -> list[tuple[Entry, Job]]:
        """Jobs that are to be worked on, oldest first; of each submitter so many as it may have at once."""
        counts: dict[PeerId, int] = {}
        found = []
        for entry, job in self.entries():
            if entry.is_ended:
                continue
            counts[job.submitter] = counts.get(job.submitter, 0) + 1
            if counts[job.submitter] <= self._limits.active:
                found.append((entry, job))
        return found

    def take(self, fact: Fact) -> str | None:
        """Take in what a peer says. The job that it changed, None where it changed none."""
        try:
            return self.put(fact)
        except Refused as refused:
            self._refuse(fact.key.removeprefix(PREFIX).partition("/")[0], fact.author, refused)
            return None

    def put(self, fact: Fact) -> str | None:
        """As `take`; raises `Refused` for what is not taken."""
        name, _, what = fact.key.removeprefix(PREFIX).partition("/")
        taker = self._takers.get(what)
        if not fact.key.startswith(PREFIX) or taker is None or len(name) != ID_CHARS:
            raise Refused(f"{fact.key} names nothing about a job", reason="unknown-key")
        if fact.value is None:
            return self._drop(name, fact.author, what)
        entry = self._entries.get(name)
        if entry is None:
            unknown = sum(not one.carriers for one in self._entries.values())
            if what != JOB and unknown >= UNKNOWN_MAX:
                raise Refused(f"words about {unknown} jobs that nobody told of", reason="full")
            entry = Entry(name)
        if what != JOB and entry.job is None:
            entry.early[fact.author, what] = fact.value
            self._entries[name] = entry
            return None
        taker(entry, fact.author, fact.value)
        self._entries[name] = entry
        return name

    # --- one taker for each word

    def _take_job(self, entry: Entry, author: PeerId, value: bytes) -> None:
        if entry.job is None:
            job = open_envelope(decode(value, Envelope), self._access_of, self._verify)
            if job.id != entry.id:
                raise Refused(f"job {job.id[:8]} stands under the name {entry.id[:8]}", reason="forged")
            entry.job, entry.envelope = job, value
            for (early, what), early_value in sorted(entry.early.items()):
                try:
                    self._takers[what](entry, early, early_value)
                except Refused as refused:
                    self._refuse(entry.id, early, refused)
            entry.early.clear()
        entry.carriers[author] = None

    def _take_stop(self, entry: Entry, author: PeerId, value: bytes) -> None:
        stop = decode(value, Stop)
        assert entry.job is not None
        if stop.job != entry.id:
            raise Refused("a word to stop another job", reason="forged")
        check_stop(stop, entry.job, self._access_of, self._verify)
        entry.stop = entry.stop or stop

    def _take_state(self, entry: Entry, author: PeerId, value: bytes) -> None:
        state = decode(value, State)
        assert entry.job is not None
        known = entry.states.get(author)
        if known is None or known.lease != state.lease:
            check_state(state, entry.job, author, self._verify)
        if known is not None and _rank(known) > _rank(state):
            return  # somebody's old word, told late
        entry.states[author] = state
        self._settle(entry)

    def _take_log(self, entry: Entry, author: PeerId, value: bytes) -> None:
        entry.logs[author] = decode(value, LogTail)

    # ---

    def _settle(self, entry: Entry) -> None:
        states = [entry.states[author] for author in sorted(entry.states)]
        entry.state = max(states, key=lambda one: (one.is_ended, one.lease.epoch), default=None)

    def _drop(self, name: str, author: PeerId, what: str) -> str | None:
        """`author` said something and no longer does."""
        entry = self._entries.get(name)
        if entry is None:
            return None
        entry.early.pop((author, what), None)
        if what == JOB:
            entry.carriers.pop(author, None)
        elif what == STATE:
            entry.states.pop(author, None)
            self._settle(entry)
        elif what == LOG:
            entry.logs.pop(author, None)
        if not (entry.carriers or entry.early or entry.states or entry.logs):
            del self._entries[name]
        return name

    def _refuse(self, job: str, author: PeerId, refused: Refused) -> None:
        self.refused[refused.reason] = self.refused.get(refused.reason, 0) + 1
        self.refusals.append(Refusal(job, author, refused.reason, str(refused)))
        del self.refusals[:-REFUSALS_MAX]


def _rank(state: State) -> tuple[bool, int, int]:
    return state.is_ended, state.lease.epoch, state.number
