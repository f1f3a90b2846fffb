"""What the owner and the stages of a session say to each other, and what stages publish about themselves.

Two ways carry it. Small questions with an answer are rpc methods (`session.open`, `session.resume`,
`session.status`, `session.close`, `model.files`). Everything on the path of a token is a frame on the one
stage stream that a peer keeps to each other peer it sends to: `StepFrame` (rows on their way through the
layers), `TokenFrame` (a drawn token, from the last stage to the first and to the owner), `CreditFrame` (how
far the first stage may go) and `NoticeFrame` (a stage tells the owner what went wrong).

A **row** is one token position on its way through the layers; row r makes the token at position r + 1. An
**epoch** numbers the routes of a session: the owner raises it with every change, and what was sent under
an older one is dropped on arrival.

A **name** is what a stage calls a session: the session's id, and for stages that do not begin with layer 0
their first layer. So a peer may have several stages of one session.
"""

from __future__ import annotations

from types import NoneType

import msgspec

from mycel.compute.engine import ModelCard, Sampled, Sampling, Span
from mycel.protocol.mesh import Access, PeerId
from mycel.protocol.method import Method
from mycel.protocol.tensor import Tensor

STAGE_PROTOCOL = "/mycel/stage/1"


def name_at(session: str, start: int) -> str:
    """What the stage from layer `start` on calls a session. Tokens go by the id alone: it is the first's."""
    return f"{session}/{start}" if start else session


def session_of(name: str) -> str:
    """The session's id, which its owner knows it by."""
    return name.partition("/")[0]


class StepFrame(msgspec.Struct, frozen=True):
    """Rows [position : position + count): token ids towards the first stage, hidden states after it."""

    session: str
    """Its name at the stage that the rows go to."""
    epoch: int
    position: int
    count: int
    tokens: tuple[int, ...] | None = None
    hidden: Tensor | None = None


class TokenFrame(msgspec.Struct, frozen=True, array_like=True, tag="t"):
    """The token at `position`, drawn by the last stage."""

    session: str
    epoch: int
    position: int
    sampled: Sampled


class CreditFrame(msgspec.Struct, frozen=True, array_like=True, tag="c"):
    """Owner to first stage: rows below `credit` may be computed."""

    session: str
    epoch: int
    credit: int


class NoticeFrame(msgspec.Struct, frozen=True, array_like=True, tag="n"):
    """Stage to owner: something is wrong.

    `kind`: "link" (the stream to `peer` broke), "unreachable" (no new one could be made either), "gap" (rows
    are missing), "engine" (the worker is gone), "error" (this session's step failed; the text says why),
    "unknown" (no such session here).
    """

    session: str
    """Its name at the stage that says so."""
    epoch: int
    kind: str
    peer: PeerId | None
    text: str


Frame = StepFrame | TokenFrame | CreditFrame | NoticeFrame


class Resume(msgspec.Struct, frozen=True):
    """How a stage goes on under an epoch."""

    session: str
    """Its name at this stage, as in all that the owner asks of a stage."""
    epoch: int
    keep: int = 0
    """Rows to keep; less than accepted cuts waiting input, 0 starts afresh."""
    next_have: int = 0
    """Rows that the next stage has; at the last stage: tokens that the owner has. Send from here on."""
    sample_from: int = 0
    """At the last stage: rows below it draw no token."""
    context: tuple[int, ...] = ()
    """At the last stage, with a repetition penalty and when starting afresh: all tokens so far."""
    merge_below: int = 0
    """Waiting rows below it may be joined into larger steps (a chunked replay)."""
    credit: int = 0
    """At the first stage: rows below it may be computed."""


class Open(msgspec.Struct, frozen=True):
    """Owner to each stage of a route, at the start and with every new epoch."""

    session: str
    epoch: int
    fingerprint: str
    span: Span
    n_layers: int
    prev: PeerId
    """Who comes before in the ring: sends this stage its rows; for the first, the last: its tokens."""
    next: PeerId
    """Who comes after in the ring: takes its rows; for the last, the first: takes its tokens."""
    next_addrs: tuple[str, ...]
    """Where `next` can be reached, should there be no connection yet."""
    sampling: Sampling
    tokens_from: int = 0
    """Reply with the tokens known from this position on."""
    start: Resume | None = None
    """Go on at once by this; None: wait for `session.resume`."""


class OpenReply(msgspec.Struct, frozen=True):
    """What a stage has of a session."""

    accepted: int
    """Rows it took in: computed, in the engine, or waiting. The next row it expects."""
    started: int
    """Rows computed or in the engine."""
    log_start: int
    """First row of its send log (all from there to `started` are in it, or will be when computed)."""
    tokens: tuple[Sampled, ...]
    """First and last stage: the tokens it knows from `tokens_from` on."""


class SessionName(msgspec.Struct, frozen=True):
    """A question about one session at one stage."""

    session: str


class StageStatus(msgspec.Struct, frozen=True):
    """What a stage is doing for a session."""

    epoch: int
    accepted: int
    started: int
    computed: int
    sent: int
    """Rows (last stage: tokens) handed to the network under this epoch."""
    state: str
    """ "computing", "queued" (has rows, the engine is busy with others), "held" (no credit), "waiting"."""
    since_s: float
    """How long that has been so."""


class FilesName(msgspec.Struct, frozen=True):
    """Asks for a model's small files."""

    fingerprint: str


class FilesReply(msgspec.Struct, frozen=True):
    """A model's small files: configuration and tokenizer."""

    files: dict[str, bytes]


OPEN = Method("session.open", Open, OpenReply, access=Access.SUBMIT)
RESUME = Method("session.resume", Resume, NoneType, access=Access.SUBMIT)
STATUS = Method("session.status", SessionName, StageStatus, access=Access.SUBMIT, idempotent=True)
CLOSE = Method("session.close", SessionName, NoneType, access=Access.SUBMIT, idempotent=True)
FILES = Method("model.files", FilesName, FilesReply, access=Access.SUBMIT, idempotent=True)


class ModelFact(msgspec.Struct, frozen=True):
    """Board, `models/<fingerprint>`: a model that the author knows and whose small files it hands out."""

    card: ModelCard


class StageFact(msgspec.Struct, frozen=True):
    """Board, `stages/<fingerprint>`: the author's stage of a model; `.../<n>`: its n-th further one."""

    span: Span
    state: str
    """ "claiming" (about to load, may yield), "loading", "ready", "leaving"."""
    standby: bool = False
    """A spare: taken where nobody else serves the layers."""
    layer_row_s: float = 0.0
    """Seconds that one row takes through one layer, smoothed; 0 before the first step."""
    sessions: int = 0


def model_key(fingerprint: str) -> str:
    """Board key of a model."""
    return f"models/{fingerprint}"


def stage_key(fingerprint: str, number: int = 0) -> str:
    """Board key of a peer's first stage of a model, or of a further one."""
    return f"stages/{fingerprint}/{number}" if number else f"stages/{fingerprint}"


def is_stage_key(key: str, fingerprint: str) -> bool:
    """Whether a fact under `key` speaks of a stage of that model."""
    first, _, number = key.removeprefix("stages/").partition("/")
    return first == fingerprint and key.startswith("stages/") and (number == "" or number.isdigit())
