"""Answering HTTP requests without a framework: bodies, JSON, and lines of JSON for what takes time.

The control API is made of these. An answer in lines (application/x-ndjson) begins with the first line, so
that what fails at once is a plain error; after that a line with `error` ends it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

import msgspec
import trio

from mycel.compute.chat import ChatError
from mycel.compute.engine import EngineLost, ModelUnsupported
from mycel.node.views import Problem, ProgressEvent
from mycel.protocol.errors import MycelError

Scope = Mapping[str, Any]
Receive = Callable[[], Awaitable[Mapping[str, Any]]]
Send = Callable[[Mapping[str, Any]], Awaitable[None]]

BODY_BYTES_MAX = 4 << 20
"""A request's body: a long prompt fits many times."""

T = TypeVar("T")
TELLABLE = (MycelError, ChatError, ModelUnsupported, EngineLost, FileNotFoundError)
"""What is told to the user as it is; anything else is a bug and is logged with its traceback."""


class BadRequest(MycelError):
    """The request's body is not what the route takes."""


TELL_S = 0.2
"""Between two lines of progress."""

Note = Callable[[str, int, int], None]
"""Takes note of progress: what is done, how much of it is done, how much there is."""


async def read_body(receive: Receive) -> bytes:
    """A request's body. Raises `BadRequest` beyond `BODY_BYTES_MAX`."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise BadRequest("the client went away")
        body += message.get("body", b"")
        if len(body) > BODY_BYTES_MAX:
            raise BadRequest(f"the request is larger than {BODY_BYTES_MAX >> 20} MiB")
        if not message.get("more_body", False):
            return bytes(body)


async def until_gone(receive: Receive, scope: trio.CancelScope) -> None:
    """Cancel `scope` when the client disconnects."""
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()


async def send_json(send: Send, status: int, content: object) -> None:
    """A whole JSON answer."""
    body = msgspec.json.encode(content)
    await send_head(send, status, b"application/json", len(body))
    await send({"type": "http.response.body", "body": body, "more_body": False})


async def send_head(send: Send, status: int, kind: bytes, length: int | None = None) -> None:
    """Status and headers of an answer."""
    headers = [(b"content-type", kind)]
    if length is not None:
        headers.append((b"content-length", str(length).encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})


async def send_progress(work: Callable[[Note], Awaitable[object]], receive: Receive, send: Send) -> None:
    """Do `work` and answer with lines of `ProgressEvent`, the last with what it returns, as `done`.

    A client that goes away cancels it.
    """
    async with trio.open_nursery() as nursery:
        nursery.start_soon(until_gone, receive, nursery.cancel_scope)
        await _send_progress(work, send)
        nursery.cancel_scope.cancel()


async def _send_progress(work: Callable[[Note], Awaitable[object]], send: Send) -> None:
    latest = told = ProgressEvent()
    ended = trio.Event()

    def note(what: str, done: int, total: int) -> None:
        nonlocal latest
        if not ended.is_set():
            latest = ProgressEvent(what, done, total)

    async def do() -> None:
        nonlocal latest
        try:
            latest = ProgressEvent(result=await work(note))
        except TELLABLE as error:
            latest = ProgressEvent(error=str(error), kind=type(error).__name__)
        finally:
            ended.set()

    begun = False
    async with trio.open_nursery() as nursery:
        nursery.start_soon(do)
        while True:
            with trio.move_on_after(TELL_S):
                await ended.wait()
            if not begun and latest.error:
                await send_json(send, 400, Problem(latest.error, latest.kind))
                return
            if latest is not told:
                if not begun:
                    await send_head(send, 200, b"application/x-ndjson")
                begun, told = True, latest
                await send_line(send, latest)
            if ended.is_set() and latest is told:
                break
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def send_line(send: Send, event: object) -> None:
    """One line of an answer in lines."""
    body = msgspec.json.encode(event) + b"\n"
    await send({"type": "http.response.body", "body": body, "more_body": True})


def decode(body: bytes, kind: type[T]) -> T:
    """A request's body as what the route takes. Raises `BadRequest`."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.DecodeError as error:
        raise BadRequest(f"the request is not a {kind.__name__}: {error}") from None
