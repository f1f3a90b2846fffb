"""The seam to the side: what generation asks of whoever holds tensors.

Two engines implement it. `mycel.compute.worker` runs torch in a process of its own, one per device: a crash
or an out-of-memory there is a lost stage, not a lost daemon. `mycel.compute.inline` runs in this process,
for tests and simnet, where compute time is virtual. This module imports no torch.

A **stage** is the span of layers [start:end) that one engine has loaded of one model. A step may run any
sub-span of it. Hidden states cross the seam as `Tensor` (raw bytes with dtype and shape), tokens as ints.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from mycel.protocol.tensor import Tensor


class Span(msgspec.Struct, frozen=True, array_like=True, order=True):
    """Layers [start:end) of a model."""

    start: int
    end: int

    def __contains__(self, other: object) -> bool:
        return isinstance(other, Span) and self.start <= other.start and other.end <= self.end


class StageSpec(msgspec.Struct, frozen=True):
    """What to load, and within which bounds."""

    model: str
    """A local directory, or a hub id such as org/name."""
    span: Span | None
    """Layers to load; None loads all."""
    dtype: str = "auto"
    """float32, bfloat16, float16, or auto: as the checkpoint says."""
    device: str = "auto"
    """cpu, cuda, cuda:N, or auto: the first GPU, else the CPU."""
    kv_bytes_max: int = 2 << 30
    """Key-value caches of all sessions together; a session that does not fit is refused."""
    threads: int = 0
    """Torch threads; 0 takes the cores this process may use."""


class ModelCard(msgspec.Struct, frozen=True):
    """What everybody needs to know of a model to route and to talk to it, without its weights."""

    name: str
    fingerprint: str
    """sha256 over config and weight files' names and sizes: equal iff the weights are the same files."""
    architecture: str
    n_layers: int
    hidden_size: int
    vocab_size: int
    max_positions: int
    dtype: str
    layer_bytes: int
    """Largest layer's weights, in bytes: what one more layer costs a peer."""
    edge_bytes: int
    """Embedding, final norm and head together, in bytes."""
    kv_bytes_per_token_layer: int
    eos_tokens: tuple[int, ...]
    batchable: bool
    """Whether steps of several sessions can run as one (no: recurrent state). A loaded stage's card tells
    what its trial showed, a card read from files what is likely."""
    rewindable: bool
    """Whether a session's cache can be cut back (no: recurrent state). Layers with a sliding window go back
    at least 64 rows, and refuse beyond what they still hold."""


class StageInfo(msgspec.Struct, frozen=True):
    """A loaded stage."""

    card: ModelCard
    span: Span
    device: str
    dtype: str
    weight_bytes: int
    load_s: float


class Sampling(msgspec.Struct, frozen=True):
    """How a token is drawn. The draw at a position depends on (seed, position) and the logits alone."""

    temperature: float = 0.0
    """0 is greedy."""
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    logprobs: int = 0
    """How many of the most likely tokens to report with each; 0: none but the chosen one's."""


class Sampled(msgspec.Struct, frozen=True):
    """One drawn token."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    gap: float
    """Logit of the best token minus the second best: how near a tie the step was."""


class Work(msgspec.Struct, frozen=True):
    """One session's part of a step: rows [position : position + count) through `span`."""

    session: str
    span: Span
    position: int
    tokens: tuple[int, ...] | None = None
    """Input of the first layer's stage: token ids."""
    hidden: Tensor | None = None
    """Input of every other stage: [count, hidden_size]."""
    sampling: Sampling | None = None
    """At the last stage: draw the token after the last row. None: only fill the cache."""
    context: tuple[int, ...] = ()
    """With a repetition penalty: the token ids so far, prompt included, that the engine has not been given
    for this session yet (it keeps them, and those it drew; giving those again does no harm)."""


class Done(msgspec.Struct, frozen=True):
    """The result of one `Work`, in the same order. At most one of the three is set: a last stage that was to
    draw nothing gives none."""

    session: str
    position: int
    hidden: Tensor | None = None
    """[count, hidden_size], for every stage but the last."""
    sampled: Sampled | None = None
    error: str | None = None
    """This session's part failed; the others went on. Begins with one word for machines: `gap:` (the
    position does not follow), `full:` (no cache memory), `input:` (the work makes no sense), `failed:` (the
    computation broke, and the session with it)."""


class EngineStats(msgspec.Struct, frozen=True):
    """Counters since the stage was loaded, and gauges."""

    steps: int
    rows: int
    """Rows (token positions) computed over all sessions."""
    sessions: int
    kv_bytes: int
    weight_bytes: int
    busy_s: float


class EngineLost(Exception):
    """The worker behind the engine is gone (crash, out of memory, killed). The text says which and why."""


class ModelUnsupported(Exception):
    """This model cannot be loaded or split; the text names it and the reason."""


class Engine(Protocol):
    """One device's tensors. One stage at a time; calls are serialised by the engine."""

    async def describe(self, model: str) -> ModelCard:
        """The card of a model, read from its configuration and file names without loading weights.

        Raises as `load` does.
        """

    async def tokenizer_files(self, model: str) -> dict[str, bytes]:
        """The small files that `mycel.compute.tokenizer` reads, by name; converted where it has to be.

        Raises as `load` does, `ModelUnsupported` where the model has no tokenizer that can be converted.
        """

    async def load(self, spec: StageSpec, progress: Callable[[float, str], None] | None = None) -> StageInfo:
        """Load a stage in place of the one held, which is let go first. `progress` gets (fraction, what).

        Raises `ModelUnsupported` (also for a span, dtype or device that is not to be had),
        `FileNotFoundError` (no such directory or hub id), `EngineLost`.
        """

    async def step(self, works: Sequence[Work]) -> list[Done]:
        """Run every work's rows in as few forwards as the model allows; one `Done` per `Work`, in order.

        A work at position 0 begins its session. A position that does not follow the session's cache gives
        an error in its `Done`. Raises `EngineLost`.
        """

    async def rewind(self, session: str, position: int) -> None:
        """Cut the session's cache back to rows [0:position).

        Raises `ModelUnsupported` if not rewindable, `ValueError` if the session is not there or is shorter.
        """

    async def forget(self, session: str) -> None:
        """Free what the session holds; nothing happens where there is none."""

    async def stats(self) -> EngineStats: ...

    async def wait_lost(self) -> EngineLost:
        """Park until the worker dies; returns why. Never returns for an inline engine."""

    async def aclose(self) -> None: ...
