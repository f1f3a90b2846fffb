"""A candidate at work: it asks the electors, holds the lease while they renew it, and lets it go.

`Candidate.win` returns with a `Holding` once a majority promised; `Holding.keep` returns when the lease is
over, and whatever was done under it must have stopped by then. Deciding is `mycel.node.jobs.lease`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import trio

from mycel.node.jobs.lease import Answer, Ballot, Lease, Prospect, Vote, vote_bytes
from mycel.node.jobs.record import STATE, key_of
from mycel.node.jobs.spec import Job
from mycel.node.jobs.voting import ASK, RELEASE, RENEW, Ask, AskReply
from mycel.protocol.board import Fact
from mycel.protocol.errors import MycelError
from mycel.protocol.limits_jobs import DEFAULT_JOB_LIMITS, JobLimits
from mycel.protocol.mesh import Mesh, PeerId
from mycel.protocol.method import Method
from mycel.protocol.rpc import Rpc

log = logging.getLogger("mycel.jobs")

TakeFact = Callable[[Fact], object]


class Holding:
    """A lease that this node holds."""

    def __init__(self, candidate: Candidate, ballot: Ballot, lease: Lease) -> None:
        self.lease = lease
        self._candidate = candidate
        self._ballot = ballot

    @property
    def is_held(self) -> bool:
        """Whether it is in force now."""
        return trio.current_time() < self._ballot.until

    async def keep(self) -> None:
        """Renew until it cannot be renewed in time."""
        async with trio.open_nursery() as nursery:
            for elector in self._candidate.job.electors:
                nursery.start_soon(self._renew, elector)
            while (left := self._ballot.until - trio.current_time()) > 0:  # noqa: ASYNC110 - time is what ends it
                await trio.sleep(left)
            nursery.cancel_scope.cancel()

    async def _renew(self, elector: PeerId) -> None:
        """Ask one elector again and again; those who did not vote yet may still."""
        while True:
            await trio.sleep(self._candidate.limits.renew_s)
            reply = await self._candidate.ask(RENEW, elector, self._ballot)
            if reply is not None and reply.answer.epoch < self._ballot.epoch:
                await self._candidate.ask(ASK, elector, self._ballot)

    async def release(self) -> None:
        """Others need not wait for its end."""
        await self._candidate.release(self._ballot.epoch)


class Candidate:
    """One node that would coordinate one job. `take` is given how the job stands, by the electors."""

    def __init__(
        self, mesh: Mesh, rpc: Rpc, job: Job, take: TakeFact, limits: JobLimits = DEFAULT_JOB_LIMITS
    ) -> None:
        self.job = job
        self.limits = limits
        self.prospect = Prospect(job.electors, job.electors.index(mesh.peer_id), limits)
        self._mesh = mesh
        self._rpc = rpc
        self._take = take

    async def win(self) -> Holding | None:
        """Stand until the lease is won; None where the job turns out to have ended long ago."""
        await trio.sleep(self.prospect.rank * self.limits.stand_s)
        while True:
            ballot = Ballot(self.job.electors, self.prospect.next_epoch(), self.limits)
            votes, denials = await self._ask_all(ballot)
            if ballot.until > trio.current_time():
                lease = Lease(self.job.id, ballot.epoch, self._mesh.peer_id, tuple(votes))
                self.prospect.note(ballot.epoch)
                return Holding(self, ballot, lease)
            if ballot.promised:
                await self.release(ballot.epoch)
            if self.prospect.is_over(denials):
                return None
            await trio.sleep(self.prospect.pause_s(denials))

    async def _ask_all(self, ballot: Ballot) -> tuple[Sequence[Vote], dict[PeerId, Answer]]:
        """Ask all electors at once, until a majority promised or nobody is left to wait for."""
        votes: dict[PeerId, Vote] = {}
        denials: dict[PeerId, Answer] = {}

        async def ask(elector: PeerId) -> None:
            reply = await self.ask(ASK, elector, ballot)
            if reply is None:
                return
            signed = vote_bytes(self.job.id, ballot.epoch, self._mesh.peer_id)
            if reply.answer.granted and self._mesh.verify(elector, signed, reply.signature):
                votes[elector] = Vote(elector, reply.signature)
                if reply.state:
                    self._take(Fact(PeerId(reply.author), key_of(self.job.id, STATE), reply.state))
            else:
                ballot.denied(elector)
                denials[elector] = reply.answer
            if ballot.until > trio.current_time():
                nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            for elector in self.job.electors:
                nursery.start_soon(ask, elector)
        return [votes[elector] for elector in sorted(votes)], denials

    async def ask(self, method: Method[Ask, AskReply], elector: PeerId, ballot: Ballot) -> AskReply | None:
        """Ask one elector, and enter its answer into the ballot; None where it does not answer."""
        asked_at = trio.current_time()
        question = Ask(self.job.id, ballot.epoch)
        try:
            reply = await self._rpc.call(elector, method, question, deadline_s=self.limits.call_s)
        except MycelError as error:
            log.debug("elector %s of job %s: %s", elector, self.job.id, error)
            return None
        if reply.answer.granted:
            ballot.granted(elector, asked_at)
        else:
            ballot.denied(elector)
        return reply

    async def release(self, epoch: int) -> None:
        """Tell all electors that this node does not coordinate in that epoch."""
        with trio.CancelScope(shield=True, deadline=trio.current_time() + self.limits.call_s):
            async with trio.open_nursery() as nursery:
                for elector in self.job.electors:
                    nursery.start_soon(self._release, elector, epoch)

    async def _release(self, elector: PeerId, epoch: int) -> None:
        try:
            question = Ask(self.job.id, epoch)
            await self._rpc.call(elector, RELEASE, question, deadline_s=self.limits.call_s)
        except MycelError as error:
            log.debug("elector %s of job %s: %s", elector, self.job.id, error)
