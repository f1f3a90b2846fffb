"""Bounds of jobs (`mycel.node.jobs`), each with its unit and the reason for its size."""

from __future__ import annotations

from dataclasses import dataclass

from mycel.protocol.limits import KIB, MIB


@dataclass(frozen=True, slots=True)
class JobLimits:
    """See `mycel.node.jobs`."""

    file_bytes: int = 64 * KIB
    """A job.toml."""

    spec_bytes: int = 4 * KIB
    """A job's keys and values; what is larger is a file, and files are blocks."""

    body_bytes: int = 8 * KIB
    """A job as it is signed: spec, electors and inputs."""

    chain_bytes: int = 1 * KIB
    """What shows that a submitter may submit."""

    inputs: int = 8
    """Files that a job brings."""

    input_bytes: int = 256 * MIB
    """One of them, through the command line."""

    electors: int = 5
    """Electors chosen for a job: two of them may be gone."""

    lease_s: float = 2.0
    """A lease's life from its last renewal, by each elector's clock: a dead coordinator is replaced after
    this. Much shorter, and a pause of the machine takes a lease away."""

    renew_s: float = 0.4
    """How often a lease is renewed: four may be lost."""

    drift: float = 0.02
    """By how much two clocks may differ in rate; quartz is off by 0.0001, a virtual machine by more."""

    stand_s: float = 0.4
    """Electors stand one after the other, this far apart: an election takes a round trip or two."""

    call_s: float = 1.5
    """Deadline of a question to an elector: less than a lease, or its answer would be worth nothing."""

    epoch_max: int = 1 << 53
    """A fencing token stays a number that every language counts exactly."""

    tries: int = 5
    """How often in a row, without a checkpoint between, a job may fail before it has failed."""

    retry_s: float = 1.0
    """Wait after the first of these failures; it doubles."""

    mirror_s: float = 0.5
    """How often progress is written into documents, at most: each write is a signature, a sync of the disk,
    and news for everybody."""

    state_bytes: int = 8 * KIB
    """A job's state in a document."""

    value_bytes: int = 10 * KIB
    """Anything that a document says of a job: a signed job with its chain is the largest."""

    metrics: int = 64
    """Figures of a job, by name."""

    artefacts: int = 32
    """Results of a job, by name."""

    inline_bytes: int = 1 * KIB
    """A checkpoint as large as this stands in the document itself; a larger one is a block."""

    log_bytes: int = 2 * KIB
    """Lines of a peer about a job that stand in its document; older ones are in blocks."""

    log_chunks: int = 48
    """Blocks of older lines that are kept, the latest ones: 100 kB."""

    line_chars: int = 500
    """A log line; the rest is cut."""

    kept: int = 24
    """Ended jobs whose traces a node keeps in its document; with 3 kB each they take half of it. Where it is
    full all the same, the oldest go earlier."""

    closed: int = 1024
    """Ended jobs that an elector remembers, so that nobody does them again: 50 kB."""

    active: int = 16
    """Jobs of one submitter that are not ended; more are refused, so that nobody fills the others' hands."""

    root_bytes: int = 2 * MIB
    """The block that lists a blob's blocks; so many lists 122 GB."""

    blob_bytes: int = 1 << 36
    """Bytes of one blob."""

    copies: int = 2
    """Electors besides the coordinator that must hold a blob before it counts as kept, where so many are in
    reach."""

    copy_s: float = 30.0
    """How long the coordinator waits for them: a checkpoint of a small model over a home's uplink."""

    parts: int = 24
    """Blobs of completions before they are merged."""

    flush_s: float = 1.0
    """Completions that are not kept yet: so much work is done again after a crash."""

    prompts: int = 1_000_000
    """Prompts of one job."""

    prompt_chars: int = 1 << 20
    """One prompt."""


DEFAULT_JOB_LIMITS = JobLimits()
