"""A session as its owner sees it: a synchronous machine that knows the tokens and decides what stages do.

The owner counts as the first stage's predecessor: it has all tokens, and replays them. It takes a token once,
by position and under the current epoch, and lets the first stage run ahead of the client by a window.

**Recovery.** Under a new epoch every stage of the (perhaps changed) route is opened and says which rows it
took in, where its log begins, and which tokens it knows; `plan_resume` makes of the answers what each is to
do. A stage keeps what it has, unless it took in rows of a token that nobody else knows any more, or its
successor needs rows that it computed but no longer has in its log: then it starts afresh, and needs all rows
itself. So the plan is made from the last stage to the first, and ends at the owner, who has everything.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from mycel.compute.engine import Sampled, Sampling
from mycel.compute.infer.messages import (
    CreditFrame,
    Open,
    OpenReply,
    Resume,
    StageStatus,
    StepFrame,
    TokenFrame,
    name_at,
)
from mycel.compute.infer.pace import Pace, Timing
from mycel.compute.infer.request import RouteStage
from mycel.protocol.mesh import PeerId

EPOCH_UNKNOWN = -1
"""Epoch in the status of a stage that answers but knows no such session."""


class Job(NamedTuple):
    """What is to be generated."""

    session: str
    fingerprint: str
    n_layers: int
    prompt: tuple[int, ...]
    tokens_max: int
    """Prompt and generated tokens together."""
    sampling: Sampling
    replay: str


class Restart(NamedTuple):
    """What a recovery makes the stages do."""

    resumes: tuple[Resume, ...]
    frames: tuple[StepFrame, ...]
    """The owner's own replay, for the first stage."""
    chunked: bool
    replayed_rows: int


class Verdict(NamedTuple):
    """What the stages' answers mean."""

    lost: tuple[PeerId, ...]
    recover: bool
    """Whether a new epoch is needed."""
    settle: bool
    """Whether to look again soon: all are idle, but rows may be on the way."""
    why: str


