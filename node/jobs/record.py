"""What peers say of a job in their documents: that it is to stop, how it stands, what was logged.

Keys are `jobs/ID/WHAT`. The job itself (`job`, an `Envelope`) may stand in anybody's document, and so may
the word to stop it (`stop`): both are signed by those who may say so. How it stands (`state`) is the
coordinator's to say: it counts only from the peer whose lease is in it, proven by its electors' votes.
Lines (`log`) each peer says for itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta

from mycel.node.jobs.lease import JobId, Lease, check_lease
from mycel.node.jobs.spec import Blob, Envelope, Job, PeerText, open_body, signed_bytes
from mycel.protocol.errors import Refused
from mycel.protocol.identity import in_domain
from mycel.protocol.limits_jobs import DEFAULT_JOB_LIMITS as LIMITS
from mycel.protocol.mesh import Access, PeerId

PREFIX = "jobs/"
JOB, STOP, STATE, LOG = "job", "stop", "state", "log"
STOP_DOMAIN = "job stop 1"

RUNNING, DONE, FAILED, STOPPED = "running", "done", "failed", "stopped"
ENDED = (DONE, FAILED, STOPPED)

T = TypeVar("T")
AccessOf = Callable[[PeerId, bytes], Access]
"""What a peer may do in this swarm, by the chain that it shows; STRANGER for one that does not hold."""
Verify = Callable[[PeerId, bytes, bytes], bool]


class Stop(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The word of a job's submitter, or of an admin, that it is to stop."""

    job: JobId
    by: PeerText
    signature: Annotated[bytes, Meta(max_length=64)]
    chain: Annotated[bytes, Meta(max_length=LIMITS.chain_bytes)]


class State(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """How a job stands, by its coordinator."""

    lease: Lease
    number: Annotated[int, Meta(ge=0, le=1 << 53)]
    """Counts the states of this lease."""
    phase: Annotated[str, Meta(pattern="^(running|done|failed|stopped)$")]
    step: Annotated[int, Meta(ge=0, le=1 << 53)]
    steps: Annotated[int, Meta(ge=0, le=1 << 53)]
    """0: not known."""
    metrics: Annotated[dict[Annotated[str, Meta(max_length=64)], float], Meta(max_length=LIMITS.metrics)]
    artefacts: Annotated[dict[Annotated[str, Meta(max_length=128)], Blob], Meta(max_length=LIMITS.artefacts)]
    inline: Annotated[bytes, Meta(max_length=LIMITS.inline_bytes)] | None
    """A small checkpoint."""
    blob: Blob | None
    """A larger one."""
    failures: Annotated[int, Meta(ge=0, le=1 << 20)]
    """Tries in a row that failed."""
    text: Annotated[str, Meta(max_length=1024)]
    """Why it failed, or what it waits for."""
    began: float
    updated: float
    """Seconds since 1970."""

    @property
    def is_ended(self) -> bool:
        """Whether nothing more will happen."""
        return self.phase in ENDED


class LogTail(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A peer's latest lines about a job."""

    first: Annotated[int, Meta(ge=0, le=1 << 53)]
    """The number of the first of them; numbers go on over restarts."""
    lines: Annotated[tuple[tuple[float, str], ...], Meta(max_length=LIMITS.log_bytes)]
    """When (seconds since 1970), and what."""
    chunks: Annotated[
        tuple[tuple[Annotated[int, Meta(ge=0, le=1 << 53)], Blob], ...], Meta(max_length=LIMITS.log_chunks)
    ]
    """Older lines: the number of the first, and a blob with the same pairs as msgpack."""


def key_of(job: str, what: str) -> str:
    """Where something about a job stands."""
    return f"{PREFIX}{job}/{what}"


def open_envelope(envelope: Envelope, access_of: AccessOf, verify: Verify) -> Job:
    """The job, if its submitter signed it and may submit.

    Raises `Refused` with reason "malformed", "oversized", "unknown-kind", "forged" or "foreign".
    """
    job = open_body(envelope.body)
    if not verify(job.submitter, signed_bytes(envelope.body), envelope.signature):
        raise Refused(f"job {job.id[:8]} is not signed by {job.submitter}", reason="forged")
    if access_of(job.submitter, envelope.chain) < Access.SUBMIT:
        raise Refused(
            f"{job.submitter} shows nothing that lets it submit jobs to this swarm; it needs a ticket",
            reason="foreign",
        )
    return job


def check_stop(stop: Stop, job: Job, access_of: AccessOf, verify: Verify) -> None:
    """Raise `Refused` ("forged", "foreign") unless somebody who may stop the job signed."""
    by = PeerId(stop.by)
    if not verify(by, stop_bytes(stop.job, by), stop.signature):
        raise Refused(f"{by} did not say that job {job.id[:8]} is to stop", reason="forged")
    if by != job.submitter and access_of(by, stop.chain) < Access.ADMIN:
        raise Refused(
            f"job {job.id[:8]} is stopped by its submitter ({job.submitter}) or an admin", reason="foreign"
        )


def stop_bytes(job: str, by: PeerId) -> bytes:
    """What is signed to stop a job."""
    return in_domain(STOP_DOMAIN, f"{job}\n{by}".encode())


def check_state(state: State, job: Job, author: PeerId, verify: Verify) -> None:
    """Raise `Refused` (unproven) for a state that is not by the holder of the lease in it."""
    if state.lease.holder != author:
        raise Refused(f"{author} says how a job stands that {state.lease.holder} runs", reason="unproven")
    check_lease(state.lease, job, verify)


def decode(data: bytes, kind: type[T]) -> T:
    """What stands in a document. Raises `Refused` (malformed, oversized)."""
    if len(data) > LIMITS.value_bytes:
        raise Refused(f"{len(data)} bytes about a job; at most {LIMITS.value_bytes}", reason="oversized")
    try:
        return msgspec.msgpack.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Refused(f"what is said of a job cannot be read: {error}", reason="malformed") from None
