"""The seam between jobs and what a kind of job does: a `Runner` for each kind, given a `Context`.

Jobs know nothing of training or generation, runners know nothing of electors, leases and documents. On the
peer that holds a job's lease the service runs `Runner.coordinate`; on every member whose owner takes part in
jobs, that one included, it runs `Runner.take_part` as long as the job goes on. Either may be cancelled at any
await and started again, here or elsewhere:

- `coordinate` ends when the job is done. It is cancelled when the lease is lost or the job is stopped. Then
  another peer, or this one, calls it again, and `resume` gives it what the last `checkpoint` kept: work that
  was checkpointed is not done again, and what was done after it must do no harm when it is done twice.
- `take_part` ends when it likes; it is cancelled when the job ends. It lives through changes of the
  coordinator: `epoch` and `coordinator` follow.

Calls between the two are the runner's own methods (`context.rpc`), served once when the runner is made. Each
carries `context.lease`, and whoever is called checks it by `Fence.check` before it acts: orders of a
coordinator that lost its lease without knowing are refused there.

A job fails for good where `coordinate` raises `JobFailed`; any other `MycelError`, or a bug, lets go of the
lease and is tried again by whoever takes it over, a few times.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import msgspec

from mycel.dht.block.exchange import Exchange
from mycel.dht.doc.sync import Documents
from mycel.node.jobs.kinds import Spec
from mycel.node.jobs.lease import Lease
from mycel.node.jobs.spec import Blob, Job
from mycel.protocol.errors import LocalProtocolError, MycelError
from mycel.protocol.mesh import Mesh, PeerId
from mycel.protocol.rpc import Rpc


class JobFailed(MycelError):
    """The job cannot be done by anybody, and trying again would not help. The text says why."""


class Fence(Protocol):
    """Keeps out coordinators whose lease is over."""

    def check(self, peer: PeerId, lease: Lease) -> Job:
        """The job that `peer` coordinates by `lease`.

        Raises `Refused` with reason "unknown-job", "ended", "unproven" (its electors did not say so, or
        somebody else holds it) or "stale-epoch" (a later epoch was seen here).
        """


class Context(Protocol):
    """What a runner has of its node and of its job."""

    @property
    def mesh(self) -> Mesh: ...
    @property
    def rpc(self) -> Rpc: ...
    @property
    def documents(self) -> Documents: ...
    @property
    def blocks(self) -> Exchange:
        """Blocks of this node (`.store`) and of others."""

    @property
    def is_coordinator(self) -> bool:
        """Whether this context belongs to `coordinate`."""

    @property
    def lease(self) -> Lease:
        """The coordinator's lease, with its electors' signatures: goes along with every call."""

    @property
    def epoch(self) -> int:
        """The fencing token: rises with every new lease of this job, never falls."""

    @property
    def coordinator(self) -> PeerId:
        """Who holds the lease, as far as is known here."""

    async def next_epoch(self, above: int) -> int:
        """Wait until `epoch` is above that; the epoch."""

    def label(self, peer: PeerId) -> str:
        """What a peer calls itself, for logs."""

    def members(self) -> Sequence[PeerId]:
        """Connected members and this node, ordered by id."""

    def log(self, line: str) -> None:
        """Say something to those who read `mycel logs`; any peer sees it. Never raises, never waits."""

    def report(self, step: int, metrics: Mapping[str, float] | None = None, *, steps: int = 0) -> None:
        """Say how far the job is: `step` of `steps` (0: not known), and figures by name, which replace
        those of the same name. Any peer sees it. Never waits. The coordinator's only."""

    async def keep(self, content: bytes | Path) -> Blob:
        """Keep bytes, or a file's, as blocks here, until the next checkpoint: name it in that, and it is
        kept here and at other electors as long as that checkpoint is the last.

        Raises what the block store raises. The coordinator's only.
        """

    async def fetch(self, blob: Blob) -> bytes:
        """What was kept, from wherever it is. Raises `DeadlineExceeded` where nobody has it."""

    async def artefact(self, name: str, content: bytes | Path) -> Blob:
        """Keep a result of the job under a file name; `mycel pull` fetches it. The coordinator's only."""

    async def checkpoint(self, state: bytes, blobs: Sequence[Blob] = ()) -> None:
        """From here on `resume` gives this, at whichever peer. `blobs` are all those that `state` refers to.
        The coordinator's only."""

    async def resume(self) -> bytes | None:
        """What was checkpointed last, None where nothing was. Raises `DeadlineExceeded` where it is gone."""


class Runner(Protocol):
    """What a kind of job does. One object for all jobs of its kind at a node."""

    @property
    def kind(self) -> str:
        """The `kind` of the jobs that it runs, as in job.toml."""

    async def coordinate(self, job: Job, context: Context) -> None:
        """Bring the job to its end."""

    async def take_part(self, job: Job, context: Context) -> None:
        """Work for the job at this node."""


@runtime_checkable
class Checker(Protocol):
    """What a runner may have besides: a look at a job before it is submitted."""

    async def check(self, spec: Spec, files: Mapping[str, bytes | Path]) -> None:
        """Raise `JobInvalid` for a spec or files (by key) that can only fail."""


class Services(msgspec.Struct, frozen=True):
    """What runners are made of, at the start of a node: they serve their methods then."""

    mesh: Mesh
    rpc: Rpc
    documents: Documents
    fence: Fence
    takes_part: bool
    """Whether this node's owner lets it work for jobs."""


class Runners:
    """The runners of a node, by kind."""

    def __init__(self, runners: Sequence[Runner] = ()) -> None:
        self._by_kind: dict[str, Runner] = {}
        for runner in runners:
            self.add(runner)

    def add(self, runner: Runner) -> None:
        """Raises `LocalProtocolError` for a kind that has one."""
        if runner.kind in self._by_kind:
            raise LocalProtocolError(f"there is a runner of {runner.kind} jobs already")
        self._by_kind[runner.kind] = runner

    def get(self, kind: str) -> Runner | None:
        """The runner of that kind, None where this node cannot run such jobs."""
        return self._by_kind.get(kind)

    @property
    def kinds(self) -> str:
        """What there are runners of, for people."""
        return ", ".join(sorted(self._by_kind))
