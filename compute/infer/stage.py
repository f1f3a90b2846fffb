"""One loaded stage at work: the loop that turns waiting rows into steps of the engine.

While a step runs, rows of all sessions gather; when it ends, its results leave in the same task and whatever
gathered is planned into the next step. A busy stage so batches by itself, and an idle one answers at once.
"""

from __future__ import annotations

import trio

from mycel.compute.engine import Engine, StageInfo, Work
from mycel.compute.infer.batch import ROWS_MAX, Candidate, plan_step
from mycel.compute.infer.links import Links
from mycel.compute.infer.log import Memory
from mycel.compute.infer.messages import Open, OpenReply
from mycel.compute.infer.session import Send, SessionCounters, StageSession
from mycel.protocol.errors import Refused
from mycel.protocol.mesh import PeerId

SESSIONS_MAX = 256
"""Sessions of one stage at once; further ones are refused, and their owners look elsewhere."""
LOG_BYTES_MAX = 512 << 20
"""Send logs of one stage: 128 sessions of 1024 rows of 1024 float32."""
WAITING_BYTES_MAX = 64 << 20
"""Hidden states that wait for the engine before the senders have to wait."""
LINK_BYTES_MAX = 16 << 20
"""Bytes that wait for the next stage's window before its sessions' prefills have to wait."""
COUNTERS_KEPT = 256
"""Ended sessions whose counters can still be asked for."""

_GAIN = 0.1


class Stage:
    """Sessions over one engine."""

    def __init__(self, engine: Engine, info: StageInfo, links: Links) -> None:
        self.engine = engine
        self.info = info
        self.sessions: dict[str, StageSession] = {}
        self.down: str | None = None
        """Why the engine cannot be used now."""
        self.ended: dict[str, SessionCounters] = {}
        self.layer_row_s = 0.0
        self.closing = False
        """Whether new sessions are refused."""
        self._links = links
        self._memory = Memory(LOG_BYTES_MAX)
        self._wake = trio.Event()
        self._abandoned: list[str] = []
        self._past = SessionCounters()  # of ended sessions
        self._decoded_last = False
        self.changed = trio.Event()
        """Set when a session begins or ends."""

    # --- sessions

    def open(self, owner: PeerId, opened: Open) -> OpenReply:
        """A session of `owner` here. Raises `Refused`."""
        now = trio.current_time()
        if opened.span not in self.info.span or opened.n_layers != self.info.card.n_layers:
            raise Refused(f"layers {opened.span} are not held here", reason="layers")
        session = self.sessions.get(opened.session)
        if session is not None and session.owner != owner:
            raise Refused("the session is another owner's", reason="owner")
        if self.down is not None:
            raise Refused(f"the engine is down: {self.down}", reason="engine")
        if session is None:
            if len(self.sessions) >= SESSIONS_MAX or self.closing:
                raise Refused(f"{len(self.sessions)} sessions run here already", reason="full")
            session = StageSession(owner, opened, self._memory, now)
            self.sessions[opened.session] = session
            self._announce()
        reply = session.on_open(opened, now)
        if opened.start is not None:
            self.send(session.on_resume(opened.start, now))
        self.wake(session)
        return reply

    def close(self, name: str) -> None:
        """End a session and free what it holds."""
        session = self.sessions.pop(name, None)
        if session is None:
            return
        session.close()
        self._abandoned += [*session.abandoned, session.key]
        self.ended[name] = session.counters
        self._past.add(session.counters)
        while len(self.ended) > COUNTERS_KEPT:
            del self.ended[next(iter(self.ended))]
        self._wake.set()
        self._announce()

    def fail_all(self, kind: str, text: str) -> None:
        """Tell all owners that their sessions cannot go on here."""
        for session in list(self.sessions.values()):
            if session.failed is None:
                self.send(session.fail(kind, text))
        self._abandoned.clear()

    def counters(self) -> dict[str, SessionCounters]:
        """Of each session by its name here, also for a while after its end."""
        return self.ended | {name: session.counters for name, session in self.sessions.items()}

    def totals(self) -> SessionCounters:
        """Counters over all sessions, ended ones included."""
        totals = SessionCounters()
        for counters in (self._past, *(session.counters for session in self.sessions.values())):
            totals.add(counters)
        return totals

    def wake(self, session: StageSession | None = None) -> None:
        """Look again: something about `session`, or about all of them, changed."""
        if session is None or session.can_step or session.abandoned:
            self._wake.set()

    def send(self, sends: list[Send]) -> None:
        """Hand frames to the network."""
        if len(sends) == 1:
            self._links.send(*sends[0])
        else:
            self._links.send_all(sends)

    @property
    def congested(self) -> bool:
        """Whether so many rows wait that senders should."""
        return self._memory.waiting_bytes > WAITING_BYTES_MAX

    def _announce(self) -> None:
        changed, self.changed = self.changed, trio.Event()
        changed.set()

    # --- the loop

    async def run(self) -> None:
        """Step until cancelled. Raises `EngineLost`."""
        while True:
            await self._forget()
            chosen = self._plan()
            if chosen:
                await self._step(chosen)
            else:
                self._wake = trio.Event()
                await self._wake.wait()

    def _plan(self) -> list[StageSession]:
        candidates = [
            Candidate(name, session.waiting.rows, session.since)
            for name, session in self.sessions.items()
            if session.can_step and self._links.waiting(session.opened.next) < LINK_BYTES_MAX
        ]
        names = plan_step(candidates, decoded_last=self._decoded_last, batchable=self.info.card.batchable)
        return [self.sessions[name] for name in names]

    async def _step(self, chosen: list[StageSession]) -> None:
        works = [session.take(ROWS_MAX) for session in chosen]
        counts = [_count(work) for work in works]
        self._decoded_last = counts[0] == 1
        began = trio.current_time()
        dones = await self.engine.step(works)
        now = trio.current_time()
        sends: list[Send] = []
        for session, work, count, done in zip(chosen, works, counts, dones, strict=True):
            sends += session.on_done(work, count, done, now)
        self.send(sends)
        self._measure(now - began, max(work.span.end - work.span.start for work in works))
        self._links.relieve()

    def _measure(self, step_s: float, layers: int) -> None:
        if self._decoded_last:  # rows are cheaper in a prefill, and it is decoding that routes are chosen for
            cost = step_s / layers
            self.layer_row_s += (cost - self.layer_row_s) * (_GAIN if self.layer_row_s else 1)

    async def _forget(self) -> None:
        for session in self.sessions.values():
            if session.abandoned:
                self._abandoned += session.abandoned
                session.abandoned.clear()
        while self._abandoned:
            await self.engine.forget(self._abandoned.pop())


def _count(work: Work) -> int:
    if work.tokens is not None:
        return len(work.tokens)
    if work.hidden is None:
        return 0
    return work.hidden.shape[0]
