"""What serving a call takes, whichever way it came: the handler's run, its answer's frame, its failure."""

from __future__ import annotations

import logging
from typing import Any

import trio

from mycel.protocol.callbook import CallBook, Mode, Served
from mycel.protocol.failure import Failure, failure_of
from mycel.protocol.frame import HEAD, HEAD_BYTES, NO_DEADLINE, RESPONSE, pack
from mycel.protocol.limits import CallLimits
from mycel.protocol.mesh import Buffer, Mesh
from mycel.protocol.method import Call
from mycel.protocol.workers import Workers

log = logging.getLogger("mycel.rpc")


class Shop:
    """What serving needs of its surroundings, shared by all calls of a node."""

    __slots__ = ("book", "limits", "mesh", "nursery", "scratch", "threads", "workers")

    def __init__(self, mesh: Mesh, book: CallBook, limits: CallLimits) -> None:
        self.mesh = mesh
        self.book = book
        self.limits = limits
        self.threads = trio.CapacityLimiter(limits.threads)
        self.scratch = bytearray()
        self.nursery: trio.Nursery | None = None
        self.workers = Workers(self.spawn)

    def spawn(self, function: Any, *args: Any) -> None:
        """Start a task under the node's calls."""
        if self.nursery is not None:
            self.nursery.start_soon(function, *args)


async def run_unary(shop: Shop, served: Served, call: Call, request: Any) -> Any:
    """The response of a unary handler that is not inline. Raises what the handler raises."""
    if served.mode is Mode.THREAD:
        return await trio.to_thread.run_sync(
            served.handler, call, request, limiter=shop.threads, abandon_on_cancel=True
        )
    if served.mode is Mode.INLINE:
        return served.handler(call, request)
    return await served.handler(call, request)


def encode_answer(shop: Shop, served: Served, number: int, response: Any) -> list[Buffer]:
    """The response's frame, good until the next one is made. Raises `LocalProtocolError`."""
    if served.response.has_tensors:
        body, raws = served.response.encode(response)
        return pack(RESPONSE, number, body, raws)
    buffer = shop.scratch
    served.response.encode_into(response, buffer, HEAD_BYTES)
    HEAD.pack_into(buffer, 0, len(buffer) - HEAD_BYTES, RESPONSE, 0, 0, number, 0)
    return [buffer]


def report(call: Call, error: Exception, limits: CallLimits) -> Failure:
    """Log a handler's exception here and make of it what the caller gets."""
    failure = failure_of(error, limits.error_text)
    if failure.cause == "error":
        log.warning("%s for %s failed", call.method, call.peer, exc_info=error)
    return failure


def to_deadline(deadline_ms: int) -> float:
    """Trio time of a deadline that arrived now."""
    if deadline_ms == NO_DEADLINE:
        return float("inf")
    return trio.current_time() + deadline_ms / 1000
