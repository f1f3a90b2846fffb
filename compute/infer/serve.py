"""The stage service: this node's engines at work for everybody's sessions.

Each stage has an engine kept alive by a `Supervisor`, a loop (`mycel.compute.infer.stage`), and a fact on the
board that follows its state. A model may have several stages here, of different layers; a session that goes
through two of them has another name at each. When an engine is lost its sessions' owners are told at once;
the stage is loaded again and comes back empty. A session whose owner's connection ended, and who did not ask
again within a while, is closed.
"""

from __future__ import annotations

from collections.abc import Callable

import trio
from trio import TaskStatus

from mycel.compute.engine import Engine, ModelCard, Span, StageInfo, StageSpec
from mycel.compute.infer.links import Links
from mycel.compute.infer.messages import (
    CLOSE,
    FILES,
    OPEN,
    RESUME,
    STATUS,
    CreditFrame,
    FilesName,
    FilesReply,
    Frame,
    NoticeFrame,
    Open,
    OpenReply,
    Resume,
    SessionName,
    StageStatus,
    StepFrame,
    TokenFrame,
    session_of,
)
from mycel.compute.infer.served import Served, ServeOptions
from mycel.compute.infer.session import SessionCounters, StageSession
from mycel.compute.infer.stage import Stage
from mycel.compute.supervise import EngineEvent
from mycel.protocol.board import Board
from mycel.protocol.errors import LocalProtocolError, Refused
from mycel.protocol.mesh import PeerDown, PeerId
from mycel.protocol.method import Call
from mycel.protocol.rpc import Rpc

__all__ = ["ServeOptions", "SessionCounters", "StageServer"]

ORPHAN_S = 30.0
"""How long a session outlives its owner's connection: the owner may be on its way back."""


