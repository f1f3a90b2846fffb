"""Calls to a session's stages: with deadlines from their round trips, over a new connection if need be."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from typing import NamedTuple, TypeVar

import trio

from mycel.compute.infer.links import Links
from mycel.compute.infer.messages import (
    CLOSE,
    OPEN,
    RESUME,
    STATUS,
    Open,
    OpenReply,
    Resume,
    SessionName,
    StageStatus,
    name_at,
)
from mycel.compute.infer.owner import EPOCH_UNKNOWN
from mycel.compute.infer.pace import Timing
from mycel.compute.infer.request import RouteStage
from mycel.compute.infer.view import SwarmView
from mycel.protocol.errors import ConnectionLost, DeadlineExceeded, MycelError, Refused
from mycel.protocol.mesh import PeerId
from mycel.protocol.method import Method, Req, Res
from mycel.protocol.rpc import Rpc

T = TypeVar("T")

CLOSE_S = 2.0
"""How long stages are told that a session is over."""


class Services(NamedTuple):
    """What a session's owner works with."""

    links: Links
    rpc: Rpc
    view: SwarmView
    start_soon: Callable[..., None]
    """Of the service's nursery."""


class Contact:
    """One session's way to its stages."""

    def __init__(self, session: str, services: Services, timing: Timing) -> None:
        self.addrs: dict[PeerId, tuple[str, ...]] = {}
        """Where peers that were met can be dialled."""
        self._session = session
        self._services = services
        self._timing = timing
        self._me = services.links.mesh.peer_id
        self._opened: dict[tuple[PeerId, str], None] = {}  # peers, and the session's name there

    def is_gone(self, peer: PeerId) -> bool:
        """Whether there is no connection to `peer`."""
        return peer != self._me and peer not in self._services.links.mesh.peers

    def meet(self, stage: RouteStage) -> None:
        """Remember that a stage gets the session, and where its peer is."""
        peer = stage.peer
        self._opened[self._at(stage)] = None
        self.addrs[peer] = self._services.view.addrs(peer) or self.addrs.get(peer, ())
        if peer != self._me:
            self._services.links.addrs[peer] = self.addrs[peer]

    def _at(self, stage: RouteStage) -> tuple[PeerId, str]:
        return stage.peer, name_at(self._session, stage.span.start)

    # --- calls; all raise `MycelError`

    async def ask(self, stage: RouteStage) -> StageStatus:
        """What the stage is doing."""
        peer, name = self._at(stage)
        try:
            return await self._call(peer, STATUS, SessionName(name), self._timing.probe_s)
        except Refused:
            return StageStatus(EPOCH_UNKNOWN, 0, 0, 0, 0, "waiting", 0.0)

    async def open(self, peer: PeerId, opened: Open, seconds: float) -> OpenReply:
        """Open the session, or a new epoch of it."""
        return await self._call(peer, OPEN, opened, seconds)

    async def resume(self, peer: PeerId, resume: Resume) -> None:
        """Let the stage go on."""
        await self._call(peer, RESUME, resume, self._timing.reopen_s)

    async def reconnect(self, peer: PeerId) -> None:
        """Dial a peer that was met."""
        if not self.addrs.get(peer):
            raise ConnectionLost(f"{peer} is not connected")
        await self._services.links.mesh.connect(self.addrs[peer])

    async def _call(self, peer: PeerId, method: Method[Req, Res], request: Req, seconds: float) -> Res:
        limit_s = seconds + self._timing.round_trips * self._services.view.rtt(self._me, peer)
        with trio.move_on_after(limit_s):
            if self.is_gone(peer):
                await self.reconnect(peer)
            return await self._services.rpc.call(peer, method, request, deadline_s=limit_s)
        raise DeadlineExceeded(f"{peer} did not answer {method.name} within {limit_s:.2f} s")

    # --- the end

    def dismiss(self, keep: Iterable[RouteStage] = ()) -> None:
        """Tell every stage that has the session, but those of `keep`, to free it."""
        kept = [self._at(stage) for stage in keep]
        for opened in [opened for opened in self._opened if opened not in kept]:
            del self._opened[opened]
            self._services.start_soon(self._close, *opened)

    async def _close(self, peer: PeerId, name: str) -> None:
        with suppress(MycelError):
            if not self.is_gone(peer):
                await self._services.rpc.call(peer, CLOSE, SessionName(name), deadline_s=CLOSE_S)


async def each(calls: Sequence[Callable[[], Awaitable[T]]]) -> list[T | MycelError]:
    """All calls at once; each one's result or failure, in order."""
    results: dict[int, T | MycelError] = {}

    async def one(index: int, call: Callable[[], Awaitable[T]]) -> None:
        try:
            results[index] = await call()
        except MycelError as error:
            results[index] = error

    async with trio.open_nursery() as nursery:
        for index, call in enumerate(calls):
            nursery.start_soon(one, index, call)
    return [results[index] for index in range(len(calls))]
