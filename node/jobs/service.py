"""Jobs at a node: what the swarm knows of them comes in from documents, and this node does its part.

    jobs = Jobs(place, [GenerateRunner...])
    await nursery.start(jobs.run)
    view = await jobs.submit(spec, files)
    jobs.views(); await jobs.stop(id); jobs.lines(id); jobs.content(id, name)

Each job that is not ended is attended by a task of its own (`mycel.node.jobs.coordinator`), so that one which
fails, or hangs, costs no other. A job that everybody let go of leaves the book, its blocks and its promises
with it.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

import msgspec
import trio

from mycel.dht.block.exchange import Exchange
from mycel.dht.doc.sync import Documents
from mycel.node.jobs.book import Book, Entry
from mycel.node.jobs.coordinator import Attendance
from mycel.node.jobs.desk import Desk
from mycel.node.jobs.gate import Gate
from mycel.node.jobs.keep import Blobs
from mycel.node.jobs.kinds import Spec
from mycel.node.jobs.record import JOB, PREFIX, STATE, STOP, AccessOf, key_of
from mycel.node.jobs.runner import Checker, Runner, Runners, Services
from mycel.node.jobs.spec import Job, JobInvalid, id_of
from mycel.node.jobs.submit import Draft, Files, choose_electors, make_job, make_stop, packed
from mycel.node.jobs.views import JobsView, JobView, LogLine, job_view, jobs_view
from mycel.node.jobs.voting import HALT, OFFER, Halt, Offer, Voting
from mycel.node.jobs.window import Window
from mycel.node.jobs.work import Tools
from mycel.node.memory import Memory
from mycel.protocol.board import Fact
from mycel.protocol.errors import MycelError, Refused
from mycel.protocol.limits_jobs import DEFAULT_JOB_LIMITS, JobLimits
from mycel.protocol.mesh import Access, Mesh, PeerId
from mycel.protocol.rpc import Rpc

log = logging.getLogger("mycel.jobs")

MakeRunner = Callable[[Services], Runner]


class JobUnknown(MycelError):
    """No job of that id or name; the text says where to look."""


class ArtefactUnknown(MycelError):
    """The job has no result of that name (yet)."""


@dataclass(frozen=True, slots=True)
class Place:
    """What jobs take of their node."""

    mesh: Mesh
    rpc: Rpc
    documents: Documents
    exchange: Callable[[], Awaitable[Exchange]]
    """The exchange of blocks, once the store is open."""
    memory: Memory
    access_of: AccessOf
    own_access: Callable[[], Access]
    chain: Callable[[], bytes]
    """What shows others what this node may do."""
    label: Callable[[PeerId], str]
    takes_part: bool = True
    """Whether this node works for jobs; its vote and its lease it gives in any case."""


class Jobs:
    """The service. `run` must be running for anything to happen."""

    def __init__(
        self, place: Place, makers: Sequence[MakeRunner] = (), limits: JobLimits = DEFAULT_JOB_LIMITS
    ) -> None:
        self.book = Book(place.access_of, place.mesh.verify, limits)
        self._place = place
        self._limits = limits
        self._bells: dict[str, trio.Event] = {}
        self._attended: dict[str, Attendance] = {}
        self._nursery: trio.Nursery | None = None
        self._voting = Voting(place.mesh, place.rpc, place.memory, self.book, self._put)
        self.gate = Gate(self.book, place.mesh.verify)
        services = Services(place.mesh, place.rpc, place.documents, self.gate, place.takes_part)
        self.runners = Runners([make(services) for make in makers])
        self.window = Window(self, place)
        self._tools: Tools | None = None
        self._opened = trio.Event()
        self._is_leaving = False

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Attend jobs until cancelled; started at once, at work as soon as blocks can be used."""
        place = self._place
        task_status.started()
        blobs = Blobs(await place.exchange())
        desk = Desk(place.mesh, place.documents, blobs, self._limits)
        self._tools = Tools(
            place.mesh, place.rpc, place.documents, blobs, desk, place.label, self.changed, self._take,
            self._limits,
        )  # fmt: skip
        self._voting.open(blobs, self._carry)
        desk.make_room = self._make_room
        try:
            async with (
                place.documents.watch(PREFIX) as changes,
                trio.open_nursery() as self._nursery,
            ):
                for fact in place.documents.read(PREFIX):
                    self._take(fact)
                self._opened.set()
                self._nursery.start_soon(desk.run)
                self._attend()
                async for change in changes:
                    self._take(change)
                    if change.value is None:
                        await self._clear_up(change.key)
        finally:
            self._nursery = None

    async def leave(self) -> None:
        """This node stops: leases are given back, so that others need not wait for their end."""
        self._is_leaving = True
        with trio.move_on_after(2 * self._limits.call_s):
            async with trio.open_nursery() as nursery:
                for attendance in list(self._attended.values()):
                    nursery.start_soon(attendance.leave)
        if self._tools is not None:
            await self._tools.desk.end()

    # --- asking

    async def submit(self, spec: Spec, files: Files) -> JobView:
        """Sign a job and hand it to its electors; it is safe with a majority of them when this returns.

        Raises `JobInvalid`, `UsageProblem` (nobody is there), `Refused` (electors will not have it), and what
        the block store raises.
        """
        tools = await self._ready()
        place = self._place
        runner = self.runners.get(spec.KIND)
        if runner is None:
            raise JobInvalid(f"kind = {spec.KIND!r}: this version runs jobs of {self.runners.kinds}")
        if isinstance(runner, Checker):
            await runner.check(spec, files)
        is_member = place.own_access() >= Access.MEMBER
        electors = choose_electors(place.mesh, is_member=is_member, count=self._limits.electors)
        draft = Draft(spec, files, electors, place.chain())
        envelope = await make_job(place.mesh, tools.blobs, draft, self._limits)
        job = id_of(envelope.body)
        self._put(Fact(place.mesh.peer_id, key_of(job, JOB), packed(envelope)))
        entry = self.book.get(job)
        assert entry is not None
        if is_member:
            await tools.desk.say_now({key_of(job, JOB): packed(envelope)})
        failures = await self._offer(electors, Offer(envelope))
        if len(failures) * 2 > len(electors):
            await self.stop(job)
            raise failures[0]
        self._attend()
        return job_view(entry, _job_of(entry), place.label)

    async def _offer(self, electors: Sequence[PeerId], offer: Offer) -> list[MycelError]:
        """Hand the job to all electors; why some do not have it."""
        failures: list[MycelError] = []

        async def hand(elector: PeerId) -> None:
            try:
                await self._place.rpc.call(elector, OFFER, offer, deadline_s=self._limits.copy_s)
            except MycelError as error:
                failures.append(error)

        async with trio.open_nursery() as nursery:
            for elector in electors:
                nursery.start_soon(hand, elector)
        return failures

    def views(self) -> JobsView:
        """All jobs, and what was refused."""
        return jobs_view(self.book, self._place.label)

    @property
    def phases(self) -> dict[str, int]:
        """How many jobs are in which phase."""
        counts: dict[str, int] = {}
        for job in self.views().jobs:
            counts[job.phase] = counts.get(job.phase, 0) + 1
        return counts

    def view(self, name: str) -> JobView:
        """One job. Raises `JobUnknown`."""
        entry = self.find(name)
        return job_view(entry, _job_of(entry), self._place.label)

    def find(self, name: str) -> Entry:
        """The job whose id begins so, or else the latest of that name. Raises `JobUnknown`."""
        entries = self.book.entries()
        begun = [entry for entry, _ in entries if name and entry.id.startswith(name)]
        named = [entry for entry, job in entries if job.name == name]
        if len(begun) > 1:
            raise JobUnknown(f"{len(begun)} jobs begin with {name}: write more of the id (see `mycel jobs`)")
        if not begun and not named:
            raise JobUnknown(f"no job {name!r} is known here; `mycel jobs` lists those that are")
        return begun[0] if begun else named[-1]

    async def stop(self, name: str) -> JobView:
        """Stop a job for good. Raises `JobUnknown`, `Refused` (it is somebody else's)."""
        tools = await self._ready()
        entry = self.find(name)
        if not entry.is_ended and entry.stop is None:
            stop = make_stop(self._place.mesh, entry.id, self._place.chain())
            fact = Fact(self._place.mesh.peer_id, key_of(entry.id, STOP), packed(stop))
            self._put(fact)
            if self._place.own_access() >= Access.MEMBER:
                await tools.desk.say_now({fact.key: fact.value})
            for elector in _job_of(entry).electors:
                if elector in self._place.mesh.peers:
                    with trio.move_on_after(self._limits.call_s):
                        await self._halt(elector, Halt(stop))
        return self.view(entry.id)

    async def _halt(self, elector: PeerId, halt: Halt) -> None:
        try:
            await self._place.rpc.call(elector, HALT, halt, deadline_s=self._limits.call_s)
        except MycelError as error:
            log.info("elector %s was not told to stop a job: %s", elector, error)

    async def lines(self, name: str, *, follow: bool = False) -> AsyncGenerator[LogLine, None]:
        """The job's log, of all peers, in the order of their clocks; with `follow` until it ends.

        Raises `JobUnknown`.
        """
        tools = await self._ready()
        entry = self.find(name)
        read: dict[PeerId, int] = {}
        while True:
            found: list[LogLine] = []
            for author in sorted(entry.logs):
                found += await self._lines_of(tools, entry, author, read.get(author, 0))
            for line in sorted(found, key=lambda one: (one.at, one.peer, one.number)):
                read[PeerId(line.peer)] = line.number + 1
                yield line
            if not follow:
                return
            with trio.move_on_after(2 * self._limits.mirror_s if entry.is_ended else 3600.0) as waited:
                await self.changed(entry.id)
            follow = not (waited.cancelled_caught and entry.is_ended)

    async def _lines_of(self, tools: Tools, entry: Entry, author: PeerId, begin: int) -> list[LogLine]:
        tail = entry.logs[author]
        label = self._place.label(author)
        pairs: list[tuple[int, float, str]] = []
        ends = [*(first for first, _ in tail.chunks[1:]), tail.first]
        for (first, blob), end in zip(tail.chunks, ends[: len(tail.chunks)], strict=True):
            if end > begin:
                try:
                    content = await tools.blobs.whole(blob, first=[author])
                    old = msgspec.msgpack.decode(content, type=list[tuple[float, str]])
                except (MycelError, msgspec.MsgspecError, UnicodeDecodeError) as error:
                    log.info("old lines of %s about job %s cannot be read: %s", author, entry.id, error)
                    continue
                pairs += [(number, at, text) for number, (at, text) in enumerate(old, first)]
        pairs += [(number, at, text) for number, (at, text) in enumerate(tail.lines, tail.first)]
        return [LogLine(at, author, label, number, text) for number, at, text in pairs if number >= begin]

    async def content(self, name: str, artefact: str) -> AsyncGenerator[bytes, None]:
        """A result of the job, piece by piece.

        Raises `JobUnknown`, `ArtefactUnknown`, `DeadlineExceeded` where nobody in reach has it.
        """
        tools = await self._ready()
        entry = self.find(name)
        state = entry.state
        if state is None or artefact not in state.artefacts:
            known = ", ".join(sorted(state.artefacts)) if state is not None else ""
            raise ArtefactUnknown(
                f"job {entry.id[:8]} has no {artefact!r}; so far it has: {known or 'nothing'}"
            )
        blob, holder = state.artefacts[artefact], PeerId(state.lease.holder)
        async with aclosing(tools.blobs.read(blob, first=[holder])) as pieces:
            async for piece in pieces:
                yield piece

    # --- what comes in

    async def changed(self, job: str) -> None:
        """Wait until the book learns something of a job."""
        bell = self._bells.setdefault(job, trio.Event())
        await bell.wait()

    def _take(self, fact: Fact) -> None:
        self._ring(self.book.take(fact))

    def _put(self, fact: Fact) -> None:
        self._ring(self.book.put(fact))

    def _ring(self, job: str | None) -> None:
        if job is None:
            return
        bell = self._bells.pop(job, None)
        if bell is not None:
            bell.set()
        self._leave_to_ender(job)
        self._attend()

    def _leave_to_ender(self, job: str) -> None:
        """Where a job stands in the document of whoever ended it, it need not stand in this node's too."""
        entry, own = self.book.get(job), self._place.mesh.peer_id
        if entry is None or self._tools is None or not entry.is_ended:
            return
        self._voting.close(_job_of(entry))
        if entry.ender in (None, own):
            return
        if own in entry.carriers or own in entry.states:
            for what in (JOB, STOP, STATE):
                self._tools.desk.say(key_of(job, what), None)

    def _attend(self) -> None:
        """See to it that every job that is to be worked on is attended."""
        if self._nursery is None or self._tools is None or self._is_leaving:
            return
        for entry, job in self.book.active():
            runner = self.runners.get(job.kind)
            if job.id in self._attended or runner is None or self._place.own_access() < Access.MEMBER:
                continue
            if self._voting.is_closed(job.id):
                continue
            attendance = Attendance(self._tools, entry, job, runner, self._place.takes_part)
            self._attended[job.id] = attendance
            self._nursery.start_soon(self._see_through, attendance)

    async def _see_through(self, attendance: Attendance) -> None:
        job = attendance.job.id
        try:
            await attendance.run()
        except Exception:  # boundary: a bug over one job must not end the others
            log.exception("job %s is not attended any more", job)
            return
        del self._attended[job]
        self._tidy()

    def _make_room(self, gone: Sequence[str]) -> str | None:
        """The job that ended longest ago of those that this node speaks of, or one that nobody knows."""
        assert self._tools is not None
        kept = [*self._attended, *gone]
        own = [job for job in self._tools.desk.own_jobs() if job not in kept]
        known = [job.id for entry, job in self.book.entries() if entry.is_ended]
        unknown = [job for job in own if self.book.get(job) is None]
        return next((job for job in [*unknown, *known] if job in own), None)

    def _tidy(self) -> None:
        """Say nothing more of jobs that this node ended long ago."""
        assert self._tools is not None
        own = self._place.mesh.peer_id
        ended = [job.id for entry, job in self.book.entries() if entry.ender == own]
        for job in ended[: -self._limits.kept]:
            self._tools.desk.forget(job)

    async def _clear_up(self, key: str) -> None:
        job = key.removeprefix(PREFIX).partition("/")[0]
        if self.book.get(job) is None and job not in self._attended and self._tools is not None:
            self._tools.desk.forget(job)
            await self._tools.blobs.forget(job)
            self._voting.forget(job)
            self.gate.forget(job)
            self._bells.pop(job, None)

    def _carry(self, entry: Entry, what: str, value: bytes) -> None:
        """Let something that others signed stand in this node's document too."""
        if self._place.own_access() >= Access.MEMBER and self._tools is not None:
            self._tools.desk.say(key_of(entry.id, what), value)

    async def _ready(self) -> Tools:
        await self._opened.wait()
        assert self._tools is not None
        return self._tools


def _job_of(entry: Entry) -> Job:
    if entry.job is None:
        raise JobUnknown(f"job {entry.id[:8]} is not here yet")
    return entry.job


__all__ = ["ArtefactUnknown", "JobInvalid", "JobUnknown", "Jobs", "Place", "Refused"]