class StageServer:
    """This node's stages. `run` must be running while they serve."""

    def __init__(self, links: Links, rpc: Rpc, board: Board) -> None:
        self._links = links
        self._rpc = rpc
        self._board = board
        self._me = links.mesh.peer_id
        self._served: list[Served] = []
        self._is_leaving = False
        self._nursery: trio.Nursery | None = None
        links.attach(self)
        rpc.serve(OPEN, self._open, inline=True)
        rpc.serve(RESUME, self._resume, inline=True)
        rpc.serve(STATUS, self._status, inline=True)
        rpc.serve(CLOSE, self._close, inline=True)
        rpc.serve(FILES, self._files)

    # --- for the node

    async def run(self, *, task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled."""
        async with self._links.mesh.events() as events, trio.open_nursery() as self._nursery:
            task_status.started()
            async for event in events:
                if isinstance(event, PeerDown):
                    self._nursery.start_soon(self._close_orphans, event.peer)

    async def serve(
        self,
        spec: StageSpec,
        start_engine: Callable[[], Engine],
        options: ServeOptions = ServeOptions(),
        progress: Callable[[float, str], None] | None = None,
        report: Callable[[EngineEvent], None] | None = None,
    ) -> StageInfo:
        """Load a stage and serve it until `leave`; returns once it is ready.

        `start_engine` starts an engine, again after each loss. With `spec.span` None the span is chosen from
        what the board shows to be missing. `report` hears of losses and reloads. Raises as `Engine.load`, and
        `Refused` when this node serves those layers already, leaves, has no memory for a single layer, or
        (`options.beside`) no layers are missing any more.
        """
        if self._nursery is None:
            raise LocalProtocolError("start StageServer.run first")
        if self._is_leaving:
            raise Refused("this node is about to leave", reason="leaving")
        served = Served(self._links, self._board, spec, options, report)
        try:
            await self._nursery.start(served.run, start_engine)
            card = await served.describe()
            if options.fingerprint not in (None, card.fingerprint):
                raise Refused(f"{spec.model} is another model than the one meant", reason="model")
            served.number = self._number(card, spec.span, options)
            self._served.append(served)
            return await served.load(progress)
        except BaseException:  # why: a cancelled load must leave nothing behind either; raised again
            self._remove(served)
            raise

    async def leave(self, grace_s: float = 5.0) -> None:
        """Say that the stages go, wait until their sessions moved (at most `grace_s`), stop."""
        self._is_leaving = True
        leaving = list(self._served)
        for served in leaving:
            served.begin_leaving()
        with trio.move_on_after(grace_s):
            for served in leaving:
                while served.stage is not None and served.stage.sessions:
                    await served.stage.changed.wait()
        for served in leaving:
            self._remove(served)

    async def drop(self, info: StageInfo, grace_s: float) -> None:
        """Give up one stage, after its sessions moved (at most `grace_s`)."""
        for served in list(self._served):
            stage = served.stage
            if stage is not None and stage.info is info:
                served.begin_leaving()
                with trio.move_on_after(grace_s):
                    while stage.sessions:
                        await stage.changed.wait()
                self._remove(served)

    @property
    def stages(self) -> list[Stage]:
        """Stages that are loaded."""
        return [served.stage for served in self._served if served.stage is not None]

    @property
    def totals(self) -> SessionCounters:
        """Counters over all sessions of the loaded stages."""
        totals = SessionCounters()
        for stage in self.stages:
            totals.add(stage.totals())
        return totals

    def counters(self, session: str) -> SessionCounters | None:
        """A session's counters over all stages here, also for a while after its end."""
        found = [
            counters
            for stage in self.stages
            for name, counters in stage.counters().items()
            if session_of(name) == session
        ]
        if not found:
            return None
        totals = SessionCounters()
        for counters in found:
            totals.add(counters)
        return totals

    def _number(self, card: ModelCard, span: Span | None, options: ServeOptions) -> int:
        """The number of a further stage of a model. Raises `Refused` for layers that are served here."""
        others = [served for served in self._served if served.fingerprint == card.fingerprint]
        for other in others:
            held = other.span
            if held is None or (span is None and not options.beside):
                raise Refused(f"{card.name} is served by this node already", reason="twice")
            if span is not None and span.start < held.end and held.start < span.end:
                raise Refused(
                    f"layers {held.start}:{held.end} of {card.name} are served by this node already",
                    reason="twice",
                )
        numbers = [other.number for other in others]
        return next(number for number in range(len(others) + 1) if number not in numbers)

    def _remove(self, served: Served) -> None:
        self._served = [other for other in self._served if other is not served]
        served.end()

    # --- rpc

    def _open(self, call: Call, opened: Open) -> OpenReply:
        stages = [stage for stage in self.stages if stage.info.card.fingerprint == opened.fingerprint]
        if not stages:
            raise Refused("that model is not served here", reason="layers")
        name = opened.session
        stages.sort(key=lambda stage: (opened.span not in stage.info.span, name not in stage.sessions))
        if opened.next != self._me and opened.next_addrs:
            self._links.addrs[opened.next] = opened.next_addrs
        return stages[0].open(call.peer, opened)

    def _resume(self, call: Call, resume: Resume) -> None:
        stage, session = self._find(call.peer, resume.session)
        stage.send(session.on_resume(resume, trio.current_time()))
        stage.wake(session)

    def _status(self, call: Call, asked: SessionName) -> StageStatus:
        _, session = self._find(call.peer, asked.session)
        return session.status(trio.current_time())

    def _close(self, call: Call, asked: SessionName) -> None:
        stage, session = self._lookup(asked.session)
        if stage is not None and session is not None and session.owner == call.peer:
            stage.close(asked.session)

    async def _files(self, call: Call, asked: FilesName) -> FilesReply:
        for served in self._served:
            if served.fingerprint == asked.fingerprint and served.files is not None:
                return FilesReply(served.files)
        raise Refused("that model's files are not here", reason="layers")

    def _lookup(self, name: str) -> tuple[Stage | None, StageSession | None]:
        for served in self._served:
            if served.stage is not None and name in served.stage.sessions:
                return served.stage, served.stage.sessions[name]
        return None, None

    def _find(self, owner: PeerId, name: str) -> tuple[Stage, StageSession]:
        stage, session = self._lookup(name)
        if stage is None or session is None or session.owner != owner:
            raise Refused("no such session here", reason="unknown")
        session.heard = trio.current_time()
        return stage, session

    # --- frames

    @property
    def congested(self) -> bool:
        """See `Receiver`."""
        return any(served.stage is not None and served.stage.congested for served in self._served)

    def on_frame(self, peer: PeerId, frame: Frame) -> None:
        """See `Receiver`."""
        stage, session = self._lookup(frame.session)
        if stage is None or session is None or isinstance(frame, NoticeFrame):
            return
        now = trio.current_time()
        if isinstance(frame, StepFrame):
            stage.send(session.on_step(peer, frame, now))
        elif isinstance(frame, TokenFrame):
            stage.send(session.on_token(peer, frame, now))
        elif isinstance(frame, CreditFrame) and peer == session.owner:
            session.heard = now
            session.on_credit(frame)
        stage.wake(session)

    def on_link_ready(self, peer: PeerId) -> None:
        """See `Receiver`."""
        for stage in self.stages:
            stage.wake()

    def on_link_lost(self, peer: PeerId, kind: str, text: str) -> None:
        """See `Receiver`."""
        for stage in self.stages:
            for session in list(stage.sessions.values()):
                stage.send(session.on_link_lost(peer, kind, text))

    async def _close_orphans(self, owner: PeerId) -> None:
        down = trio.current_time()
        await trio.sleep(ORPHAN_S)
        for stage in self.stages:
            for name, session in list(stage.sessions.items()):
                if session.owner == owner and session.heard <= down:
                    stage.close(name)
