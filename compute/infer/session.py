"""A session as one of its stages sees it: a synchronous machine of frames in, works and frames out.

Rows come in order and once: a row already taken in is dropped, a row that does not follow is a gap that
the owner is told of, whatever belongs to an older epoch is dropped, and whatever belongs to a newer one too
(the owner opens an epoch on every stage before it lets any of them send, so this happens only to a stage
that is about to be opened again).

A stage is in one of two states. **Flowing**, what it computes goes to the next stage at once. After an
`Open` of a newer epoch, or when the way to the next stage broke, it **holds**: it goes on computing what it
has and logs it, until `Resume` says from which row on the next stage needs it. So a failover never discards
work: what is waiting, in the engine or logged survives it, and only a stage that starts afresh computes.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import msgspec

from mycel.compute.engine import Done, Sampled, Work
from mycel.compute.infer.log import Memory, SendLog
from mycel.compute.infer.messages import (
    CreditFrame,
    Frame,
    NoticeFrame,
    Open,
    OpenReply,
    Resume,
    StageStatus,
    StepFrame,
    TokenFrame,
    name_at,
    session_of,
)
from mycel.compute.infer.rows import Rows, joined, part_of
from mycel.protocol.errors import Refused
from mycel.protocol.mesh import PeerId


class SessionCounters(msgspec.Struct):
    """What one session cost this stage (or all of them together)."""

    rows_computed: int = 0
    rows_duplicate: int = 0
    """Rows that came again and were dropped."""
    rows_resent: int = 0
    """Rows sent from the log, not computed."""
    steps: int = 0
    frames_stale: int = 0
    """Frames of another epoch, dropped."""

    def add(self, other: SessionCounters) -> None:
        """Count `other` in."""
        for name in self.__struct_fields__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


class Send(NamedTuple):
    """A frame to hand to the network."""

    peer: PeerId
    frame: Frame


class StageSession:
    """One session at one stage. `now` is trio time; every method returns the frames to send, in order."""

    def __init__(self, owner: PeerId, opened: Open, memory: Memory, now: float) -> None:
        self.owner = owner
        self.opened = opened
        self.counters = SessionCounters()
        self._memory = memory
        self._incarnation = 0
        self._log = SendLog(memory)
        self._queue: deque[Rows] = deque()
        self._early: list[Rows] = []  # came under this epoch before `Resume` did
        self.since = now
        self.heard = now
        """When the owner last asked for something."""
        self.abandoned: list[str] = []
        """Keys that the engine should forget."""
        self._begin()

    def _begin(self) -> None:
        """Start afresh: nothing taken in, nothing computed."""
        if self._incarnation:
            self.abandoned.append(self.key)
        self._incarnation += 1
        self._log.close()
        self._log = SendLog(self._memory)
        self._drop_waiting()
        self._tokens: dict[int, Sampled] = {}  # by position: drawn here, or received by the first stage
        self._context: tuple[int, ...] = ()
        self.accepted = self.started = self.computed = self.sent = 0
        self._next_have = 0
        self._sample_from = 0
        self._merge_below = 0
        self._credit = 0
        self.flowing = self.resumed = False
        self.in_flight = False
        self.failed: str | None = None

    @property
    def key(self) -> str:
        """The engine's name for this session; another one after each start afresh."""
        return f"{self.opened.session}/{self._incarnation}"

    @property
    def id(self) -> str:
        """The session's id, as its owner knows it."""
        return session_of(self.opened.session)

    @property
    def is_first(self) -> bool:
        """Whether this stage takes tokens in."""
        return self.opened.span.start == 0

    @property
    def is_last(self) -> bool:
        """Whether this stage draws tokens."""
        return self.opened.span.end == self.opened.n_layers

    @property
    def can_step(self) -> bool:
        """Whether rows wait that the engine may take now."""
        if self.in_flight or not self._queue or self.failed is not None:
            return False
        return not self.is_first or self._queue[0].position < self._credit

    @property
    def waiting(self) -> Rows:
        """The rows that are next."""
        return self._queue[0]

    # --- what the owner asks

    def on_open(self, opened: Open, now: float) -> OpenReply:
        """A newer epoch, or the same one asked again. Raises `Refused` (stale) for an older one."""
        if opened.epoch < self.opened.epoch:
            raise Refused(f"epoch {opened.epoch} is over; {self.opened.epoch} runs", reason="stale")
        afresh = opened.span != self.opened.span or self.failed is not None
        self.opened = opened
        self.since = self.heard = now
        if afresh:
            self._begin()
        self.flowing = self.resumed = False
        self._hold(-sum(rows.nbytes for rows in self._early))
        self._early.clear()
        known: list[Sampled] = []
        while (position := opened.tokens_from + len(known)) in self._tokens:
            known.append(self._tokens[position])
        return OpenReply(self.accepted, self.started, self._log.start, tuple(known))

    def on_resume(self, resume: Resume, now: float) -> list[Send]:
        """Go on: cut or start afresh as told, then send what the next stage lacks.

        Raises `Refused` (stale) for another epoch than the open one, (unkept) when `keep` cannot be done.
        """
        if resume.epoch != self.opened.epoch:
            raise Refused(f"epoch {resume.epoch} is not open; {self.opened.epoch} is", reason="stale")
        if resume.keep == 0 and self.accepted > 0:
            self._begin()
        elif resume.keep > self.accepted or resume.keep < self.started:
            raise Refused(
                f"cannot keep {resume.keep} rows of {self.accepted}, {self.started} begun", reason="unkept"
            )
        self._cut(resume.keep)
        if not self.is_last and resume.next_have < self._log.start:
            raise Refused(
                f"row {resume.next_have} is no longer in the log from {self._log.start}", reason="unkept"
            )
        self.since = now
        self._next_have = resume.next_have
        self._merge_below = resume.merge_below
        self._credit = max(self._credit, resume.credit)
        if resume.keep == 0:
            self._sample_from = resume.sample_from
            self._context = resume.context
        self.flowing = self.resumed = True
        sends = self._resend()
        early, self._early = self._early, []
        for item in early:
            self._hold(-item.nbytes)
            sends += self._accept(self.opened.epoch, item, now)
        return sends

    def _cut(self, keep: int) -> None:
        while self._queue and self._queue[-1].end > keep:
            rows = self._queue.pop()
            self._hold(-rows.nbytes)
            if rows.position < keep:
                self._push(part_of(rows, rows.position, keep))
        self.accepted = keep
        if not self.is_last:
            self._tokens = {at: sampled for at, sampled in self._tokens.items() if at < keep}

    def _resend(self) -> list[Send]:
        self.sent = self._next_have
        if self.is_last:
            drawn = [position for position in self._tokens if position >= self._next_have]
            self.counters.rows_resent += len(drawn)
            return [send for position in sorted(drawn) for send in self._send_token(position)]
        sends = []
        for rows in self._log.since(self._next_have):
            self.counters.rows_resent += rows.rows
            sends.append(self._send_rows(rows))
        return sends

    def on_credit(self, frame: CreditFrame) -> None:
        """The owner lets the first stage go further."""
        if frame.epoch == self.opened.epoch:
            self._credit = max(self._credit, frame.credit)

    # --- what the other stages send

    def on_step(self, peer: PeerId, frame: StepFrame, now: float) -> list[Send]:
        """Rows from the stage before, or the owner's tokens."""
        if peer not in (self.opened.prev, self.owner) or (frame.tokens is None) == self.is_first:
            return []
        return self._accept(frame.epoch, Rows(frame.position, frame.count, frame.tokens, frame.hidden), now)

    def on_token(self, peer: PeerId, frame: TokenFrame, now: float) -> list[Send]:
        """The last stage's token, which is the first stage's next row."""
        if not self.is_first or peer != self.opened.prev:
            return []
        item = Rows(frame.position, 1, (frame.sampled.token,), None)
        if frame.epoch == self.opened.epoch and frame.position == self.accepted:
            self._tokens[frame.position] = frame.sampled
        return self._accept(frame.epoch, item, now)

    def _accept(self, epoch: int, item: Rows, now: float) -> list[Send]:
        if epoch != self.opened.epoch:
            self.counters.frames_stale += 1
            return []
        if not self.resumed:
            self._early.append(item)
            self._hold(item.nbytes)
            return []
        if self.failed is not None:
            return []
        if item.position > self.accepted:
            if not self.flowing:
                return []
            self.flowing = False
            return [self.notice("gap", None, f"row {item.position} came, {self.accepted} is next")]
        fresh = item.end - self.accepted
        self.counters.rows_duplicate += item.rows - max(fresh, 0)
        if fresh <= 0:
            return []
        if fresh < item.rows:
            item = part_of(item, self.accepted, item.end)
        if not self._queue:
            self.since = now
        self._push(item)
        self.accepted = item.end
        return []

    # --- the engine

    def take(self, rows_max: int) -> Work:
        """The next step's part of this session; `can_step` must hold."""
        item = self._queue.popleft()
        while self._queue and self._queue[0].end <= self._merge_below:
            if item.rows + self._queue[0].rows > rows_max:
                break
            item = joined(item, self._queue.popleft())
        self._hold(-item.nbytes)
        self.started = item.end
        self.in_flight = True
        samples = self.is_last and item.end > self._sample_from
        context: tuple[int, ...] = ()
        if samples and self.opened.sampling.repetition_penalty != 1:
            context, self._context = self._context, ()
        return Work(
            session=self.key,
            span=self.opened.span,
            position=item.position,
            tokens=item.tokens,
            hidden=item.hidden,
            sampling=self.opened.sampling if samples else None,
            context=context,
        )

    def on_done(self, work: Work, count: int, done: Done, now: float) -> list[Send]:
        """The engine's result for `work` of `count` rows."""
        if done.error is None:
            self.counters.rows_computed += count
            self.counters.steps += 1
        if work.session != self.key:
            return []  # of before a start afresh
        self.in_flight = False
        self.since = now
        if done.error is not None:
            return self.fail("error", done.error)
        self.computed = work.position + count
        if done.sampled is not None:
            position = work.position + count
            self._tokens[position] = done.sampled
            if self.opened.sampling.repetition_penalty != 1:
                self._context += (done.sampled.token,)
            return self._send_token(position) if self.flowing and position >= self._next_have else []
        if done.hidden is None or self.is_last:
            return []
        rows = Rows(work.position, count, None, done.hidden)
        self._log.append(rows)
        if self.flowing and rows.end > self._next_have:
            return [self._send_rows(rows)]
        return []

    def fail(self, kind: str, text: str) -> list[Send]:
        """This stage cannot go on with the session; tell the owner. Opened again, it starts afresh."""
        self.failed = text
        self.flowing = False
        self._drop_waiting()
        return [self.notice(kind, None, text)]

    def on_link_lost(self, peer: PeerId, kind: str, text: str) -> list[Send]:
        """The stream to `peer` broke ("link") or cannot be made ("unreachable")."""
        targets = (self.opened.next, self.owner) if self.is_last else (self.opened.next,)
        if peer not in targets or (not self.flowing and kind == "link"):
            return []
        self.flowing = False
        if peer == self.owner:
            return []  # no way to tell; the owner misses its tokens by itself
        return [self.notice(kind, peer, text)]

    # --- words

    def notice(self, kind: str, peer: PeerId | None, text: str) -> Send:
        """Tell the owner."""
        return Send(self.owner, NoticeFrame(self.opened.session, self.opened.epoch, kind, peer, text))

    def status(self, now: float) -> StageStatus:
        """What this stage is doing for the session."""
        if self.in_flight:
            state = "computing"
        elif self.can_step:
            state = "queued"
        else:
            state = "held" if self._queue else "waiting"
        return StageStatus(
            self.opened.epoch, self.accepted, self.started, self.computed, self.sent, state, now - self.since
        )

    def close(self) -> None:
        """Free the log and what waits."""
        self._log.close()
        self._drop_waiting()

    def _push(self, rows: Rows) -> None:
        self._queue.append(rows)
        self._hold(rows.nbytes)

    def _drop_waiting(self) -> None:
        self._hold(-sum(rows.nbytes for rows in (*self._queue, *self._early)))
        self._queue.clear()
        self._early.clear()

    def _hold(self, nbytes: int) -> None:
        self._memory.waiting_bytes += nbytes

    def _send_rows(self, rows: Rows) -> Send:
        self.sent = rows.end
        opened = self.opened
        name = name_at(self.id, opened.span.end)
        return Send(opened.next, StepFrame(name, opened.epoch, rows.position, rows.rows, None, rows.hidden))

    def _send_token(self, position: int) -> list[Send]:
        self.sent = position + 1
        opened = self.opened
        frame = TokenFrame(self.id, opened.epoch, position, self._tokens[position])
        return [Send(peer, frame) for peer in dict.fromkeys((opened.next, self.owner))]
