"""Making a unary call with a stream of its own, at the least cost: a request that fits the first window.

The request takes the stream's negotiation and end along, one packet in all; the answer is put together in the
connection's reader and wakes the caller. What is too large for that goes by `call_single`.
"""

from __future__ import annotations

import math
from typing import Any

import outcome
import trio

from mycel.protocol.alarm import Alarm
from mycel.protocol.callbook import codec_of
from mycel.protocol.errors import ConnectionLost, DeadlineExceeded, RemoteProtocolError, StreamReset
from mycel.protocol.failure import decode_failure, lost
from mycel.protocol.frame import ERROR, HEAD_BYTES, RESPONSE, Frame, FrameReader, split
from mycel.protocol.limits import CallLimits
from mycel.protocol.mesh import Buffer, Stream
from mycel.protocol.message import MessageError
from mycel.protocol.method import Method


class LoneCall:
    """One call. `send` first; where it took the request, wait for the `answer`."""

    __slots__ = ("_has_ended", "_limits", "_method", "_reader", "_result", "_stream", "_task", "is_settled")

    def __init__(self, stream: Stream, method: Method[Any, Any], limits: CallLimits) -> None:
        self._stream = stream
        self._method = method
        self._limits = limits
        self._task: trio.lowlevel.Task | None = None
        self._reader: FrameReader | None = None
        self._result: outcome.Outcome[Any] | None = None
        self._has_ended = False
        self.is_settled = True

    def send(self, request: Buffer) -> bool:
        """Send the whole call; False (nothing sent) where the window has no room for it.

        Raises `ConnectionLost`, `Refused`.
        """
        try:
            return self._stream.try_send(request, end=True)
        except StreamReset as error:
            raise lost(error, self._stream.peer, self._method.name) from error

    async def answer(self, alarm: Alarm, number: int, deadline: float) -> Any:
        """Wait for the response. Raises as `Rpc.call`; cancelling it cancels the handler.

        `alarm` sees to the deadline (trio time), unless that is infinite.
        """
        self._stream.deliver_to(self._on_data)
        if self._result is None:
            self._task = trio.lowlevel.current_task()
            if deadline < math.inf:
                alarm.set(deadline, number, self)
            try:
                await trio.lowlevel.wait_task_rescheduled(self._abort)
            finally:
                alarm.clear(self)
        assert self._result is not None
        if not isinstance(self._result, outcome.Value):
            self._stream.reset()
        elif not self._has_ended:  # else the stream is over both ways already
            await self._stream.aclose()
        return self._result.unwrap()

    def expire(self) -> None:
        """The deadline came before the answer."""
        error = DeadlineExceeded(f"{self._method.name}: no answer from {self._stream.peer} in time")
        self._finish(outcome.Error(error))

    def _abort(self, _: object) -> trio.lowlevel.Abort:
        self._task = None
        self._stream.reset()
        return trio.lowlevel.Abort.SUCCEEDED

    def _finish(self, result: outcome.Outcome[Any]) -> None:
        if self._result is not None:
            return
        self._result = result
        task, self._task = self._task, None
        if task is not None:
            trio.lowlevel.reschedule(task)

    def _on_data(self, chunk: memoryview | None, error: Exception | None) -> None:
        self._has_ended = chunk is None
        if self._result is not None:
            return  # answered: what else comes is not looked at
        peer, name = self._stream.peer, self._method.name
        if chunk is None:
            if isinstance(error, StreamReset):
                error = lost(error, peer, name)
            failed = error or ConnectionLost(f"{peer} ended {name} without an answer", reason="closed")
            self._finish(outcome.Error(failed))
            return
        try:
            frame = self._next_frame(chunk)
            if frame is not None:
                self._finish(self._outcome_of(frame))
        except RemoteProtocolError as broken:
            self._finish(outcome.Error(RemoteProtocolError(f"{peer} answered {name} with: {broken}")))

    def _next_frame(self, chunk: memoryview) -> Frame | None:
        if self._reader is None:
            if len(chunk) >= HEAD_BYTES:
                frames, _ = split(chunk, self._limits.message_bytes)
                if frames:
                    return frames[0]
            self._reader = FrameReader(self._limits.message_bytes)
        self._reader.feed(chunk)
        return self._reader.next()

    def _outcome_of(self, frame: Frame) -> outcome.Outcome[Any]:
        if frame.kind == ERROR:
            return outcome.Error(decode_failure(frame.body))
        if frame.kind != RESPONSE:
            raise MessageError(f"a frame of kind {frame.kind}")
        codec = codec_of(self._method.response)
        return outcome.Value(codec.decode(frame.body, frame.raws, owned=frame.owned))
