"""Generation as its owner sees it: the service that turns a request into a stream of pieces.

A node needs no layers to own a session. It finds the model on the board, fetches its tokenizer from a holder
where text goes in or comes out, and drives the session (`mycel.compute.infer.drive`). Tokens arrive in the
connection's reader and wait in the session; text is made of them, and stops are found, when the client asks
for the next piece, which is also what lets the ring go on.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import trio
from trio import TaskStatus

from mycel.compute.engine import ModelCard
from mycel.compute.infer.contact import Services
from mycel.compute.infer.generation import Generation
from mycel.compute.infer.links import Links
from mycel.compute.infer.messages import FILES, FilesName, Frame, NoticeFrame, TokenFrame, session_of
from mycel.compute.infer.owner import Job, OwnerSession
from mycel.compute.infer.pace import DEFAULT_TIMING, Timing
from mycel.compute.infer.request import GenerateRequest, ModelStatus, RequestInvalid
from mycel.compute.infer.view import SwarmView
from mycel.compute.tokenizer import Tokenizer, TokenizerError, read_tokenizer
from mycel.protocol.board import Board
from mycel.protocol.errors import LocalProtocolError, MycelError
from mycel.protocol.mesh import PeerDown, PeerId
from mycel.protocol.rpc import Rpc

__all__ = ["Generation", "Generator"]

FILES_S = 30.0
"""Fetching a tokenizer: some megabytes from a slow uplink."""
TOKENIZERS_KEPT = 16


class Generator:
    """Owns sessions. `run` must be running."""

    def __init__(self, links: Links, rpc: Rpc, board: Board, timing: Timing = DEFAULT_TIMING) -> None:
        self._links = links
        self._mesh = links.mesh
        self._rpc = rpc
        self._board = board
        self._timing = timing
        self._view = SwarmView(self._mesh, board)
        self._generations: dict[str, Generation] = {}
        self._tokenizers: dict[str, Tokenizer] = {}
        self._nursery: trio.Nursery | None = None
        links.attach(self)

    async def run(self, *, task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Drive sessions until cancelled."""
        try:
            async with trio.open_nursery() as self._nursery:
                await self._nursery.start(self._watch_peers)
                await self._nursery.start(self._watch_stages)
                task_status.started()
        finally:
            self._nursery = None

    def models(self) -> list[ModelStatus]:
        """What the peers in reach can serve, ordered by name."""
        return self._view.models()

    async def tokenizer(self, model: str) -> Tokenizer:
        """The model's tokenizer, from a holder of the model. Raises `ModelUnknown`, `RequestInvalid`."""
        return await self._tokenizer(self._view.find(model))

    def generate(self, request: GenerateRequest) -> AbstractAsyncContextManager[Generation]:
        """Run `request`; leaving the block early cancels it everywhere.

        Entering raises `ModelUnknown`, `LayersMissing`, `RequestInvalid` or `GenerationFailed`; iterating the
        last, and `LayersMissing` when holders went and none came.
        """
        return self._generate(request)

    @asynccontextmanager
    async def _generate(self, request: GenerateRequest) -> AsyncIterator[Generation]:
        if self._nursery is None:
            raise LocalProtocolError("start Generator.run first")
        card = self._view.find(request.model)
        generation = await self._prepare(request, card)
        self._generations[generation.session] = generation
        try:
            await generation.drive.begin()
            self._start_soon(generation.keep_going)
            yield generation
        finally:
            del self._generations[generation.session]
            generation.end()

    def _start_soon(self, work: Callable[..., Awaitable[None]], *args: Any) -> None:
        """Start a task of the service's; nothing happens where the service has ended."""
        if self._nursery is not None:
            with contextlib.suppress(RuntimeError):  # it is ending just now, and takes no more tasks
                self._nursery.start_soon(work, *args)

    async def _prepare(self, request: GenerateRequest, card: ModelCard) -> Generation:
        tokenizer: Tokenizer | None = None
        try:
            tokenizer = await self._tokenizer(card)
        except RequestInvalid:
            if isinstance(request.prompt, str) or request.stop:
                raise
        if isinstance(request.prompt, str):
            assert tokenizer is not None
            prompt = tuple(tokenizer.encode(request.prompt))
        else:
            prompt = request.prompt
        job = Job(
            session=self._mesh.entropy(16).hex(),
            fingerprint=card.fingerprint,
            n_layers=card.n_layers,
            prompt=prompt,
            tokens_max=_tokens_max(request, card, prompt),
            sampling=request.sampling,
            replay=request.replay,
        )
        session = OwnerSession(job, self._timing, trio.current_time())
        services = Services(self._links, self._rpc, self._view, self._start_soon)
        return Generation(request, card, tokenizer, session, services)

    async def _tokenizer(self, card: ModelCard) -> Tokenizer:
        if card.fingerprint in self._tokenizers:
            return self._tokenizers[card.fingerprint]
        holders = sorted(
            self._view.holders(card), key=lambda h: (self._view.rtt(self._mesh.peer_id, h.peer), h.peer)
        )
        failures = [f"nobody in reach holds {card.name}"] if not holders else []
        for holder in holders:
            try:
                reply = await self._rpc.call(
                    holder.peer, FILES, FilesName(card.fingerprint), deadline_s=FILES_S
                )
                tokenizer = read_tokenizer(reply.files, wall=self._mesh.wall)
            except (MycelError, TokenizerError) as error:
                failures.append(f"{holder.peer}: {error}")
                continue
            while len(self._tokenizers) >= TOKENIZERS_KEPT:
                del self._tokenizers[next(iter(self._tokenizers))]
            self._tokenizers[card.fingerprint] = tokenizer
            return tokenizer
        raise RequestInvalid(f"no tokenizer of {card.name} to be had: {'; '.join(failures)}")

    # --- news

    @property
    def congested(self) -> bool:
        """See `Receiver`: tokens are small and bounded by credits."""
        return False

    def on_frame(self, peer: PeerId, frame: Frame) -> None:
        """See `Receiver`."""
        generation = self._generations.get(session_of(frame.session))
        if generation is None:
            return
        if isinstance(frame, TokenFrame):
            generation.on_token(peer, frame)
        elif isinstance(frame, NoticeFrame):
            generation.drive.on_notice(peer, frame)

    def on_link_ready(self, peer: PeerId) -> None:
        """See `Receiver`."""

    def on_link_lost(self, peer: PeerId, kind: str, text: str) -> None:
        """See `Receiver`."""
        for generation in self._generations.values():
            generation.drive.on_link_lost(peer, kind, text)

    async def _watch_peers(self, *, task_status: TaskStatus[None]) -> None:
        async with self._mesh.events() as events:
            task_status.started()
            async for event in events:
                if isinstance(event, PeerDown):
                    for generation in list(self._generations.values()):
                        left = event.reason == "left"
                        generation.drive.on_peer_down(event.peer, event.text, left=left)

    async def _watch_stages(self, *, task_status: TaskStatus[None]) -> None:
        async with self._board.watch("stages/") as changes:
            task_status.started()
            async for change in changes:
                for generation in list(self._generations.values()):
                    generation.drive.on_fact(change)


def _tokens_max(request: GenerateRequest, card: ModelCard, prompt: tuple[int, ...]) -> int:
    if not prompt:
        raise RequestInvalid("the prompt is empty; give at least one token")
    if request.max_tokens < 1:
        raise RequestInvalid(f"max_tokens {request.max_tokens}: ask for at least one")
    if len(prompt) >= card.max_positions:
        raise RequestInvalid(
            f"the prompt has {len(prompt)} tokens; {card.name} has positions for {card.max_positions} in all"
        )
    outside = [token for token in prompt if not 0 <= token < card.vocab_size]
    if outside:
        raise RequestInvalid(f"token {outside[0]} is not in the vocabulary of {card.vocab_size}")
    return min(len(prompt) + request.max_tokens, card.max_positions)
