"""Jobs as somebody sees them who keeps no documents: a peer that may only submit asks a member.

    jobs.look      how my jobs stand
    jobs.read      what was logged about one of them
    jobs.content   a result

A member answers about the asker's own jobs only. A node that is a member itself looks into its own book.
"""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import TYPE_CHECKING

import msgspec

from mycel.node.jobs.views import ContentAsk, JobAsk, JobsView, JobView, LogLine, LogsAsk
from mycel.protocol.errors import MycelError, UsageProblem
from mycel.protocol.mesh import Access, PeerId
from mycel.protocol.method import Call, Kind, Method

if TYPE_CHECKING:
    from mycel.node.jobs.service import Jobs, Place

LOOK_S = 10.0


class Look(msgspec.Struct, frozen=True):
    """Asks for the asker's jobs."""


class Piece(msgspec.Struct, frozen=True):
    """Bytes of a result."""

    data: bytes


LOOK = Method("jobs.look", Look, JobsView, access=Access.SUBMIT, idempotent=True)
READ = Method("jobs.read", LogsAsk, LogLine, access=Access.SUBMIT, kind=Kind.SERVER_STREAM)
CONTENT = Method("jobs.content", ContentAsk, Piece, access=Access.SUBMIT, kind=Kind.SERVER_STREAM)


class Window:
    """Both sides of it."""

    def __init__(self, jobs: Jobs, place: Place) -> None:
        self._jobs = jobs
        self._place = place
        place.rpc.serve(LOOK, self._on_look)
        place.rpc.serve(READ, self._on_read)
        place.rpc.serve(CONTENT, self._on_content)

    async def views(self) -> JobsView:
        """All jobs; of a peer that may only submit, its own. Raises what calls raise."""
        if self._is_member:
            return self._jobs.views()
        return await self._place.rpc.call(self._member(), LOOK, Look(), deadline_s=LOOK_S)

    async def view(self, name: str) -> JobView:
        """One job. Raises `JobUnknown`."""
        if self._is_member:
            return self._jobs.view(name)
        told = await self.views()
        found = [job for job in told.jobs if job.id.startswith(name) or job.name == name]
        return found[-1] if found else self._jobs.view(name)

    async def lines(self, ask: LogsAsk) -> AsyncGenerator[LogLine, None]:
        """Its log, as `Jobs.lines`."""
        if self._is_member:
            async with aclosing(self._jobs.lines(ask.job, follow=ask.follow)) as lines:
                async for line in lines:
                    yield line
            return
        async with self._place.rpc.stream(self._member(), READ, ask, deadline_s=math.inf) as call:
            async for line in call:
                yield line

    async def content(self, ask: ContentAsk) -> AsyncGenerator[bytes, None]:
        """A result, as `Jobs.content`."""
        if self._is_member:
            async with aclosing(self._jobs.content(ask.job, ask.name)) as pieces:
                async for data in pieces:
                    yield data
            return
        async with self._place.rpc.stream(self._member(), CONTENT, ask, deadline_s=math.inf) as call:
            async for piece in call:
                yield piece.data

    @property
    def _is_member(self) -> bool:
        return self._place.own_access() >= Access.MEMBER

    def _member(self) -> PeerId:
        """Whom to ask."""
        infos = self._place.mesh.peers.values()
        members = sorted(
            (info for info in infos if info.access >= Access.MEMBER), key=lambda info: (info.since, info.peer)
        )
        if not members:
            raise UsageProblem("no member is connected that could tell of jobs: see `mycel peers`")
        return members[0].peer

    # --- a member's side

    async def _on_look(self, call: Call, look: Look) -> JobsView:
        jobs = self._jobs.views().jobs
        return JobsView(tuple(job for job in jobs if job.submitter == call.peer))

    async def _on_read(self, call: Call, ask: LogsAsk) -> AsyncIterator[LogLine]:
        job = self._own(call, JobAsk(ask.job))
        async with aclosing(self._jobs.lines(job, follow=ask.follow)) as lines:
            async for line in lines:
                yield line

    async def _on_content(self, call: Call, ask: ContentAsk) -> AsyncIterator[Piece]:
        job = self._own(call, JobAsk(ask.job))
        async with aclosing(self._jobs.content(job, ask.name)) as pieces:
            async for data in pieces:
                yield Piece(data)

    def _own(self, call: Call, ask: JobAsk) -> str:
        """The id of a job that the asker may see: its own, or as a member any."""
        found = self._jobs.find(ask.job)
        if call.access < Access.MEMBER and (found.job is None or found.job.submitter != call.peer):
            raise MycelError(f"no job {ask.job!r} of yours is known here")
        return found.id
