"""Making small unary calls: the caller's end of a line (the one stream for all of them to one peer).

A call puts its request on the stream and parks; the connection's reader matches the answer by number, checks
it and wakes the caller with it, so no task stands between. When the line is lost every call on it
fails with `ConnectionLost`, and the next call opens a new line.
"""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any

import outcome
import trio

from mycel.protocol.alarm import Alarm
from mycel.protocol.call_single import begin_frame
from mycel.protocol.callbook import codec_of
from mycel.protocol.deadlines import remaining_ms
from mycel.protocol.errors import (
    ConnectionLost,
    DeadlineExceeded,
    Refused,
    RemoteProtocolError,
    StreamReset,
)
from mycel.protocol.failure import decode_failure, lost
from mycel.protocol.frame import CANCEL, ERROR, HEAD_BYTES, RESPONSE, Frame, pack, split
from mycel.protocol.limits import CallLimits
from mycel.protocol.mesh import Mesh, PeerId, Stream
from mycel.protocol.message import MessageError
from mycel.protocol.method import Method
from mycel.protocol.outlet import STREAM_GONE, Outlet, Spawn


class TooLarge(Exception):
    """The request does not belong on the line; `parts` is its frame, nothing was sent."""

    def __init__(self, parts: list[Any]) -> None:
        super().__init__("request too large for the line")
        self.parts = parts


class Pending:
    """A call that waits for its answer."""

    __slots__ = ("codec", "is_settled", "line", "method", "number", "size", "task")

    def __init__(self, line: Line, number: int, method: Method[Any, Any], size: int) -> None:
        self.line = line
        self.number = number
        self.task = trio.lowlevel.current_task()
        self.codec = codec_of(method.response)
        self.method = method.name
        self.size = size
        self.is_settled = True  # until a deadline watches over it

    def expire(self) -> None:
        """The deadline came before the answer."""
        if self.line.give_up(self.number):
            error = DeadlineExceeded(f"{self.method}: no answer from {self.line.peer} in time")
            trio.lowlevel.reschedule(self.task, outcome.Error(error))

    def abort(self, _: object) -> trio.lowlevel.Abort:
        """The caller was cancelled."""
        self.line.give_up(self.number)
        return trio.lowlevel.Abort.SUCCEEDED


