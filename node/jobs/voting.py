"""What electors are asked: promises, renewals, and to keep what a coordinator must not lose.

    jobs.ask      may I coordinate this job in this epoch?     -> a signed vote, and how the job stood
    jobs.renew    may I go on?
    jobs.release  I do not, or no longer
    jobs.note     this is how the job stands: remember it      (refused once somebody else was promised)
    jobs.hold     hold these blobs for the job                 (the same)
    jobs.offer    a new job: know it, and hold its inputs      (submitters may call this)
    jobs.halt     it is to stop                                (the same)

A promise is on the disk before the vote leaves. The best state that an elector knows goes along with its
vote, and what a majority noted is therefore known to the next coordinator, whatever documents still have to
travel.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Annotated

import msgspec
import trio
from msgspec import Meta

from mycel.dht.block.model import Sources
from mycel.node.jobs.book import Book, Entry
from mycel.node.jobs.keep import INPUTS, Blobs
from mycel.node.jobs.lease import Answer, Elector, Epoch, JobId, Lease, Promise, check_lease, vote_bytes
from mycel.node.jobs.record import JOB, STATE, STOP, Stop, key_of
from mycel.node.jobs.spec import Blob, Envelope, Job, id_of
from mycel.node.memory import Memory
from mycel.protocol.board import Fact
from mycel.protocol.errors import Refused
from mycel.protocol.limits_jobs import DEFAULT_JOB_LIMITS as LIMITS
from mycel.protocol.mesh import Access, Mesh, PeerId
from mycel.protocol.method import Call, Method
from mycel.protocol.rpc import Rpc

log = logging.getLogger("mycel.jobs")

PROMISES = "job-promises"
"""What the node remembers its promises under."""


class Ask(msgspec.Struct, frozen=True):
    """For `jobs.ask`, `jobs.renew` and `jobs.release`."""

    job: JobId
    epoch: Epoch


class AskReply(msgspec.Struct, frozen=True):
    """The vote's signature, empty where there is none."""

    answer: Answer
    signature: bytes = b""
    author: str = ""
    state: bytes = b""
    """How the job stands by the elector's book, and who says so."""


class Note(msgspec.Struct, frozen=True):
    """A coordinator's state."""

    job: JobId
    state: Annotated[bytes, Meta(max_length=LIMITS.state_bytes)]


class Hold(msgspec.Struct, frozen=True):
    """Blobs for a slot, in the place of those that it held."""

    lease: Lease
    slot: Annotated[str, Meta(max_length=160)]
    blobs: Annotated[list[Blob], Meta(max_length=2 * LIMITS.parts + LIMITS.artefacts)]


class Offer(msgspec.Struct, frozen=True):
    """A new job."""

    envelope: Envelope


class Offered(msgspec.Struct, frozen=True):
    """The job's id, as the elector reads it."""

    job: JobId


class Halt(msgspec.Struct, frozen=True):
    """The word to stop a job."""

    stop: Stop


class Done(msgspec.Struct, frozen=True):
    """It was done."""


ASK = Method("jobs.ask", Ask, AskReply, access=Access.MEMBER)
RENEW = Method("jobs.renew", Ask, AskReply, access=Access.MEMBER, idempotent=True)
RELEASE = Method("jobs.release", Ask, Done, access=Access.MEMBER, idempotent=True)
NOTE = Method("jobs.note", Note, Done, access=Access.MEMBER, idempotent=True)
HOLD = Method("jobs.hold", Hold, Done, access=Access.MEMBER, idempotent=True)
OFFER = Method("jobs.offer", Offer, Offered, access=Access.SUBMIT, idempotent=True)
HALT = Method("jobs.halt", Halt, Done, access=Access.SUBMIT, idempotent=True)

PutFact = Callable[[Fact], object]
Carry = Callable[[Entry, str, bytes], None]
"""Lets what others signed about a job stand in this node's own document too."""


