"""The control API of jobs.

    GET  /control/jobs             JobsView
    POST /control/jobs/submit      SubmitAsk -> JobView
    POST /control/jobs/view        JobAsk -> JobView
    POST /control/jobs/stop        JobAsk -> JobView
    POST /control/jobs/logs        LogsAsk -> lines of LogLine
    POST /control/jobs/content     ContentAsk -> the bytes of a result

Files that a job brings are named by their paths, and read by the node: it runs for the same user.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from pathlib import Path

import msgspec
import trio

from mycel.node.answer import TELLABLE, Receive, Send, decode, send_head, send_json, until_gone
from mycel.node.jobs.spec import JobInvalid, read_spec
from mycel.node.jobs.views import ContentAsk, JobAsk, LogsAsk, SubmitAsk
from mycel.node.running import Node
from mycel.node.views import Problem

log = logging.getLogger("mycel.node")

Route = Callable[[bytes], Awaitable[object]]
StreamRoute = Callable[[bytes], AsyncGenerator[bytes, None]]


class JobRoutes:
    """The routes, to be answered by `Control`: whole, or (`streams`) piece by piece."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self.routes: Mapping[tuple[str, str], Route] = {
            ("GET", "/control/jobs"): self._jobs,
            ("POST", "/control/jobs/submit"): self._submit,
            ("POST", "/control/jobs/view"): self._view,
            ("POST", "/control/jobs/stop"): self._stop,
        }
        self.streams: Mapping[str, StreamRoute] = {
            "/control/jobs/logs": self._logs,
            "/control/jobs/content": self._content,
        }

    async def _jobs(self, body: bytes) -> object:
        return await self._node.jobs.window.views()

    async def _submit(self, body: bytes) -> object:
        ask = decode(body, SubmitAsk)
        spec = read_spec(ask.job)
        for key, path in ask.files.items():
            if not await trio.to_thread.run_sync(Path(path).is_file):
                raise JobInvalid(f"{key}: there is no file {path}")
        return await self._node.jobs.submit(spec, {key: Path(path) for key, path in ask.files.items()})

    async def _view(self, body: bytes) -> object:
        return await self._node.jobs.window.view(decode(body, JobAsk).job)

    async def _stop(self, body: bytes) -> object:
        return await self._node.jobs.stop(decode(body, JobAsk).job)

    async def _logs(self, body: bytes) -> AsyncGenerator[bytes, None]:
        async with aclosing(self._node.jobs.window.lines(decode(body, LogsAsk))) as lines:
            async for line in lines:
                yield msgspec.json.encode(line) + b"\n"

    async def _content(self, body: bytes) -> AsyncGenerator[bytes, None]:
        async with aclosing(self._node.jobs.window.content(decode(body, ContentAsk))) as pieces:
            async for piece in pieces:
                yield piece


async def send_stream(pieces: AsyncGenerator[bytes, None], receive: Receive, send: Send) -> None:
    """Answer with `pieces` as they come, until the client is gone. What fails after the first of them breaks
    off: the client sees an answer without its end."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(until_gone, receive, nursery.cancel_scope)
        begun = False
        try:
            async for piece in pieces:
                if not begun:
                    await send_head(send, 200, b"application/octet-stream")
                    begun = True
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        except TELLABLE as error:
            log.warning("an answer broke off: %s", error)
            if not begun:
                await send_json(send, 400, Problem(str(error), type(error).__name__))
        else:
            if not begun:
                await send_head(send, 200, b"application/octet-stream")
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        nursery.cancel_scope.cancel()
