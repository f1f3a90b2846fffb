"""Generation as its owner sees it: the service that turns a request into a stream of pieces."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from typing import Protocol

import trio

from mycel.compute.infer.request import GenerateRequest, ModelStatus, Piece, Report
from mycel.compute.tokenizer import Tokenizer


class Generation(Protocol):
    """One running generation: iterate it for pieces; leave its context to cancel it everywhere."""

    @property
    def session(self) -> str: ...

    @property
    def prompt(self) -> tuple[int, ...]: ...

    @property
    def report(self) -> Report:
        """How it went so far; final once iteration ended."""

    def __aiter__(self) -> AsyncIterator[Piece]: ...

    async def __anext__(self) -> Piece: ...


class Generator(Protocol):
    """The owner service. Construct with (mesh, rpc, board, links), then `await nursery.start(generator.run)`."""

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None: ...

    def models(self) -> list[ModelStatus]:
        """What the peers in reach can serve, ordered by name."""

    async def tokenizer(self, model: str) -> Tokenizer:
        """The model's tokenizer, fetched from a holder when this node has none (for chat templates)."""

    def generate(self, request: GenerateRequest) -> AbstractAsyncContextManager[Generation]:
        """Run `request`. Raises ModelUnknown, LayersMissing, RequestInvalid on entering or GenerationFailed
        (LayersMissing too) while iterating."""
