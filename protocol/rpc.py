"""Typed calls between peers, over any `Mesh`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from typing import Generic

import trio

from mycel.protocol.limits import CallLimits
from mycel.protocol.mesh import Mesh, PeerId
from mycel.protocol.method import Call, Handler, Kind, Method, Req, Res

__all__ = ["Call", "CallStream", "Kind", "Method", "Rpc"]


class CallStream(Generic[Req, Res]):
    """The caller's end of a streaming call. One task sends and one receives at a time."""

    async def send(self, item: Req) -> None:
        """Send one request; waits while the handler is behind. Raises as `Rpc.call`."""
        raise NotImplementedError

    async def end(self) -> None:
        """Say that no more requests come; responses still do."""
        raise NotImplementedError

    async def receive(self) -> Res:
        """The next response. Raises `trio.EndOfChannel` after the last, else as `Rpc.call`."""
        raise NotImplementedError

    def __aiter__(self) -> AsyncIterator[Res]:
        raise NotImplementedError


class Rpc:
    """Serves and makes calls. One per `Mesh`; `run` must be running while it is used."""

    def __init__(self, mesh: Mesh, limits: CallLimits | None = None) -> None:
        raise NotImplementedError

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled. Every handler runs under here."""
        raise NotImplementedError

    def serve(self, method: Method[Req, Res], handler: Handler[Req, Res], *, inline: bool = False) -> None:
        """Let `handler` answer calls of `method`. May be called before or during `run`, once per name.

        A later `serve` of the same name raises `LocalProtocolError`.
        """
        raise NotImplementedError

    async def call(
        self,
        peer: PeerId,
        method: Method[Req, Res],
        request: Req,
        *,
        deadline_s: float | None = None,
        fresh: bool = False,
    ) -> Res:
        """Ask `peer` (this node's own id: itself) and wait for its answer.

        `deadline_s` travels: the handler is cancelled at it. None takes what the surrounding cancel scopes
        leave (inside a handler: what its caller left); with neither, `LocalProtocolError`. `fresh` gives the
        call a stream of its own, as large messages get anyhow.

        Raises `DeadlineExceeded`; `ConnectionLost` (not connected, or lost on the way: the handler may or
        may not have run); `Refused` with reason "unknown-method", "access" or "busy", or whatever a handler
        refused with; `RemoteError` for what a handler raised, and with kind "BadRequest" when the request is
        not of the type that the peer expects; `RemoteProtocolError` when the answer is not of our type;
        `LimitExceeded` when the request is larger than `CallLimits.message_bytes`.
        """
        raise NotImplementedError

    def stream(
        self,
        peer: PeerId,
        method: Method[Req, Res],
        request: Req | None = None,
        *,
        deadline_s: float | None = None,
    ) -> AbstractAsyncContextManager[CallStream[Req, Res]]:
        """A streaming call; leaving the block early cancels the handler.

        `request` is for SERVER_STREAM methods only. `deadline_s` is for the whole stream, math.inf for none.
        Raises as `call`.
        """
        raise NotImplementedError
