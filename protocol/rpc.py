"""Typed calls between peers, over any `Mesh`.

Small unary calls to one peer share one long-lived stream, the *line*, each way its own (so that both
sides opening one at once needs no agreement): see `call_line` and `serve_line`. Messages above
`CallLimits.shared_bytes` and all streaming calls have a stream each (`call_single`, `serve_single`; small
ones that were asked to, `call_lone` and `serve_lone`), so they hold nobody up. A call to this node's
own peer id takes the same way over a stream in memory.

A call runs at most once. The exception is a method that says it is idempotent: when its connection is lost
it is asked once more, as soon as the peer is back.

The deadline is what the caller gives or what its surrounding cancel scopes leave, whichever is less. It
travels as the time that remains, the handler runs in a cancel scope that ends with it, and so a handler's
own calls inherit it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TYPE_CHECKING, Any

import trio

from mycel.protocol.alarm import Alarm
from mycel.protocol.call_line import Line, TooLarge
from mycel.protocol.call_lone import LoneCall
from mycel.protocol.call_single import CallStream, begin_frame
from mycel.protocol.deadlines import remaining_ms
from mycel.protocol.errors import (
    ConnectionLost,
    DeadlineExceeded,
    LimitExceeded,
    LocalProtocolError,
    RemoteProtocolError,
)
from mycel.protocol.inlet import Inlet
from mycel.protocol.limits import DEFAULT_CALL_LIMITS, CallLimits
from mycel.protocol.loop import loop_pair
from mycel.protocol.mesh import Access, Buffer, Mesh, PeerId, PeerUp, Stream
from mycel.protocol.method import Call, Handler, Kind, Method, Req, Res
from mycel.protocol.outlet import STREAM_GONE
from mycel.protocol.serve import Server
from mycel.protocol.serve_line import ANSWER, LINE
from mycel.protocol.serve_single import SINGLE

if TYPE_CHECKING:
    from trio._core._run import TaskStatus

__all__ = ["Call", "CallStream", "Kind", "Method", "Rpc"]


class Rpc:
    """Serves and makes calls. One per `Mesh`; `run` must be running while it is used."""

    def __init__(self, mesh: Mesh, limits: CallLimits = DEFAULT_CALL_LIMITS) -> None:
        self._mesh = mesh
        self._own = mesh.peer_id
        self._scratch = bytearray()
        self._limits = limits
        self._alarm = Alarm()
        self._server = Server(mesh, limits)
        self._numbers = itertools.count(1)
        self._lines: dict[PeerId, Line] = {}
        self._retired: dict[PeerId, Line] = {}
        self._opening: dict[PeerId, trio.Lock] = {}
        self._peer_up = trio.lowlevel.ParkingLot()
        mesh.serve_stream(ANSWER, self._take_answer, access=Access.SUBMIT)

    async def run(self, *, task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled. Every handler runs under here."""
        async with trio.open_nursery() as nursery:
            self._server.shop.nursery = nursery
            try:
                nursery.start_soon(self._alarm.run)
                nursery.start_soon(self._retire_lines)
                task_status.started()
                while True:
                    await self._watch_peers()
            finally:
                self._server.shop.nursery = None
                for line in list(self._lines.values()):
                    line.close(ConnectionLost("this node's calls were shut down", reason="closed"))

    def serve(self, method: Method[Req, Res], handler: Handler[Req, Res], *, inline: bool = False) -> None:
        """Let `handler` answer calls of `method`. May be called before or during `run`, once per name.

        Raises `LocalProtocolError` for a name taken or a handler that is not of the method's kind.
        """
        self._server.shop.book.add(method, handler, inline)

    def stop_serving(self, method: Method[Req, Res]) -> None:
        """Refuse calls of `method` from now on, as one that was never served. Those under way go on."""
        self._server.shop.book.remove(method)

    @property
    def calls(self) -> Mapping[str, int]:
        """Calls that this node let in so far, by method."""
        return self._server.shop.book.calls

    @property
    def refused(self) -> Mapping[str, int]:
        """Calls that this node did not let in, by reason."""
        return self._server.shop.book.refused

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
        if method.kind is not Kind.UNARY:
            raise LocalProtocolError(f"{method.name} is a {method.kind.value} method; open it with stream()")
        deadline, is_watched = self._deadline(method, deadline_s)
        until = math.inf if is_watched else deadline
        parts: list[Buffer] = []
        on_line = not fresh and peer != self._own
        answer: Res
        if not method.idempotent:  # the two short ways, without a cancel scope
            try:
                line = self._lines.get(peer)
                if on_line and line is not None and not (line.is_full or line.lost):
                    answer = await line.ask(next(self._numbers), method, request, deadline, until)
                    return answer
            except TooLarge as too_large:
                parts, on_line = too_large.parts, False
            if fresh:
                number = next(self._numbers)
                left_ms = remaining_ms(deadline)
                parts = begin_frame(method, number, request, left_ms, self._limits, self._scratch)
                lone = self._try_lone(peer, method, parts)
                if lone is not None:
                    answer = await lone.answer(self._alarm, number, until)
                    return answer
                parts = [bytes(part) if part is self._scratch else part for part in parts]
        with trio.CancelScope(deadline=until):
            try:
                answer = await self._ask(peer, method, request, deadline, parts, on_line)
            except ConnectionLost:
                if not method.idempotent or not await self._is_back(peer):
                    raise
                answer = await self._ask(peer, method, request, deadline, parts, on_line)
            return answer
        raise DeadlineExceeded(f"{method.name}: no answer from {peer} in time")

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
        if method.kind is Kind.UNARY:
            raise LocalProtocolError(f"{method.name} is a unary method; use call()")
        if method.kind is not Kind.SERVER_STREAM and request is not None:
            raise LocalProtocolError(f"{method.name}: send() the requests of a {method.kind.value} call")
        return self._open_call(peer, method, request, deadline_s)

    @asynccontextmanager
    async def _open_call(
        self, peer: PeerId, method: Method[Req, Res], request: Req | None, deadline_s: float | None
    ) -> AsyncIterator[CallStream[Req, Res]]:
        deadline, is_watched = self._deadline(method, deadline_s)
        with trio.CancelScope(deadline=math.inf if is_watched else deadline):
            number = next(self._numbers)
            first = begin_frame(method, number, request, remaining_ms(deadline), self._limits)
            call = CallStream(await self._open(peer, SINGLE), number, method, self._limits)
            try:
                await call.begin(first)
                yield call
                await call.finish()
            except BaseException:  # why: a call that is left early, or cancelled, is reset; raised again
                call.reset()
                raise
            return
        raise DeadlineExceeded(f"{method.name}: not done with {peer} in time")

    def _deadline(self, method: Method[Any, Any], deadline_s: float | None) -> tuple[float, bool]:
        """The call's deadline (trio time), and whether a scope around the caller ends it then."""
        around = trio.current_effective_deadline()
        if deadline_s is not None:
            own = trio.current_time() + deadline_s
            return (own, False) if own < around else (around, True)
        if around == math.inf:
            raise LocalProtocolError(
                f"{method.name}: give deadline_s, or call within a cancel scope that has one"
            )
        return around, True

    def _try_lone(self, peer: PeerId, method: Method[Any, Any], parts: list[Buffer]) -> LoneCall | None:
        """The call, sent on a stream of its own; None (nothing sent) where it cannot be now or at once."""
        if len(parts) > 1 or peer == self._own:
            return None
        stream = self._mesh.try_open_stream(peer, SINGLE)
        if stream is None:
            return None
        lone = LoneCall(stream, method, self._limits)
        if lone.send(parts[0]):
            return lone
        stream.reset()
        return None

    async def _ask(
        self,
        peer: PeerId,
        method: Method[Any, Any],
        request: Any,
        deadline: float,
        parts: list[Buffer],
        on_line: bool,
    ) -> Any:
        """Ask once, under a cancel scope that sees to the deadline: on the line, or with a stream of its own.
        `parts` is the request's frame, empty where it is still to be made.
        """
        if on_line:
            line = await self._usable_line(peer)
            try:
                return await line.ask(next(self._numbers), method, request, deadline, math.inf)
            except TooLarge as large:
                parts = large.parts
        number = next(self._numbers)
        if not parts:
            parts = begin_frame(method, number, request, remaining_ms(deadline), self._limits)
        call = CallStream(await self._open(peer, SINGLE), number, method, self._limits)
        try:
            await call.begin(parts)
            response = await call.receive()
            await call.finish()
        except BaseException:  # why: a call given up resets its stream too; raised again
            call.reset()
            raise
        return response

    async def _usable_line(self, peer: PeerId) -> Line:
        """The line to `peer`, opened where there is none, with room for a call."""
        while True:
            line = self._lines.get(peer)
            if line is None or line.lost is not None:
                line = await self._open_line(peer)
            if not line.is_full:
                return line
            await line.wait_room()

    async def _open(self, peer: PeerId, protocol: str) -> Stream:
        if peer != self._own:
            stream = self._mesh.try_open_stream(peer, protocol)
            return await self._mesh.open_stream(peer, protocol) if stream is None else stream
        near, far = loop_pair(peer, protocol)
        self._server.take_single(far)
        return near

    async def _open_line(self, peer: PeerId) -> Line:
        async with self._opening.setdefault(peer, trio.Lock()):
            line = self._lines.get(peer)
            if line is None or line.lost is not None:
                stream = await self._mesh.open_stream(peer, LINE)
                line = Line(self._mesh, stream, self._limits, self._server.shop.spawn, self._alarm)
                self._lines[peer] = line
        return line

    async def _is_back(self, peer: PeerId) -> bool:
        """Whether `peer` is connected now or within `retry_s`."""
        with trio.move_on_after(self._limits.retry_s):
            while peer not in self._mesh.peers:
                await self._peer_up.park()
        return peer in self._mesh.peers

    async def _watch_peers(self) -> None:
        try:
            async with self._mesh.events() as events:
                self._peer_up.unpark_all()
                async for event in events:
                    if isinstance(event, PeerUp):
                        self._peer_up.unpark_all()
                    else:
                        self._forget(event.peer)
        except LimitExceeded:  # too far behind: look again from the start
            for peer in [peer for peer in self._lines if peer not in self._mesh.peers]:
                self._forget(peer)

    async def _retire_lines(self) -> None:
        """Replace lines from time to time: a connection given up for another closes once it has no stream."""
        while True:
            await trio.sleep(self._limits.line_s)
            self._retired = {peer: line for peer, line in self._retired.items() if not line.is_closed}
            for peer, line in list(self._lines.items()):
                is_old = trio.current_time() - line.since >= self._limits.line_s
                if is_old and peer not in self._retired:  # at most one waits for its last answer
                    self._retired[peer] = self._lines.pop(peer)
                    line.retire()

    def _forget(self, peer: PeerId) -> None:
        line = self._lines.get(peer)
        if line is not None and (line.lost is not None or peer not in self._mesh.peers):
            del self._lines[peer]
            line.close(ConnectionLost(f"the connection to {peer} ended", reason="closed"))
        lock = self._opening.get(peer)
        if lock is not None and not lock.locked():
            del self._opening[peer]

    async def _take_answer(self, stream: Stream) -> None:
        """Receive a large answer to one of the calls on a line."""
        peer = stream.peer
        inlet = Inlet(stream, self._limits.message_bytes)
        try:
            head = await inlet.head()
            lines = [lines[peer] for lines in (self._lines, self._retired) if peer in lines]
            line = next((line for line in lines if head is not None and line.waits_for(head[4])), None)
            if line is None:
                stream.reset()  # nobody waits for it any more
                return
            frame = await inlet.frame()
            if frame is not None:
                line.on_answer(frame)
        except STREAM_GONE:  # the server gave up; the caller's deadline or the line's loss tells
            return
        except RemoteProtocolError as error:
            self._mesh.disconnect(peer, str(error))
