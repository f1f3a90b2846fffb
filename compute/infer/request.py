"""What a caller asks of generation and what it gets back: plain data, no machinery."""

from __future__ import annotations

import msgspec

from mycel.compute.engine import ModelCard, Sampling, Span
from mycel.protocol.errors import MycelError
from mycel.protocol.mesh import PeerId


class ModelUnknown(MycelError):
    """No peer in reach serves a model of that name; the text lists those that are served."""


class LayersMissing(MycelError):
    """Some layers of the model have no holder in reach; the text names them and the command that helps."""


class RequestInvalid(MycelError):
    """The request asks for what the model cannot give (an empty or too long prompt, a negative count)."""


class GenerationFailed(MycelError):
    """The session could not go on and no other route was left; the text tells what was tried."""


class GenerateRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One generation to run."""

    model: str
    """A served model's name, or its fingerprint."""
    prompt: str | tuple[int, ...]
    """Text, or token ids as they are."""
    sampling: Sampling = Sampling()
    max_tokens: int = 256
    """Tokens to generate at most; cut to what the model's positions leave."""
    stop: tuple[str, ...] = ()
    """The text ends before the first of these to appear."""
    stop_tokens: tuple[int, ...] | None = None
    """Tokens that end the generation, themselves not shown; None: those of the model's card."""
    echo: bool = False
    """Whether the first piece is the prompt's text."""
    replay: str = "auto"
    """How a replacement is brought up: "exact" (the original step boundaries, the same bits), "chunked"
    (faster for long sessions, may flip a near tie), or "auto": exact up to some hundreds of steps."""


class Token(msgspec.Struct, frozen=True):
    """One generated token."""

    id: int
    text: str
    """The token alone, as text; a part of a character shows as U+FFFD."""
    logprob: float
    """Natural logarithm of the model's probability, before any sampling rule."""
    top: tuple[tuple[int, str, float], ...] = ()
    """The most likely tokens as (id, text, logprob), as many as the request's sampling.logprobs."""


class Piece(msgspec.Struct, frozen=True):
    """What arrived since the last piece. Text held back for a possible stop string comes with a later one."""

    text: str
    tokens: tuple[Token, ...] = ()
    finish: str | None = None
    """Set on the last piece: "stop" (a stop token or string) or "length"."""


class RouteStage(msgspec.Struct, frozen=True, order=True):
    """Who runs which layers of a session."""

    peer: PeerId
    span: Span


class Failover(msgspec.Struct, frozen=True):
    """One recovery of a session."""

    position: int
    """Tokens (prompt included) known when it began."""
    lost: tuple[PeerId, ...]
    """Peers replaced; empty when the same route was taken up again after a broken link."""
    why: str
    route: tuple[RouteStage, ...]
    """The route taken from here on."""
    stall_s: float
    """From the last token before it to the first after it."""
    replay: str
    """ "exact" or "chunked"."""
    replayed_rows: int
    """Rows that stages computed a second time somewhere else."""


class Report(msgspec.Struct, frozen=True):
    """How a generation went; complete once it ended."""

    session: str
    model: str
    route: tuple[RouteStage, ...]
    """The route at the end."""
    prompt_tokens: int
    tokens: int
    first_token_s: float
    tokens_per_s: float
    """Generated tokens after the first, per second from the first to the last."""
    failovers: tuple[Failover, ...]
    longest_gap_s: float
    """Longest wait between two tokens."""
    gap_min: float
    """Smallest distance between the best and second best logit over all tokens."""
    finish: str
    """ "stop", "length", "cancelled" or "failed"."""


class Holder(msgspec.Struct, frozen=True):
    """A peer and the layers it holds."""

    peer: PeerId
    span: Span
    state: str
    """ "loading", "ready" or "leaving"."""


class ModelStatus(msgspec.Struct, frozen=True):
    """What the peers in reach can serve of one model."""

    card: ModelCard
    holders: tuple[Holder, ...]
    missing: tuple[Span, ...]
    """Layers that nobody ready holds, as maximal spans."""

    @property
    def complete(self) -> bool:
        """Whether a generation could start now."""
        return not self.missing
