"""One job at one node, from when it is known until it has ended: as elector-candidate, and as participant.

The electors of a job are its candidates too: without a majority of them nobody coordinates, and a majority
of them is enough. One at a time wins the lease and runs the kind's `coordinate`; the moment the lease is
lost it is cancelled, and whatever it still sends is refused by its old epoch. What it raises is a failure
of this try, not of the node.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio

from mycel.node.jobs.book import Entry
from mycel.node.jobs.record import DONE, FAILED, JOB, STOPPED, key_of
from mycel.node.jobs.runner import JobFailed, Runner
from mycel.node.jobs.spec import Job
from mycel.node.jobs.standing import Candidate, Holding
from mycel.node.jobs.work import Tools, Work
from mycel.protocol.errors import MycelError, single_failure

log = logging.getLogger("mycel.jobs")

TEXT_CHARS = 1000
RETRY_MAX_S = 60.0


@dataclass(slots=True)
class Attendance:
    """What this node does for one job."""

    tools: Tools
    entry: Entry
    job: Job
    runner: Runner
    takes_part: bool
    """Whether this node's owner lets it work for jobs."""
    holding: Holding | None = None
    """The lease, while this node coordinates."""
    _scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    _over: trio.Event = field(default_factory=trio.Event)

    async def run(self) -> None:
        """Do it until the job has ended."""
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    if self.tools.mesh.peer_id in self.job.electors:
                        nursery.start_soon(self._coordinate_when_elected)
                    if self.takes_part:
                        nursery.start_soon(self._take_part)
        finally:
            self._over.set()

    @asynccontextmanager
    async def _until_ended(self) -> AsyncIterator[None]:
        """Cancel the block when the job has ended."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._cancel_when_ended, nursery.cancel_scope)
            yield
            nursery.cancel_scope.cancel()

    async def _cancel_when_ended(self, scope: trio.CancelScope) -> None:
        while not self.entry.is_ended:
            await self.tools.changed(self.job.id)
        scope.cancel()

    async def leave(self) -> None:
        """This node goes: stop, and let another coordinate at once."""
        holding = self.holding
        self._scope.cancel()
        await self._over.wait()
        if holding is not None:
            await holding.release()

    # --- coordinating

    async def _coordinate_when_elected(self) -> None:
        tools, limits = self.tools, self.tools.limits
        candidate = Candidate(tools.mesh, tools.rpc, self.job, tools.take, limits)
        failures = 0
        while not self.entry.is_ended:
            async with self._until_ended():
                if failures:
                    await trio.sleep(min(limits.retry_s * 2 ** (failures - 1), RETRY_MAX_S))
                if self.entry.lease is not None:
                    candidate.prospect.note(self.entry.lease.epoch)
                self.holding = await candidate.win()
                if self.holding is None:
                    tools.desk.forget(self.job.id)  # this node was away when it ended
                    return
            if self.holding is not None:
                failures = await self._tenure(self.holding)
                await self.holding.release()
                self.holding = None

    async def _tenure(self, holding: Holding) -> int:
        """Coordinate as long as the lease is held; how many tries in a row have failed, 0 for none."""
        work = Work(self.tools, self.entry, self.job, holding)
        runs = trio.CancelScope()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep, holding, nursery.cancel_scope)
            nursery.start_soon(self._await_stop, runs)
            try:
                await self._coordinate(work, runs)
            except MycelError as error:  # the document is full, say: others may have more room
                log.warning("job %s: %s", self.job.id, error)
                work.change(failures=self._failures(work) + 1)
            nursery.cancel_scope.cancel()
        return self._failures(work)

    async def _keep(self, holding: Holding, scope: trio.CancelScope) -> None:
        await holding.keep()
        log.warning("the lease of job %s was lost at epoch %d", self.job.id, holding.lease.epoch)
        scope.cancel()

    async def _await_stop(self, runs: trio.CancelScope) -> None:
        while self.entry.stop is None and not self.entry.is_ended:
            await self.tools.changed(self.job.id)
        runs.cancel()

    async def _coordinate(self, work: Work, runs: trio.CancelScope) -> None:
        """Raises `MycelError` where not even the state can be written."""
        own = self.tools.label(self.tools.mesh.peer_id)
        work.log(f"{own} coordinates, epoch {work.epoch}")
        self.tools.desk.say(
            key_of(self.job.id, JOB), self.entry.envelope
        )  # the job and its end stand together
        await work.publish()
        failure: Exception | None = None
        with runs:
            try:
                await self.runner.coordinate(self.job, work)
            except Exception as error:  # boundary: what a runner raises is a failed try of its job
                failure = error
                if single_failure(error) is None:
                    log.exception("job %s failed by a bug", self.job.id)
        if self.entry.is_ended:
            return
        if runs.cancelled_caught:
            await self._end(work, STOPPED, f"by {self.entry.stop.by if self.entry.stop else 'its peers'}")
        elif failure is None:
            await self._end(work, DONE, "")
        else:
            await self._note_failure(work, failure)

    async def _note_failure(self, work: Work, failure: Exception) -> None:
        known = single_failure(failure)
        text = (str(known) if known is not None else f"{type(failure).__name__}: {failure}")[:TEXT_CHARS]
        failures = self._failures(work) + 1
        if isinstance(known, JobFailed) or failures >= self.tools.limits.tries:
            work.change(failures=failures)
            await self._end(work, FAILED, text)
            return
        work.log(f"try {failures} of {self.tools.limits.tries} failed: {text}")
        work.change(failures=failures, text=text)
        await work.publish()

    async def _end(self, work: Work, phase: str, text: str) -> None:
        work.change(phase=phase, text=text[:TEXT_CHARS])
        work.log(f"{phase}{': ' if text else ''}{text}")
        await work.publish()

    def _failures(self, work: Work) -> int:
        return 0 if work.state is None or work.state.is_ended else work.state.failures

    # --- taking part

    async def _take_part(self) -> None:
        async with self._until_ended():
            while self.entry.lease is None:
                await self.tools.changed(self.job.id)
            work = Work(self.tools, self.entry, self.job)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._await_stop, nursery.cancel_scope)
                await self._work(work)
                nursery.cancel_scope.cancel()

    async def _work(self, work: Work) -> None:
        wait_s = self.tools.limits.retry_s
        while True:
            try:
                await self.runner.take_part(self.job, work)
            except Exception as error:  # boundary: what a runner raises costs the job this node's help only
                known = single_failure(error)
                if known is None:
                    log.exception("taking part in job %s failed by a bug", self.job.id)
                work.log(f"taking part failed: {known or f'{type(error).__name__}: {error}'}")
                await trio.sleep(wait_s)
                wait_s = min(2 * wait_s, RETRY_MAX_S)
            else:
                return
