"""The OpenAI-compatible API: /v1/models, /v1/completions, /v1/chat/completions.

A FastAPI application over a `Generator`. `create_app` is handed what it needs; nothing here knows of the
daemon or of sockets.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from mycel.compute.chat import ChatError
from mycel.node.openai_answer import Answer, ApiServices, Form, api_error
from mycel.node.openai_shapes import (
    ApiError,
    ChatRequest,
    CompletionRequest,
    chat_jobs,
    completion_jobs,
    describe_invalid,
)
from mycel.protocol.errors import MycelError

__all__ = ["ApiServices", "create_app"]


def create_app(services: ApiServices) -> FastAPI:
    """The application; mount it at the root."""
    # No documentation pages: they would make the browser fetch scripts from other hosts.
    app = FastAPI(title="Mycel", version="1", docs_url=None, redoc_url=None)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(ApiError, _on_error)
    app.add_exception_handler(MycelError, _on_error)
    app.add_exception_handler(ChatError, _on_error)
    created = int(services.wall())

    def entry(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": created, "owned_by": "mycel"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """Models that the swarm can serve now: every layer has a holder."""
        served = [status for status in services.generator.models() if status.complete]
        return {"object": "list", "data": [entry(status.card.name) for status in served]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """One of them."""
        if name not in [status.card.name for status in services.generator.models() if status.complete]:
            raise ApiError(404, f"The model '{name}' does not exist", param="model", code="model_not_found")
        return entry(name)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(asked: ChatRequest) -> Response:
        """Continue a chat."""
        tokenizer = await services.generator.tokenizer(asked.model)
        jobs = chat_jobs(asked, tokenizer, _seed(services, asked.seed))
        options = asked.stream_options
        form = Form(True, asked.model, asked.stream, bool(options and options.include_usage), asked.logprobs)
        return Answer(services, form, jobs)

    @app.post("/v1/completions", response_model=None)
    async def completions(asked: CompletionRequest) -> Response:
        """Continue a text."""
        jobs = completion_jobs(asked, _seed(services, asked.seed))
        options = asked.stream_options
        form = Form(
            False,
            asked.model,
            asked.stream,
            bool(options and options.include_usage),
            asked.logprobs is not None,
        )
        return Answer(services, form, jobs)

    return app


def _seed(services: ApiServices, asked: int | None) -> int:
    return int.from_bytes(services.entropy(6), "big") if asked is None else asked


async def _on_invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return _error_response(describe_invalid(error.errors()))


async def _on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    text = f"{request.method} {request.url.path}: {error.detail}"
    return _error_response(ApiError(error.status_code, text))


async def _on_error(_: Request, error: Exception) -> Response:
    return _error_response(api_error(error))


def _error_response(error: ApiError) -> Response:
    return JSONResponse(error.body(), status_code=error.status)
