"""Making small unary calls: the caller's end of a line (the one stream for all of them to one peer).

A call puts its request on the stream and parks; the connection's reader matches the answer by number, checks
it and wakes the caller with it, so no task stands between. When the line is lost every call on it
fails with `ConnectionLost`, and the next call opens a new line.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import outcome
import trio

from mycel.protocol.callbook import codec_of
from mycel.protocol.errors import ConnectionLost, LimitExceeded, Refused, RemoteProtocolError, StreamReset
from mycel.protocol.failure import decode_failure, lost
from mycel.protocol.frame import CANCEL, ERROR, HEAD, HEAD_BYTES, REQUEST, RESPONSE, Frame, pack, split
from mycel.protocol.inlet import Inlet
from mycel.protocol.limits import CallLimits
from mycel.protocol.mesh import Mesh, PeerId, Stream
from mycel.protocol.message import Codec, MessageError
from mycel.protocol.method import Method
from mycel.protocol.outlet import STREAM_GONE, Outlet, Spawn


class TooLarge(Exception):
    """The request does not belong on the line; `parts` is its frame, nothing was sent."""

    def __init__(self, parts: list[Any]) -> None:
        super().__init__("request too large for the line")
        self.parts = parts


class Pending:
    """A call that waits for its answer."""

    __slots__ = ("codec", "method", "size", "task")

    def __init__(self, task: trio.lowlevel.Task, codec: Codec[Any], method: str, size: int) -> None:
        self.task = task
        self.codec = codec
        self.method = method
        self.size = size


class Line:
    """One stream of small calls to one peer, until it is lost."""

    def __init__(self, mesh: Mesh, stream: Stream, limits: CallLimits, spawn: Spawn) -> None:
        self._mesh = mesh
        self._peer: PeerId = stream.peer
        self._limits = limits
        self._outlet = Outlet(stream, spawn, limits.backlog_bytes)
        self._stream = stream
        self._pending: dict[int, Pending] = {}
        self._held = 0
        self._tail = b""
        self._scratch = bytearray()
        self._room = trio.lowlevel.ParkingLot()
        self.lost: Exception | None = None
        stream.deliver_to(self._on_data)

    async def ask(self, number: int, method: Method[Any, Any], request: Any, deadline_ms: int) -> Any:
        """The answer to `request`. Raises as `Rpc.call`, or `TooLarge`; cancelling it cancels the handler."""
        limits = self._limits
        while self.lost is None and (
            self._outlet.is_full
            or len(self._pending) >= limits.in_flight
            or self._held > limits.in_flight_bytes - limits.shared_bytes
        ):
            await self._wait_room()
        data = self._encode(number, method, request, deadline_ms)
        if self.lost is not None:
            raise ConnectionLost(f"the line to {self._peer} is gone: {self.lost}", reason="reset")
        size = len(data)
        try:
            self._outlet.put(data)
        except StreamReset as error:
            raise lost(error, self._peer, method.name) from error
        task = trio.lowlevel.current_task()
        self._pending[number] = Pending(task, codec_of(method.response), method.name, size)
        self._held += size

        def abort(_: object) -> trio.lowlevel.Abort:
            if self._forget(number) is not None:
                with suppress(*STREAM_GONE):  # then there is no handler left to cancel
                    self._outlet.put(pack(CANCEL, number)[0])
            return trio.lowlevel.Abort.SUCCEEDED

        return await trio.lowlevel.wait_task_rescheduled(abort)

    async def take_answer(self, stream: Stream) -> None:
        """Receive from `stream` a large answer to one of this line's calls."""
        inlet = Inlet(stream, self._limits.message_bytes)
        head = await inlet.head()
        if head is None or head[4] not in self._pending:
            stream.reset()  # nobody waits for it any more
            return
        frame = await inlet.frame()
        if frame is not None and frame.kind == RESPONSE:
            self._on_frame(frame)

    def close(self, error: Exception) -> None:
        """Fail all calls on the line."""
        self._end(error)
        self._stream.reset()

    def _encode(self, number: int, method: Method[Any, Any], request: Any, deadline_ms: int) -> Any:
        """The request's frame; in a buffer that the next call reuses, where it can be."""
        codec = codec_of(method.request)
        name = method.name.encode()
        if codec.has_tensors:
            body, raws = codec.encode(request)
            parts = pack(REQUEST, number, body, raws, name=name, deadline_ms=deadline_ms)
            total = sum(len(part) for part in parts)
        else:
            buffer = self._scratch
            begin = HEAD_BYTES + len(name)
            codec.encode_into(request, buffer, begin)
            buffer[HEAD_BYTES:begin] = name
            total = len(buffer)
            HEAD.pack_into(buffer, 0, total - HEAD_BYTES, REQUEST, len(name), 0, number, deadline_ms)
            parts = [buffer]
        if total > self._limits.message_bytes:
            raise LimitExceeded(
                f"{method.name}: a request of {total} bytes, more than message_bytes allows "
                f"({self._limits.message_bytes}); send it in pieces"
            )
        if total - HEAD_BYTES > self._limits.shared_bytes:
            raise TooLarge([bytes(part) if part is self._scratch else part for part in parts])
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def _wait_room(self) -> None:
        if self._outlet.is_full:
            await self._outlet.wait_room()
        else:
            await self._room.park()

    def _forget(self, number: int) -> Pending | None:
        pending = self._pending.pop(number, None)
        if pending is not None:
            self._held -= pending.size
            if self._room:
                self._room.unpark()
        return pending

    def _on_data(self, chunk: memoryview | None, error: Exception | None) -> None:
        if chunk is None:
            self._end(error or StreamReset(f"{self._peer} ended the line"))
            return
        if self._tail:
            chunk = memoryview(self._tail + bytes(chunk))
        try:
            frames, used = split(chunk, self._limits.shared_bytes)
            self._tail = bytes(chunk[used:])
            for frame in frames:
                self._on_frame(frame)
        except RemoteProtocolError as broken:
            self._end(broken)
            self._mesh.disconnect(self._peer, str(broken))

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
                RemoteProtocolError(f"{self._peer} answered {pending.method} with: {error}")
            )
        trio.lowlevel.reschedule(pending.task, result)

    def _end(self, error: Exception) -> None:
        if self.lost is not None:
            return
        self.lost = error
        pending, self._pending = self._pending, {}
        for each in pending.values():
            failed = lost(error, self._peer, each.method) if isinstance(error, StreamReset) else error
            trio.lowlevel.reschedule(each.task, outcome.Error(copy_of(failed)))
        self._room.unpark_all()


def copy_of(error: Exception) -> Exception:
    """The same failure for one more task: a traceback belongs to one raise only."""
    if isinstance(error, ConnectionLost | Refused):
        return type(error)(str(error), reason=error.reason)
    return type(error)(str(error))
