"""One answer of the OpenAI-compatible API: its generations, run while the client is watched.

A client that goes away cancels its sessions on every stage, streaming or not. Errors come in OpenAI's shape;
one that strikes after the first event was sent comes as an event.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import trio
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mycel.compute.chat import ChatError
from mycel.compute.infer.generate import Generation, Generator
from mycel.compute.infer.request import (
    GenerateRequest,
    LayersMissing,
    ModelUnknown,
    Piece,
    Report,
    RequestInvalid,
    Token,
)
from mycel.node.openai_shapes import ApiError, chat_logprobs, completion_logprobs, usage
from mycel.protocol.errors import MycelError


@dataclass(frozen=True, slots=True)
class ApiServices:
    """What the API stands on."""

    generator: Generator
    wall: Callable[[], float]
    """Seconds since 1970."""
    entropy: Callable[[int], bytes]
    on_report: Callable[[Report], None]
    """Hears how each generation went, once it ended in whatever way."""


@dataclass(slots=True)
class Choice:
    """One answer as it grows."""

    index: int
    text: str = ""
    tokens: int = 0
    prompt_tokens: int = 0
    session: str = ""
    finish: str | None = None


@dataclass(frozen=True, slots=True)
class Form:
    """What differs between chat and plain completions in the answer."""

    is_chat: bool
    model: str
    stream: bool
    with_usage: bool
    with_logprobs: bool

    @property
    def kind(self) -> str:
        """The answer's `object`."""
        if not self.is_chat:
            return "text_completion"
        return "chat.completion.chunk" if self.stream else "chat.completion"


class Answer(Response):
    """Runs the jobs of one request and sends what they give, until done or the client is gone."""

    def __init__(self, services: ApiServices, form: Form, jobs: list[GenerateRequest]) -> None:
        super().__init__()
        self._services = services
        self._form = form
        self._jobs = jobs
        self._choices = [Choice(index) for index in range(len(jobs))]
        self._logged: list[list[Token]] = [[] for _ in jobs]
        self._created = int(services.wall())
        self._id = ("chatcmpl-" if form.is_chat else "cmpl-") + services.entropy(12).hex()
        self._begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI side: the generations and the watch over the client, whichever ends first."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_until_gone, receive, nursery.cancel_scope)
            try:
                await self._run(send)
            except* (MycelError, ChatError) as group:
                await self._send_error(send, api_error(_first(group)))
            nursery.cancel_scope.cancel()

    async def _run(self, send: Send) -> None:
        news, pieces = trio.open_memory_channel[tuple[Choice, Piece]](0)
        async with trio.open_nursery() as nursery:
            for choice, job in zip(self._choices, self._jobs, strict=True):
                nursery.start_soon(self._generate, choice, job, news.clone())
            news.close()
            async for choice, piece in pieces:
                self._logged[choice.index] += piece.tokens
                if self._form.stream:
                    await self._send_piece(send, choice, piece)
                choice.text += piece.text
        if self._form.stream:
            if self._form.with_usage:
                await self._event(send, {**self._head(), "choices": [], "usage": self._usage()})
            await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})
        else:
            await self._send_whole(send)

    async def _generate(
        self, choice: Choice, job: GenerateRequest, news: trio.MemorySendChannel[tuple[Choice, Piece]]
    ) -> None:
        async with news, reported(self._services, job) as generation:
            choice.prompt_tokens, choice.session = len(generation.prompt), generation.session
            async for piece in generation:
                choice.tokens += len(piece.tokens)
                choice.finish = piece.finish or choice.finish
                await news.send((choice, piece))

    async def _send_piece(self, send: Send, choice: Choice, piece: Piece) -> None:
        if not self._begun:
            await self._begin(send)
            if self._form.is_chat:
                for one in self._choices:
                    await self._send_delta(send, one, {"role": "assistant", "content": ""}, None, None)
        logprobs = self._logprobs(piece.tokens, len(choice.text))
        if piece.text or piece.tokens:
            body = {"content": piece.text} if self._form.is_chat else piece.text
            finish = None if self._form.is_chat else piece.finish
            await self._send_delta(send, choice, body, logprobs, finish)
        if piece.finish and (self._form.is_chat or not (piece.text or piece.tokens)):
            await self._send_delta(send, choice, {} if self._form.is_chat else "", None, piece.finish)

    async def _send_delta(
        self, send: Send, choice: Choice, body: object, logprobs: object, finish: str | None
    ) -> None:
        part = "delta" if self._form.is_chat else "text"
        told = {"index": choice.index, part: body, "logprobs": logprobs, "finish_reason": finish}
        await self._event(send, {**self._head(), "choices": [told]})

    async def _send_whole(self, send: Send) -> None:
        choices = []
        for choice, tokens in zip(self._choices, self._logged, strict=True):
            logprobs = self._logprobs(tokens, 0)
            body: dict[str, Any] = {
                "index": choice.index,
                "logprobs": logprobs,
                "finish_reason": choice.finish,
            }
            if self._form.is_chat:
                body["message"] = {"role": "assistant", "content": choice.text, "refusal": None}
            else:
                body["text"] = choice.text
            choices.append(body)
        answer = {**self._head(), "choices": choices, "usage": self._usage()}
        await _send_json(send, 200, answer)

    async def _send_error(self, send: Send, error: ApiError) -> None:
        if not self._begun:
            await _send_json(send, error.status, error.body())
            return
        await self._event(send, error.body())
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})

    async def _begin(self, send: Send) -> None:
        self._begun = True
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

    async def _event(self, send: Send, content: object) -> None:
        body = b"data: " + json.dumps(content, ensure_ascii=False).encode() + b"\n\n"
        await send({"type": "http.response.body", "body": body, "more_body": True})

    def _head(self) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": self._form.kind,
            "created": self._created,
            "model": self._form.model,
            "sessions": [choice.session for choice in self._choices],
        }

    def _usage(self) -> dict[str, int]:
        prompts = {
            job.prompt: choice.prompt_tokens for job, choice in zip(self._jobs, self._choices, strict=True)
        }
        return usage(sum(prompts.values()), sum(choice.tokens for choice in self._choices))

    def _logprobs(self, tokens: tuple[Token, ...] | list[Token], offset: int) -> dict[str, Any] | None:
        if not self._form.with_logprobs:
            return None
        return chat_logprobs(tokens) if self._form.is_chat else completion_logprobs(tokens, offset)


@asynccontextmanager
async def reported(services: ApiServices, job: GenerateRequest) -> AsyncIterator[Generation]:
    """A generation whose report is handed on when it is over, in whatever way."""
    generation: Generation | None = None
    try:
        async with services.generator.generate(job) as generation:
            yield generation
    finally:
        if generation is not None:
            services.on_report(generation.report)


def api_error(error: BaseException) -> ApiError:
    """What an error of generation is to an API client."""
    if isinstance(error, ApiError):
        return error
    text = str(error)
    if isinstance(error, ModelUnknown):
        return ApiError(404, text, param="model", code="model_not_found")
    if isinstance(error, RequestInvalid | ChatError):
        return ApiError(400, text, code="invalid_value")
    if isinstance(error, LayersMissing):
        return ApiError(503, text, code="layers_missing")
    return ApiError(500, text, code="generation_failed")


async def _until_gone(receive: Receive, scope: trio.CancelScope) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()


async def _send_json(send: Send, status: int, content: object) -> None:
    body = json.dumps(content, ensure_ascii=False).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