class OwnerSession:
    """One session at its owner. `now` is trio time in seconds."""

    def __init__(self, job: Job, timing: Timing, now: float) -> None:
        self.job = job
        self.timing = timing
        self.tokens: list[int] = list(job.prompt)
        self.drawn: list[Sampled] = []
        self.times: list[float] = []
        self.epoch = 0
        self.route: tuple[RouteStage, ...] = ()
        self.pace = Pace(timing, now)
        self._consumed = 0
        self._granted = self._credit()
        self._idle: tuple[int, ...] | None = None

    # --- tokens

    @property
    def expecting(self) -> bool:
        """Whether the ring should be making a token now."""
        return len(self.tokens) <= self._granted

    @property
    def complete(self) -> bool:
        """Whether all tokens asked for are here."""
        return len(self.tokens) >= self.job.tokens_max

    def on_token(self, peer: PeerId, frame: TokenFrame, now: float) -> bool:
        """Whether the token is the next one; anything else is dropped."""
        if frame.epoch != self.epoch or not self.route or peer != self.route[-1].peer:
            return False
        if frame.position != len(self.tokens) or self.complete:
            return False
        self._add(frame.sampled, now)
        return True

    def is_gap(self, frame: TokenFrame) -> bool:
        """Whether tokens before this one got lost."""
        return frame.epoch == self.epoch and frame.position > len(self.tokens)

    def on_consumed(self, count: int, now: float) -> CreditFrame | None:
        """The client took `count` tokens; a credit for the first stage, when it is worth a frame."""
        self._consumed += count
        credit = self._credit()
        last = credit == self.job.tokens_max - 1
        if credit <= self._granted or (credit - self._granted < self.timing.window // 2 and not last):
            return None
        if not self.expecting:
            self.pace.restart(now)
        self._granted = credit
        return CreditFrame(self.job.session, self.epoch, credit)

    def deadline(self, ring_rtt_s: float) -> float:
        """When to ask the stages; infinity while nothing is expected of them."""
        return self.pace.deadline(ring_rtt_s) if self.expecting else math.inf

    def _credit(self) -> int:
        ahead = len(self.job.prompt) + self._consumed + self.timing.window - 1
        return min(ahead, self.job.tokens_max - 1)

    def _add(self, sampled: Sampled, now: float) -> None:
        self.tokens.append(sampled.token)
        self.drawn.append(sampled)
        self.times.append(now)
        self.pace.on_token(now)
        self._idle = None

    # --- epochs

    def begin_epoch(self, route: Sequence[RouteStage]) -> None:
        """Take `route` from here on."""
        self.epoch += 1
        self.route = tuple(route)

    def opens(self, addrs: dict[PeerId, tuple[str, ...]]) -> list[Open]:
        """What each stage is opened with under the current epoch. `addrs`: where peers can be dialled.

        The first epoch tells the stages to go on at once, later ones to wait for `plan_resume`.
        """
        starts: Sequence[Resume | None] = [None] * len(self.route)
        if self.epoch == 1:
            empty = [OpenReply(0, 0, 0, ())] * len(self.route)
            starts = self.plan_resume(empty).resumes
        opens = []
        for index, (stage, start) in enumerate(zip(self.route, starts, strict=True)):
            following = self.route[(index + 1) % len(self.route)].peer
            opens.append(
                Open(
                    session=name_at(self.job.session, stage.span.start),
                    epoch=self.epoch,
                    fingerprint=self.job.fingerprint,
                    span=stage.span,
                    n_layers=self.job.n_layers,
                    prev=self.route[index - 1].peer,
                    next=following,
                    next_addrs=addrs.get(following, ()),
                    sampling=self.job.sampling,
                    tokens_from=len(self.tokens),
                    start=start,
                )
            )
        return opens

    def adopt(self, replies: Sequence[OpenReply], now: float) -> int:
        """Take over tokens that the first or the last stage knows and the owner never got; how many."""
        known = max((reply.tokens for reply in replies), key=len)[: self.job.tokens_max - len(self.tokens)]
        for sampled in known:
            self._add(sampled, now)
        return len(known)

    def plan_resume(self, replies: Sequence[OpenReply]) -> Restart:
        """What each stage and the owner do to go on, given what the stages have (after `adopt`)."""
        known = len(self.tokens)
        chunked = self._is_chunked()
        keeps: list[int] = []
        for index in reversed(range(len(replies))):
            reply = replies[index]
            keep = min(reply.accepted, known)
            if reply.started > keep:
                keep = 0
            is_last = index == len(replies) - 1
            if not is_last and keep > 0 and keeps[-1] < min(reply.log_start, keep):
                keep = 0
            keeps.append(keep)
        keeps.reverse()
        resumes = []
        for index, keep in enumerate(keeps):
            is_last = index == len(keeps) - 1
            penalised = self.job.sampling.repetition_penalty != 1
            resumes.append(
                Resume(
                    session=name_at(self.job.session, self.route[index].span.start),
                    epoch=self.epoch,
                    keep=keep,
                    next_have=known if is_last else keeps[index + 1],
                    sample_from=known - 1,
                    context=tuple(self.tokens) if is_last and keep == 0 and penalised else (),
                    merge_below=known - 1 if chunked else 0,
                    credit=self._granted if index == 0 else 0,
                )
            )
        replayed = sum(known for keep in keeps if keep == 0) if self.epoch > 1 else 0
        return Restart(tuple(resumes), tuple(self._replay(keeps[0], chunked)), chunked, replayed)

    def _is_chunked(self) -> bool:
        if self.job.replay == "auto":
            return len(self.drawn) > self.timing.replay_exact_steps
        return self.job.replay == "chunked"

    def _replay(self, have: int, chunked: bool) -> list[StepFrame]:
        """Frames for the first stage that has rows [0:have), in the steps that it would have had them."""
        size = self.timing.prefill_rows
        known = len(self.tokens)
        prompt = len(self.job.prompt)
        bulk = max(prompt, known - 1) if chunked else prompt
        bounds = [*range(0, bulk, size), *range(bulk, known + 1)]
        return [
            StepFrame(self.job.session, self.epoch, start, end - start, tuple(self.tokens[start:end]))
            for start, end in pairwise(bounds)
            if end > have
        ]

    # --- trouble

    def judge(self, statuses: Sequence[StageStatus | None]) -> Verdict:
        """What it means that the stages, in route order, answered so (None: not at all)."""
        lost = []
        for stage, status in zip(self.route, statuses, strict=True):
            if status is None or (status.state == "computing" and status.since_s > self.timing.stuck_s):
                lost.append(stage.peer)
        if lost:
            return Verdict(tuple(dict.fromkeys(lost)), True, False, "no answer")
        answers = [status for status in statuses if status is not None]
        if any(status.epoch != self.epoch for status in answers):
            return Verdict((), True, False, "a stage lost the session")
        if any(status.state in ("computing", "queued") for status in answers):
            self._idle = None
            return Verdict((), False, False, "")
        seen = (len(self.tokens), *(status.accepted for status in answers))
        if self._idle == seen:
            return Verdict((), True, False, "rows got lost on the way")
        self._idle = seen
        return Verdict((), False, True, "")
