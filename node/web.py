"""The node's HTTP address: one server for the control API, metrics, and OpenAI's API.

hypercorn on trio, started by the real `main` beside the daemon, never in a simulation. The control API and
the metrics answer at once; FastAPI is imported in a thread once the node is up, and OpenAI's routes wait for
it.

Who may call:
- /control and /metrics: whoever has the token in `api.json` (mode 0600 in the node's home); metrics are open
  where no token was asked for;
- everything else: nobody is asked on loopback; with `api_token` set, whoever sends it as a bearer token.
Without a token a request must also name a loopback host, so that a web page cannot reach in through a name
that resolves to 127.0.0.1 (DNS rebinding).
"""

from __future__ import annotations

import contextlib
import hmac
import importlib
import json
import logging
import socket
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import hypercorn.config
import hypercorn.trio
import trio

from mycel.node.answer import BadRequest, Receive, Scope, Send, read_body, send_head, send_json
from mycel.node.client import API_FILE
from mycel.node.config import Config, ConfigError, is_loopback, split_host_port
from mycel.node.control import Control
from mycel.node.keyfile import write_private
from mycel.node.memory import Memory
from mycel.node.metrics import render
from mycel.node.running import Node

log = logging.getLogger("mycel.node")

PORT = 4810
"""Tried first where none is named: easy to remember."""
REMEMBERED = "api-port"
GRACE_S = 1.0
"""How long answers under way may go on when the node ends."""
BACKLOG = 128

App = Callable[[Scope, Receive, Send], Awaitable[None]]


async def serve_web(
    node: Node, memory: Memory, *, task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED
) -> None:
    """Serve until cancelled; started with the base URL. Raises `ConfigError` when nothing can be bound."""
    config = node.config
    listener = bind(config, memory)
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    reach = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, shown)
    node.api = f"http://{reach}:{port}/v1"
    token = node.host.entropy(24).hex()
    told = json.dumps({"url": f"http://{reach}:{port}", "token": token}).encode()
    path = config.home / API_FILE
    write_private(path, told, replace=True)
    front = Front(node, token)
    settings = hypercorn.config.Config()
    settings.bind = [f"fd://{listener.detach()}"]
    settings.graceful_timeout = GRACE_S
    settings.include_server_header = False
    settings.errorlog = logging.getLogger("mycel.http")
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(_serve, front, settings)
            task_status.started(f"http://{reach}:{port}")
            await front.load_openai()
    finally:
        _unlink_own(path, told)


async def _serve(
    front: Front,
    settings: hypercorn.config.Config,
    *,
    task_status: trio.TaskStatus[object] = trio.TASK_STATUS_IGNORED,
) -> None:
    await hypercorn.trio.serve(front, settings, mode="asgi", task_status=task_status)  # type: ignore[arg-type]


def _unlink_own(path: Path, told: bytes) -> None:
    """Remove the file unless a newer node wrote it."""
    with contextlib.suppress(OSError):
        if path.read_bytes() == told:
            path.unlink()


def bind(config: Config, memory: Memory) -> socket.socket:
    """A listening socket for `config.api`: the port named, else last time's, else 4810, else any."""
    host, port = split_host_port(config.api)
    try:
        last = int(memory.get(REMEMBERED) or 0)
    except ValueError:
        last = 0
    tries = [port] if port else [*([last] if last else []), PORT, 0]
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for attempt in tries:
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, attempt))
            listener.listen(BACKLOG)
        except OSError as error:
            listener.close()
            if attempt == tries[-1]:
                raise ConfigError(f"api = {config.api!r} cannot be bound: {error.strerror}") from None
            continue
        if not port:
            memory.put(REMEMBERED, str(listener.getsockname()[1]).encode())
        return listener
    raise AssertionError("unreachable: the last try returns or raises")


class Front:
    """The ASGI application in front: who may call, and who answers."""

    def __init__(self, node: Node, token: str) -> None:
        self._node = node
        self._token = token
        self._control = Control(node, node.stop)
        self._openai: App | None = None
        self._loaded = trio.Event()

    async def load_openai(self) -> None:
        """Import FastAPI without holding up the node, and open OpenAI's routes."""
        openai = await trio.to_thread.run_sync(importlib.import_module, "mycel.node.openai")
        host = self._node.host
        services = openai.ApiServices(self._node.generator, host.wall, host.entropy, self._node.note_report)
        self._openai = openai.create_app(services)
        self._loaded.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request (or the server's own start and end)."""
        if scope["type"] == "lifespan":
            await _live(receive, send)
        elif scope["type"] != "http":
            raise NotImplementedError(f"no {scope['type']} here")
        elif scope["path"].startswith("/control/"):
            if self._has_token(scope, self._token):
                await self._control(scope, receive, send)
            else:
                await send_json(send, 401, {"error": "this route wants the token in the node's api.json"})
        elif (problem := self._problem(scope)) is not None:
            await _send_problem(send, *problem)
        elif scope["path"] == "/metrics":
            body = render(self._node).encode()
            await send_head(send, 200, b"text/plain; version=0.0.4; charset=utf-8", len(body))
            await send({"type": "http.response.body", "body": body, "more_body": False})
        else:
            await self._loaded.wait()
            assert self._openai is not None
            try:
                body = await read_body(receive)
            except BadRequest as error:
                await _send_problem(send, 413, "body_too_large", str(error))
                return
            await self._openai(scope, _replay(body, receive), send)

    def _problem(self, scope: Scope) -> tuple[int, str, str] | None:
        """Status, code and text for a request that may not pass."""
        config = self._node.config
        if config.api_token:
            if not self._has_token(scope, config.api_token):
                return 401, "invalid_api_key", "Incorrect API key provided; send the node's api_token"
            return None
        host = _header(scope, b"host").rpartition(":")[0] or _header(scope, b"host")
        if host and not is_loopback(host.strip("[]")):
            return 403, "host_not_allowed", f"{host} is not this machine; set api_token to be reached by name"
        return None

    def _has_token(self, scope: Scope, token: str) -> bool:
        kind, _, given = _header(scope, b"authorization").partition(" ")
        return kind.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), token.encode())


def _header(scope: Mapping[str, Any], name: bytes) -> str:
    for key, value in scope["headers"]:
        if key.lower() == name:
            return bytes(value).decode("latin-1")
    return ""


def _replay(body: bytes, receive: Receive) -> Receive:
    """What the application receives: the body in one piece, then what the server says (a disconnect)."""
    given = False

    async def receive_again() -> Mapping[str, Any]:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive_again


async def _live(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": message["type"] + ".complete"})
        if message["type"] == "lifespan.shutdown":
            return


async def _send_problem(send: Send, status: int, code: str, text: str) -> None:
    kind = "invalid_request_error"
    await send_json(send, status, {"error": {"message": text, "type": kind, "param": None, "code": code}})