class Line:
    """One stream of small calls to one peer, until it is lost."""

    def __init__(self, mesh: Mesh, stream: Stream, limits: CallLimits, spawn: Spawn, alarm: Alarm) -> None:
        self._mesh = mesh
        self.peer: PeerId = stream.peer
        self._limits = limits
        self._outlet = Outlet(stream, spawn, limits.backlog_bytes)
        self._stream = stream
        self._alarm = alarm
        self._pending: dict[int, Pending] = {}
        self._held = 0
        self._tail = b""
        self._scratch = bytearray()
        self._room = trio.lowlevel.ParkingLot()
        self._spawn = spawn
        self._is_retired = False
        self.since = trio.current_time()
        self.lost: Exception | None = None
        stream.deliver_to(self._on_data)

    @property
    def is_full(self) -> bool:
        """Whether another call must wait for room."""
        return (
            self._outlet.backlog_bytes > self._limits.backlog_bytes
            or len(self._pending) >= self._limits.in_flight
            or self._held > self._limits.in_flight_bytes - self._limits.shared_bytes
        )

    async def wait_room(self) -> None:
        """Wait until there may be room for another call, or the line is lost."""
        if self._outlet.is_full:
            await self._outlet.wait_room()
        else:
            await self._room.park()

    async def ask(
        self, number: int, method: Method[Any, Any], request: Any, deadline: float, until: float
    ) -> Any:
        """The answer to `request`. Raises as `Rpc.call`, or `TooLarge`; cancelling it cancels the handler.

        `deadline` (trio time) travels. `until` is what this side waits for at most: infinite where a cancel
        scope around the caller sees to it.
        """
        data = self._encode(number, method, request, deadline)
        self._check()
        try:
            self._outlet.put(data)
        except StreamReset as error:
            raise lost(error, self.peer, method.name) from error
        self._check()  # that the connection is lost may show in sending, before this call is known here
        # From here on the request is under way, and this side's work costs the caller no time.
        pending = Pending(self, number, method, len(data))
        self._pending[number] = pending
        self._held += pending.size
        if until < math.inf:
            self._alarm.set(until, number, pending)
        return await trio.lowlevel.wait_task_rescheduled(pending.abort)

    def give_up(self, number: int) -> bool:
        """Nobody waits for the answer any more: tell the peer. False where it came already."""
        if self._forget(number) is None:
            return False
        with suppress(*STREAM_GONE):  # then there is no handler left to cancel
            self._outlet.put(pack(CANCEL, number)[0])
        return True

    def waits_for(self, number: int) -> bool:
        """Whether call `number` is on this line and not answered yet."""
        return number in self._pending

    def on_answer(self, frame: Frame) -> None:
        """A large answer came on a stream of its own."""
        if frame.kind == RESPONSE:
            self._on_frame(frame)

    @property
    def is_closed(self) -> bool:
        """Whether a retired line has given its last answer."""
        return not self._pending

    def retire(self) -> None:
        """Close once the last answer came; the caller asks nothing more here."""
        self._is_retired = True
        if not self._pending:
            self._spawn(self._stream.aclose)

    def close(self, error: Exception) -> None:
        """Fail all calls on the line."""
        self._end(error)
        self._stream.reset()

    def _check(self) -> None:
        """Raise `ConnectionLost` where nothing will be answered any more."""
        if self.lost is not None:
            raise ConnectionLost(f"the line to {self.peer} is gone: {self.lost}", reason="reset")

    def _encode(self, number: int, method: Method[Any, Any], request: Any, deadline: float) -> Any:
        """The request's frame; in a buffer that the next call reuses, where it can be."""
        scratch = self._scratch
        parts = begin_frame(method, number, request, remaining_ms(deadline), self._limits, scratch)
        if sum(map(len, parts)) - HEAD_BYTES > self._limits.shared_bytes:
            raise TooLarge([bytes(part) if part is scratch else part for part in parts])
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _forget(self, number: int) -> Pending | None:
        pending = self._pending.pop(number, None)
        if pending is not None:
            self._held -= pending.size
            self._alarm.clear(pending)
            if self._room:
                self._room.unpark()
            if self._is_retired and not self._pending:
                self._spawn(self._stream.aclose)
        return pending

    def _on_data(self, chunk: memoryview | None, error: Exception | None) -> None:
        if chunk is None:
            self._end(error or StreamReset(f"{self.peer} ended the line"))
            return
        if self._tail:
            chunk = memoryview(self._tail + bytes(chunk))
        try:
            frames, used = split(chunk, self._limits.shared_bytes)
            self._tail = bytes(chunk[used:]) if used < len(chunk) else b""
            for frame in frames:
                self._on_frame(frame)
        except RemoteProtocolError as broken:
            self._end(broken)
            self._mesh.disconnect(self.peer, str(broken))

    def _on_frame(self, frame: Frame) -> None:
        if frame.kind not in (RESPONSE, ERROR):
            raise RemoteProtocolError(f"frame of kind {frame.kind} from a server")
        pending = self._forget(frame.call)
        if pending is None:
            return  # cancelled meanwhile
        result: outcome.Outcome[Any]
        try:
            if frame.kind == RESPONSE:
                result = outcome.Value(pending.codec.decode(frame.body, frame.raws, owned=frame.owned))
            else:
                result = outcome.Error(decode_failure(frame.body))
        except MessageError as error:
            result = outcome.Error(
                RemoteProtocolError(f"{self.peer} answered {pending.method} with: {error}")
            )
        trio.lowlevel.reschedule(pending.task, result)

    def _end(self, error: Exception) -> None:
        if self.lost is not None:
            return
        self.lost = error
        pending, self._pending = self._pending, {}
        for each in pending.values():
            self._alarm.clear(each)
            failed = lost(error, self.peer, each.method) if isinstance(error, StreamReset) else error
            trio.lowlevel.reschedule(each.task, outcome.Error(copy_of(failed)))
        self._room.unpark_all()


def copy_of(error: Exception) -> Exception:
    """The same failure for one more task: a traceback belongs to one raise only."""
    if isinstance(error, ConnectionLost | Refused):
        return type(error)(str(error), reason=error.reason)
    return type(error)(str(error))
