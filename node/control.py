"""The control API: what the command line asks a running node.

A few routes under /control on the node's HTTP address, for whoever can read the token file in the node's
home (mode 0600). A bare ASGI application without a framework, so that a node answers within moments of its
start; requests and answers are the structs of `mycel.node.views` as JSON, what takes time answers in lines
of JSON (application/x-ndjson).
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from contextlib import aclosing
from functools import partial

import trio

from mycel.compute.engine import Sampling
from mycel.compute.infer.generate import Generation
from mycel.compute.infer.request import GenerateRequest
from mycel.node.answer import (
    TELLABLE,
    BadRequest,
    Receive,
    Scope,
    Send,
    decode,
    read_body,
    send_head,
    send_json,
    send_line,
    send_progress,
    until_gone,
)
from mycel.node.control_jobs import JobRoutes, send_stream
from mycel.node.control_models import ModelRoutes
from mycel.node.running import Node
from mycel.node.views import GenerateAsk, GenerateEvent, Problem, ServeAsk, TicketAsk

log = logging.getLogger("mycel.node")


class Control:
    """The application. `on_stop` asks the node to leave and end."""

    def __init__(self, node: Node, on_stop: Callable[[], None]) -> None:
        self._node = node
        self._on_stop = on_stop
        self._routes: Mapping[tuple[str, str], Callable[[bytes], Awaitable[object]]] = {
            ("GET", "/control/status"): self._status,
            ("GET", "/control/peers"): self._peers,
            ("GET", "/control/models"): self._models,
            ("GET", "/control/away/peers"): self._away,
            ("GET", "/control/away/models"): self._away_models,
            ("GET", "/control/reports"): self._reports,
            ("POST", "/control/ticket"): self._ticket,
            ("POST", "/control/serve"): self._serve,
        }
        models = ModelRoutes(node)
        self._routes = {**self._routes, **models.routes}
        self._slow = models.slow
        jobs = JobRoutes(node)
        self._routes = {**self._routes, **jobs.routes}
        self._streams = jobs.streams

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        method, path = scope["method"], scope["path"]
        try:
            body = await read_body(receive)
            if (method, path) == ("POST", "/control/generate"):
                await self._generate(decode(body, GenerateAsk), receive, send)
                return
            if (method, path) == ("POST", "/control/stop"):
                await send_json(send, 200, {})  # before there is nobody left to say it
                self._on_stop()
                return
            if method == "POST" and path in self._streams:
                async with aclosing(self._streams[path](body)) as pieces:
                    await send_stream(pieces, receive, send)
                return
            if method == "POST" and path in self._slow:
                await send_progress(partial(self._slow[path], body), receive, send)
                return
            route = self._routes.get((method, path))
            if route is None:
                await send_json(send, 404, Problem(f"no {method} {path} here; does the version fit?"))
                return
            answer = await route(body)
        except TELLABLE as error:
            await send_json(send, 400, Problem(str(error), type(error).__name__))
        except Exception as error:  # boundary: a bug in one answer must not end the node
            log.exception("%s %s failed", method, path)
            await send_json(send, 500, Problem(f"{type(error).__name__}: {error}", "bug"))
        else:
            await send_json(send, 200, answer)

    async def _status(self, body: bytes) -> object:
        return self._node.status()

    async def _peers(self, body: bytes) -> object:
        return self._node.peers()

    async def _models(self, body: bytes) -> object:
        return self._node.models()

    async def _away(self, body: bytes) -> object:
        return self._node.members.away()

    async def _away_models(self, body: bytes) -> object:
        return self._node.members.away_models()

    async def _reports(self, body: bytes) -> object:
        return self._node.reports()

    async def _ticket(self, body: bytes) -> object:
        return self._node.issue_ticket(decode(body, TicketAsk))

    async def _serve(self, body: bytes) -> object:
        ask = decode(body, ServeAsk)
        return await self._node.serve(ask.model, ask.layers)

    async def _generate(self, ask: GenerateAsk, receive: Receive, send: Send) -> None:
        """Lines of `GenerateEvent` until done or the client is gone."""
        request = await _request(self._node, ask)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(until_gone, receive, nursery.cancel_scope)
            await self._send_generation(request, send)
            nursery.cancel_scope.cancel()

    async def _send_generation(self, request: GenerateRequest, send: Send) -> None:
        begun = False
        generation: Generation | None = None
        try:
            try:
                async with self._node.generator.generate(request) as generation:
                    async for piece in generation:
                        if not begun:
                            await send_head(send, 200, b"application/x-ndjson")
                            begun = True
                        await send_line(send, GenerateEvent(text=piece.text))
            finally:
                if generation is not None:
                    self._node.note_report(generation.report)
            report = generation.report
            await send_line(send, GenerateEvent(report=report, labels=self._node.labels_in(report)))
        except TELLABLE as error:
            if not begun:
                await send_json(send, 400, Problem(str(error), type(error).__name__))
                return
            await send_line(send, GenerateEvent(error=str(error)))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _request(node: Node, ask: GenerateAsk) -> GenerateRequest:
    prompt: str | tuple[int, ...]
    if ask.messages is not None:
        prompt = tuple((await node.generator.tokenizer(ask.model)).encode_chat(ask.messages))
    elif ask.prompt is not None:
        prompt = ask.prompt
    else:
        raise BadRequest("a generation needs a prompt or messages")
    sampling = Sampling(
        temperature=ask.temperature,
        top_k=ask.top_k,
        top_p=ask.top_p,
        repetition_penalty=ask.repetition_penalty,
        seed=node.fresh_seed() if ask.seed is None else ask.seed,
    )
    return GenerateRequest(
        model=ask.model, prompt=prompt, sampling=sampling, max_tokens=ask.max_tokens, stop=ask.stop
    )
