"""The `Context` of a runner: a job at one node, as coordinator or as participant.

The coordinator's holds the job's state and says how it stands. A checkpoint counts when its blocks are here
and at two other electors (or as many as there are in reach), this node's document is on the disk, and a
majority of electors were told: whoever wins the next election asks one of those.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import trio

from mycel.dht.block.exchange import Exchange
from mycel.dht.doc.sync import Documents
from mycel.node.jobs.book import Entry
from mycel.node.jobs.desk import Desk
from mycel.node.jobs.keep import CHECKPOINT, Blobs
from mycel.node.jobs.lease import Lease
from mycel.node.jobs.record import RUNNING, STATE, State, key_of
from mycel.node.jobs.spec import Blob, Job
from mycel.node.jobs.standing import Holding
from mycel.node.jobs.voting import HOLD, NOTE, Done, Hold, Note
from mycel.protocol.board import Fact
from mycel.protocol.errors import LimitExceeded, LocalProtocolError, MycelError, Refused
from mycel.protocol.limits_jobs import DEFAULT_JOB_LIMITS, JobLimits
from mycel.protocol.mesh import Access, Mesh, PeerId
from mycel.protocol.rpc import Rpc

log = logging.getLogger("mycel.jobs")


@dataclass(frozen=True, slots=True)
class Tools:
    """What contexts have of their node."""

    mesh: Mesh
    rpc: Rpc
    documents: Documents
    blobs: Blobs
    desk: Desk
    label: Callable[[PeerId], str]
    changed: Callable[[str], Awaitable[None]]
    """Waits until the book learns more of a job."""
    take: Callable[[Fact], object]
    """Puts a fact into the book."""
    limits: JobLimits = DEFAULT_JOB_LIMITS


class Work:
    """See `Context`. `holding` None: a participant's."""

    def __init__(self, tools: Tools, entry: Entry, job: Job, holding: Holding | None = None) -> None:
        self._tools = tools
        self._entry = entry
        self._job = job
        self._holding = holding
        self._lock = trio.Lock()
        self.state: State | None = None
        """The coordinator's."""
        if holding is not None:
            self.state = self._begun(holding.lease, entry.state)

    def _begun(self, lease: Lease, last: State | None) -> State:
        now = self.mesh.wall()
        if last is None:
            return State(lease, 0, RUNNING, 0, 0, {}, {}, None, None, 0, "", now, now)
        return msgspec.structs.replace(last, lease=lease, number=0, phase=RUNNING, updated=now)

    # --- what a runner reads

    @property
    def mesh(self) -> Mesh:
        """See `Context.mesh`."""
        return self._tools.mesh

    @property
    def rpc(self) -> Rpc:
        """See `Context.rpc`."""
        return self._tools.rpc

    @property
    def documents(self) -> Documents:
        """See `Context.documents`."""
        return self._tools.documents

    @property
    def blocks(self) -> Exchange:
        """See `Context.blocks`."""
        return self._tools.blobs.exchange

    @property
    def is_coordinator(self) -> bool:
        """See `Context.is_coordinator`."""
        return self._holding is not None

    @property
    def lease(self) -> Lease:
        """See `Context.lease`."""
        lease = self._entry.lease if self._holding is None else self._holding.lease
        if lease is None:
            raise LocalProtocolError("nobody coordinates this job yet")
        return lease

    @property
    def epoch(self) -> int:
        """See `Context.epoch`."""
        return self.lease.epoch

    @property
    def coordinator(self) -> PeerId:
        """See `Context.coordinator`."""
        return PeerId(self.lease.holder)

    async def next_epoch(self, above: int) -> int:
        """See `Context.next_epoch`."""
        while self.epoch <= above:
            await self._tools.changed(self._job.id)
        return self.epoch

    def label(self, peer: PeerId) -> str:
        """See `Context.label`."""
        return self._tools.label(peer)

    def members(self) -> Sequence[PeerId]:
        """See `Context.members`."""
        infos = self.mesh.peers.values()
        others = [info.peer for info in infos if info.access >= Access.MEMBER]
        return sorted([*others, self.mesh.peer_id])

    # --- what a runner says

    def log(self, line: str) -> None:
        """See `Context.log`."""
        self._tools.desk.log(self._job.id, line)

    def report(self, step: int, metrics: Mapping[str, float] | None = None, *, steps: int = 0) -> None:
        """See `Context.report`."""
        state = self._own_state()
        figures = {**state.metrics, **{name: float(value) for name, value in (metrics or {}).items()}}
        if len(figures) > self._tools.limits.metrics:
            raise LimitExceeded(f"a job has at most {self._tools.limits.metrics} figures")
        self.change(step=step, steps=steps or state.steps, metrics=figures)
        self._tools.desk.say(self._key, self._encoded())

    async def keep(self, content: bytes | Path) -> Blob:
        """See `Context.keep`."""
        self._own_state()
        return await self._tools.blobs.add(self._job.id, content)

    async def fetch(self, blob: Blob) -> bytes:
        """See `Context.fetch`."""
        return await self._tools.blobs.whole(blob, first=self._others)

    async def artefact(self, name: str, content: bytes | Path) -> Blob:
        """See `Context.artefact`."""
        state = self._own_state()
        if name not in state.artefacts and len(state.artefacts) >= self._tools.limits.artefacts:
            raise LimitExceeded(f"a job has at most {self._tools.limits.artefacts} results")
        async with self._lock:
            blob = await self._tools.blobs.add(self._job.id, content)
            await self._hold(f"artefact/{name}", [blob])
            self.change(artefacts={**self._own_state().artefacts, name: blob})
            await self.publish()
        return blob

    async def checkpoint(self, state: bytes, blobs: Sequence[Blob] = ()) -> None:
        """See `Context.checkpoint`."""
        self._own_state()
        async with self._lock:
            fresh = self._tools.blobs.fresh(self._job.id)
            inline: bytes | None = state
            blob: Blob | None = None
            if len(state) > self._tools.limits.inline_bytes:
                inline, blob = None, await self._tools.blobs.add(self._job.id, state)
            await self._hold(CHECKPOINT, [*blobs, *([blob] if blob else [])])
            self.change(inline=inline, blob=blob, failures=0, text="")
            await self.publish()
            await self._tools.blobs.settle(fresh)

    async def resume(self) -> bytes | None:
        """See `Context.resume`."""
        state = self._own_state()
        return state.inline if state.blob is None else await self.fetch(state.blob)

    # --- how the coordinator's state gets around

    def change(self, **fields: object) -> None:
        """The state, with these fields instead."""
        state = self._own_state()
        self.state = msgspec.structs.replace(
            state, number=state.number + 1, updated=self.mesh.wall(), **fields
        )

    async def publish(self) -> None:
        """Write the state, and tell a majority of electors, as far as they can be reached.

        Raises `LimitExceeded` where it finds no room in this node's document, `Refused` (stale-epoch) once
        the lease is over: what is written then could be taken for the end of a job that goes on elsewhere.
        """
        if self._holding is None or not self._holding.is_held:
            raise Refused(f"the lease of job {self._job.id[:8]} is over here", reason="stale-epoch")
        encoded = self._encoded()
        await self._tools.desk.say_now({self._key: encoded})
        self._tools.take(Fact(self.mesh.peer_id, self._key, encoded))
        note = Note(self._job.id, encoded)
        limit_s = self._tools.limits.call_s
        enough = self._job.majority - 1
        await self._tell(lambda at: self.rpc.call(at, NOTE, note, deadline_s=limit_s), enough)

    async def _hold(self, slot: str, blobs: Sequence[Blob]) -> None:
        """Keep blobs in a slot, here and at other electors."""
        await self._tools.blobs.hold(self._job.id, slot, blobs)
        ask = Hold(self.lease, slot, list(blobs))
        limits = self._tools.limits
        await self._tell(lambda at: self.rpc.call(at, HOLD, ask, deadline_s=limits.copy_s), limits.copies)

    async def _tell(self, tell: Callable[[PeerId], Awaitable[Done]], enough: int) -> None:
        """Tell the other electors until `enough` of them confirmed, or all did or failed."""
        confirmed = 0

        async def tell_one(elector: PeerId) -> None:
            nonlocal confirmed
            try:
                await tell(elector)
            except MycelError as error:
                log.info("elector %s of job %s: %s", elector, self._job.id, error)
                return
            confirmed += 1
            if confirmed >= enough:
                nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            for elector in self._others:
                if elector in self.mesh.peers:
                    nursery.start_soon(tell_one, elector)

    @property
    def _others(self) -> list[PeerId]:
        return [elector for elector in self._job.electors if elector != self.mesh.peer_id]

    @property
    def _key(self) -> str:
        return key_of(self._job.id, STATE)

    def _encoded(self) -> bytes:
        encoded = msgspec.msgpack.encode(self._own_state())
        if len(encoded) > self._tools.limits.state_bytes:
            raise LimitExceeded(
                f"how the job stands takes {len(encoded)} bytes, more than {self._tools.limits.state_bytes}:"
                " name fewer figures and results"
            )
        return encoded

    def _own_state(self) -> State:
        if self.state is None:
            raise LocalProtocolError("only a job's coordinator reports, checkpoints and keeps")
        return self.state