class Voting:
    """This node as an elector."""

    def __init__(self, mesh: Mesh, rpc: Rpc, memory: Memory, book: Book, put: PutFact) -> None:
        """`put` puts a fact into the book, as `Book.put`, and wakes who waits for it."""
        self._mesh = mesh
        self._memory = memory
        self._book = book
        self._put = put
        self._kept = _read(memory)
        self._elector = Elector(self._kept, trio.current_time())
        self._opened: Blobs | None = None
        self._carry: Carry = lambda entry, what, value: None
        rpc.serve(ASK, self._on_ask)
        rpc.serve(RENEW, self._on_renew)
        rpc.serve(RELEASE, self._on_release)
        rpc.serve(NOTE, self._on_note)
        rpc.serve(HOLD, self._on_hold)
        rpc.serve(OFFER, self._on_offer)
        rpc.serve(HALT, self._on_halt)

    def open(self, blobs: Blobs, carry: Carry) -> None:
        """Blocks and the own document can be used from now on."""
        self._opened = blobs
        self._carry = carry

    def promised(self, job: str) -> int:
        """The highest epoch that this node promised anybody."""
        promise = self._elector.promises.get(job)
        return 0 if promise is None else promise.epoch

    def close(self, job: Job) -> None:
        """A job has ended: this elector promises nobody anything any more."""
        if self._mesh.peer_id in job.electors and not self._elector.is_closed(job.id):
            self._elector.close(job.id)
            with contextlib.suppress(Refused):  # it is kept with the next promise
                self._keep()

    def is_closed(self, job: str) -> bool:
        """Whether this elector knows that the job has ended."""
        return self._elector.is_closed(job)

    def forget(self, job: str) -> None:
        """A job is gone."""
        self._elector.forget(job)

    async def _on_ask(self, call: Call, ask: Ask) -> AskReply:
        entry, job = self._known(ask.job, call.peer)
        answer = self._elector.ask(job.id, ask.epoch, call.peer, trio.current_time())
        if not answer.granted:
            return AskReply(answer)
        if self._kept.get(job.id) != self._elector.promises[job.id]:
            self._keep()
        signature = self._mesh.sign(vote_bytes(job.id, ask.epoch, call.peer))
        if entry.state is None:
            return AskReply(answer, signature)
        state = msgspec.msgpack.encode(entry.state)
        return AskReply(answer, signature, entry.state.lease.holder, state)

    async def _on_renew(self, call: Call, ask: Ask) -> AskReply:
        _, job = self._known(ask.job, call.peer)
        return AskReply(self._elector.renew(job.id, ask.epoch, call.peer, trio.current_time()))

    async def _on_release(self, call: Call, ask: Ask) -> Done:
        self._elector.release(ask.job, ask.epoch, call.peer, trio.current_time())
        return Done()

    async def _on_note(self, call: Call, note: Note) -> Done:
        entry, job = self._known(note.job, call.peer, ended=True)
        self._put(Fact(call.peer, key_of(job.id, STATE), note.state))
        noted = entry.states.get(call.peer)
        if noted is not None:
            self._check_epoch(job, noted.lease.epoch)
        return Done()

    async def _on_hold(self, call: Call, hold: Hold) -> Done:
        _, job = self._known(hold.lease.job, call.peer)
        if hold.lease.holder != call.peer:
            raise Refused(f"{call.peer} shows a lease of {hold.lease.holder}", reason="unproven")
        check_lease(hold.lease, job, self._mesh.verify)
        self._check_epoch(job, hold.lease.epoch)
        await self._blobs().hold(job.id, hold.slot, hold.blobs, Sources(first=[call.peer]))
        return Done()

    async def _on_offer(self, call: Call, offer: Offer) -> Offered:
        name = id_of(offer.envelope.body)
        if self._book.get(name) is None:
            self._put(Fact(call.peer, key_of(name, JOB), msgspec.msgpack.encode(offer.envelope)))
        entry = self._book.get(name)
        assert entry is not None
        assert entry.job is not None
        job = entry.job
        active = [one for _, one in self._book.active() if one.submitter == job.submitter]
        if job not in active:
            raise Refused(
                f"{job.submitter} has {LIMITS.active} jobs that are not ended: wait, or stop one",
                reason="too-many",
            )
        self._carry(entry, JOB, entry.envelope)
        if self._mesh.peer_id in job.electors and job.inputs:
            is_member = call.access >= Access.MEMBER
            sources = Sources(first=[call.peer]) if is_member else Sources(only=[call.peer])
            await self._blobs().hold(job.id, INPUTS, list(job.inputs.values()), sources)
        return Offered(job.id)

    async def _on_halt(self, call: Call, halt: Halt) -> Done:
        entry = self._book.get(halt.stop.job)
        if entry is None:
            raise Refused(f"job {halt.stop.job[:8]} is not known here (yet)", reason="unknown-job")
        value = msgspec.msgpack.encode(halt.stop)
        self._put(Fact(call.peer, key_of(entry.id, STOP), value))
        self._carry(entry, STOP, value)
        return Done()

    def _known(self, name: str, caller: PeerId, *, ended: bool = False) -> tuple[Entry, Job]:
        entry = self._book.get(name)
        if entry is None or entry.job is None:
            raise Refused(f"job {name[:8]} is not known here (yet)", reason="unknown-job")
        if self._mesh.peer_id not in entry.job.electors or caller not in entry.job.electors:
            raise Refused(f"not both of us are electors of job {name[:8]}", reason="not-elector")
        if entry.is_ended and not ended:
            raise Refused(f"job {name[:8]} is ended", reason="ended")
        return entry, entry.job

    def _check_epoch(self, job: Job, epoch: int) -> None:
        if epoch < self.promised(job.id):
            raise Refused(
                f"epoch {epoch} of job {job.id[:8]} is over: {self.promised(job.id)} was promised",
                reason="stale-epoch",
            )

    def _blobs(self) -> Blobs:
        if self._opened is None:
            raise Refused("this node's blocks are not open yet; ask again in a moment", reason="busy")
        return self._opened

    def _keep(self) -> None:
        kept = dict(self._elector.promises)
        try:
            self._memory.put(PROMISES, msgspec.json.encode(kept))
        except OSError as error:
            raise Refused(f"this elector cannot keep its promise: {error.strerror}", reason="disk") from None
        self._kept = kept


def _read(memory: Memory) -> dict[str, Promise]:
    kept = memory.get(PROMISES)
    if kept is None:
        return {}
    try:
        return msgspec.json.decode(kept, type=dict[str, Promise])
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        log.warning("what was promised to coordinators of jobs cannot be read (%s)", error)
        return {}
