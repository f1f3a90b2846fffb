"""Driving one session: what its owner does when it begins, when something is wrong, and when it ends.

`OwnerSession` decides; this task acts. It sleeps while tokens flow. It wakes for trouble: a notice from a
stage, a peer that went, or a step that takes longer than the session's pace. Then it asks all stages what
they are doing, replaces those that do not answer (or said themselves that they cannot go on), and lets the
others go on from what they have. Whatever else breaks meanwhile only makes it go round again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import trio

from mycel.compute.engine import ModelCard
from mycel.compute.infer.contact import Contact, Services, each
from mycel.compute.infer.messages import NoticeFrame, is_stage_key
from mycel.compute.infer.owner import OwnerSession, Restart, Verdict
from mycel.compute.infer.request import Failover, GenerationFailed, RouteStage
from mycel.compute.infer.route import plan_repair, plan_route
from mycel.compute.infer.served import read_stage
from mycel.protocol.board import Fact
from mycel.protocol.errors import MycelError, Refused
from mycel.protocol.mesh import PeerId

RETRY_S = 0.25
"""Between two looks for somebody to take over."""
_FINAL = ("engine", "error", "unreachable")
"""Kinds of trouble that name a peer which cannot go on."""
_ASK = ("down", "link", "gap")
"""Kinds of trouble after which all stages are asked."""


class Trouble(NamedTuple):
    """Something that may be wrong."""

    kind: str
    """As `NoticeFrame.kind`, or "down" (the peer's connection ended), "leaving", "gap"."""
    peer: PeerId | None
    text: str


class Drive:
    """One session's task. `on_tokens` is called when tokens came other than by a frame."""

    def __init__(
        self, session: OwnerSession, card: ModelCard, services: Services, on_tokens: Callable[[], None]
    ) -> None:
        self.session = session
        self.failovers: list[Failover] = []
        self._card = card
        self._services = services
        self._contact = Contact(session.job.session, services, session.timing)
        self._on_tokens = on_tokens
        self._me = services.links.mesh.peer_id
        self._troubles: list[Trouble] = []
        self._wake = trio.Event()
        self._suspects: dict[PeerId, float] = {}  # did not answer, at that time
        self._refused: dict[PeerId, str] = {}  # said that they cannot take this session
        self._running = False
        self._restart: Restart | None = None
        self._in_a_row = 0
        self._drawn_then = 0

    # --- events

    def on_notice(self, peer: PeerId, frame: NoticeFrame) -> None:
        """A stage says that something is wrong."""
        if frame.epoch != self.session.epoch or all(stage.peer != peer for stage in self.session.route):
            return
        subject = frame.peer if frame.kind in ("link", "unreachable") else peer
        self._trouble(Trouble(frame.kind, subject, frame.text))

    def on_peer_down(self, peer: PeerId, text: str, *, left: bool = False) -> None:
        """A connection ended; `left`: its peer said goodbye, and is not dialled."""
        if left:
            self._contact.addrs.pop(peer, None)
        self._trouble_about("down", peer, text)

    def on_fact(self, fact: Fact) -> None:
        """A stage's state changed."""
        if is_stage_key(fact.key, self._card.fingerprint):
            stage = read_stage(fact.value)
            if stage is not None and stage.state == "leaving":
                self._trouble_about("leaving", fact.author, "the stage leaves")

    def on_link_lost(self, peer: PeerId, kind: str, text: str) -> None:
        """The owner's own stream to a peer broke; it matters where it carries the session."""
        if self.session.route and self.session.route[0].peer == peer:
            self._trouble(Trouble(kind, peer, text))

    def on_gap(self) -> None:
        """Tokens are missing."""
        self._trouble(Trouble("gap", None, "tokens got lost"))

    def nudge(self) -> None:
        """The deadline may have moved closer."""
        self._wake.set()

    def _trouble_about(self, kind: str, peer: PeerId, text: str) -> None:
        if any(stage.peer == peer for stage in self.session.route):
            self._trouble(Trouble(kind, peer, text))

    def _trouble(self, trouble: Trouble) -> None:
        self._troubles.append(trouble)
        self._wake.set()

    # --- the task

    async def begin(self) -> None:
        """Find a route and start. Raises `LayersMissing`, `GenerationFailed`."""
        await self._take_route((), "")

    async def run(self) -> None:
        """Keep the session going until cancelled. Raises `LayersMissing`, `GenerationFailed`."""
        while True:
            troubles = await self._next_troubles()
            lost = [trouble.peer for trouble in troubles if trouble.kind in _FINAL and trouble.peer]
            self._refused |= {t.peer: t.text for t in troubles if t.kind == "error" and t.peer}
            why = _reasons(troubles)
            recover = any(trouble.kind != "leaving" for trouble in troubles)
            if not troubles or any(trouble.kind in _ASK for trouble in troubles):
                verdict = await self._ask_all()
                lost += verdict.lost
                recover |= verdict.recover
                why = why or verdict.why
            leaving = [t.peer for t in troubles if t.kind == "leaving" and t.peer]
            if leaving and (recover or self._plan((*lost, *leaving)) is not None):
                lost += leaving
                recover = True
            if recover:
                await self._take_route(tuple(dict.fromkeys(lost)), why)

    async def _next_troubles(self) -> list[Trouble]:
        """What went wrong; empty when the step's deadline passed.

        The deadline moves with every token, of which nobody tells this task; it may have come closer.
        """
        while not self._troubles:
            deadline, now = self.session.deadline(self._ring_rtt()), trio.current_time()
            if now >= deadline:
                return []
            self._wake = trio.Event()
            look_again = now + self.session.timing.step_floor_s if deadline < math.inf else math.inf
            with trio.move_on_at(min(deadline, look_again)):
                await self._wake.wait()
        troubles, self._troubles = self._troubles, []
        return troubles

    async def _ask_all(self) -> Verdict:
        """Ask all stages what they do, twice when all seem idle, or when several that are connected do not
        answer: rather than they all, this node may have stood still, or its line.
        """
        timing = self.session.timing
        believed = False
        while True:
            statuses = await each([partial(self._contact.ask, s) for s in self.session.route])
            silent = [
                stage.peer
                for stage, status in zip(self.session.route, statuses, strict=True)
                if isinstance(status, MycelError) and not self._contact.is_gone(stage.peer)
            ]
            if len(dict.fromkeys(silent)) > 1 and not believed:
                believed = True
                continue
            verdict = self.session.judge(
                [None if isinstance(status, MycelError) else status for status in statuses]
            )
            if not verdict.recover:
                self.session.pace.restart(trio.current_time())
            if not verdict.settle or self._troubles:
                return verdict
            await trio.sleep(timing.settle_s + self._ring_rtt())

    # --- routes

    async def _take_route(self, lost: Sequence[PeerId], why: str) -> None:
        """Open a route without `lost`, and go on from what its stages have."""
        session = self.session
        position, replaced = len(session.tokens), dict.fromkeys(lost)
        if len(session.drawn) > self._drawn_then:
            self._in_a_row = 0
        self._drawn_then = len(session.drawn)
        self._suspect(lost)
        while True:
            self._in_a_row += 1
            if self._in_a_row > session.timing.recoveries:
                raise GenerationFailed(
                    f"gave up after {session.timing.recoveries} routes without a new token; the last trouble "
                    f"was: {why or 'none'}"
                )
            session.begin_epoch(await self._find_route())
            self._troubles.clear()
            failed = await self._try_route()
            if failed is None:
                break
            self._suspect(list(failed))
            replaced |= dict.fromkeys(failed)
            why = why or "; ".join(failed.values())
        if self._restart is not None and self._running:
            self._record(position, tuple(replaced), why, self._restart)
        self._running = True
        for stage in session.route:
            self._suspects.pop(stage.peer, None)
        self._contact.dismiss(keep=session.route)

    async def _try_route(self) -> dict[PeerId, str] | None:
        """Open, resume and replay over the session's route; None when all went well, else who failed."""
        session, route = self.session, self.session.route
        for stage in route:
            self._contact.meet(stage)
        opens = zip(route, session.opens(self._contact.addrs), strict=True)
        seconds = session.timing.reopen_s if self._running else session.timing.open_s
        replies = await each([partial(self._contact.open, s.peer, opened, seconds) for s, opened in opens])
        good = [reply for reply in replies if not isinstance(reply, MycelError)]
        if len(good) < len(route):
            return self._failures(route, replies)
        if session.adopt(good, trio.current_time()):
            self._on_tokens()
        restart = self._restart = session.plan_resume(good)
        if session.epoch > 1:
            resumes = zip(route, restart.resumes, strict=True)
            answers = await each([partial(self._contact.resume, s.peer, resume) for s, resume in resumes])
            if any(isinstance(answer, MycelError) for answer in answers):
                return self._failures(route, answers)
        for frame in restart.frames:
            self._services.links.send(route[0].peer, frame)
        session.pace.restart(trio.current_time())
        return None

    def _failures(self, route: Sequence[RouteStage], answers: Sequence[object]) -> dict[PeerId, str]:
        """Whose answer was a failure; a stage that only lagged behind an epoch is not to blame."""
        return {
            stage.peer: str(answer)
            for stage, answer in zip(route, answers, strict=True)
            if isinstance(answer, MycelError)
            and not (isinstance(answer, Refused) and answer.reason in ("unkept", "stale"))
        }

    async def _find_route(self) -> tuple[RouteStage, ...]:
        """The best route there is; waits a while for somebody to come when there is none, longer for layers
        that peers are about to serve.

        Peers that did not answer are taken again after a moment, where nobody else can be.
        """
        began = since = trio.current_time()
        timing = self.session.timing
        while True:
            now = trio.current_time()
            fresh = [
                peer
                for peer, at in self._suspects.items()
                if now - at < RETRY_S or self._contact.is_gone(peer)
            ]
            route = self._plan(list(self._suspects)) or self._plan(fresh)
            if route is not None:
                return route
            if self._refused and self._plan(fresh, forgive=True) is not None:
                raise GenerationFailed("; ".join(dict.fromkeys(self._refused.values())))
            if self._services.view.is_coming(self._card, fresh):
                since = now
            if now - since >= timing.holders_s or now - began >= timing.loading_s:
                raise self._services.view.missing(self._card, fresh)
            gone = [peer for peer in self._contact.addrs if self._contact.is_gone(peer)]
            with trio.move_on_after(RETRY_S):
                await each([partial(self._contact.reconnect, peer) for peer in gone])
                await trio.sleep(RETRY_S)

    def _plan(self, lost: Sequence[PeerId], *, forgive: bool = False) -> tuple[RouteStage, ...] | None:
        view, session = self._services.view, self.session
        avoid = [*lost, *([] if forgive else self._refused)]
        offers = [offer for offer in view.offers(self._card) if not self._contact.is_gone(offer.peer)]
        if not session.route:
            return plan_route(self._card.n_layers, offers, self._me, view.rtt, avoid)
        return plan_repair(session.route, offers, self._me, view.rtt, avoid)

    def _suspect(self, peers: Iterable[PeerId]) -> None:
        self._suspects |= dict.fromkeys(peers, trio.current_time())

    def _record(self, position: int, lost: tuple[PeerId, ...], why: str, restart: Restart) -> None:
        replay = "chunked" if restart.chunked else "exact"
        route = self.session.route
        self.failovers.append(Failover(position, lost, why, route, 0.0, replay, restart.replayed_rows))

    def _ring_rtt(self) -> float:
        """Seconds that a token is on the wire on its way around the ring."""
        route, rtt = self.session.route, self._services.view.rtt
        return sum(rtt(route[i - 1].peer, route[i].peer) / 2 for i in range(len(route)))

    def dismiss_all(self) -> None:
        """Tell every stage that ever had the session to free it."""
        self._contact.dismiss()


def _reasons(troubles: Sequence[Trouble]) -> str:
    """What happened, in words; of what several say about one peer the first."""
    texts: dict[str, str] = {}
    for trouble in troubles:
        texts.setdefault(trouble.peer or trouble.text, trouble.text)
    return "; ".join(texts.values())
