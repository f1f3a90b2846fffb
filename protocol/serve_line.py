"""Serving small unary calls: many at once on the one stream that a peer opened for them (its *line*).

Requests are read, checked and dispatched in the connection's reader. An inline handler is answered right
there; an async one gets a task, a plain one a worker thread. A handler's failure is its call's answer and
nothing else. Bytes that are no frames end the connection.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import trio

from mycel.protocol.callbook import Mode, Served
from mycel.protocol.errors import RemoteProtocolError
from mycel.protocol.failure import (
    BAD_REQUEST,
    Failure,
    bad_request,
    deadline_failure,
    encode_failure,
)
from mycel.protocol.frame import (
    CANCEL,
    ERROR,
    HEAD_BYTES,
    REQUEST,
    Frame,
    pack,
    split,
)
from mycel.protocol.mesh import PeerId, Stream
from mycel.protocol.message import MessageError
from mycel.protocol.method import Call, Kind
from mycel.protocol.outlet import STREAM_GONE, Outlet
from mycel.protocol.shop import Shop, encode_answer, report, run_unary, to_deadline
from mycel.protocol.workers import Worker

LINE = "/mycel/calls/1"
ANSWER = "/mycel/answer/1"


class LineServer:
    """One peer's line."""

    __slots__ = ("_held", "_is_over", "_on_end", "_peer", "_running", "_shop", "_stream", "_tail", "outlet")

    def __init__(self, shop: Shop, stream: Stream, on_end: Callable[[PeerId], None]) -> None:
        """`on_end` is called once the peer ended the line or it was lost."""
        self._shop = shop
        self._on_end = on_end
        self._is_over = False
        self._stream = stream
        self._peer = stream.peer
        self._running: dict[int, LineJob] = {}
        self._held = 0
        self._tail = b""
        self.outlet = Outlet(stream, shop.spawn, shop.limits.backlog_bytes)

    def start(self) -> None:
        """Serve until the peer ends the line or it is lost; then its running calls are cancelled."""
        self._stream.deliver_to(self._on_data)

    def _end(self) -> None:
        if self._is_over:
            return
        self._is_over = True
        self._on_end(self._peer)
        for job in list(self._running.values()):
            job.cancel()

    def _on_data(self, chunk: memoryview | None, error: Exception | None) -> None:
        if chunk is None:
            self._end()
            if error is None:
                self._shop.spawn(self._stream.aclose)
            return
        if self._tail:
            chunk = memoryview(self._tail + bytes(chunk))
        try:
            frames, used = split(chunk, self._shop.limits.shared_bytes)
            self._tail = bytes(chunk[used:]) if used < len(chunk) else b""
            for frame in frames:
                if frame.kind == REQUEST:
                    self._on_request(frame)
                elif frame.kind == CANCEL:
                    job = self._running.get(frame.call)
                    if job is not None:
                        job.cancel()
                else:
                    raise RemoteProtocolError(f"frame of kind {frame.kind} from a caller")
        except RemoteProtocolError as broken:
            self._end()
            self._shop.mesh.disconnect(self._peer, str(broken))

    def _on_request(self, frame: Frame) -> None:
        shop = self._shop
        number = frame.call
        found = shop.book.find(frame.name, self._peer)
        shop.book.count(found)
        if isinstance(found, Failure):
            self.refuse(number, found)
            return
        served, access = found
        limits = shop.limits
        if served.method.kind is not Kind.UNARY:
            text = f"{served.name} is a {served.method.kind.value} method; open it with stream()"
            self.refuse(number, Failure("error", BAD_REQUEST, text))
            return
        if len(self._running) >= limits.in_flight or self._held + frame.size > limits.in_flight_bytes:
            text = f"{len(self._running)} calls with {self._held} bytes in flight already; slow down"
            self.refuse(number, Failure("refused", "busy", text))
            return
        if number in self._running:
            raise RemoteProtocolError(f"call {number} asked twice")
        try:
            request = served.request.decode(frame.body, frame.raws, owned=False)
        except MessageError as error:
            self.refuse(number, bad_request(served.name, error, limits.error_text))
            return
        call = Call(self._peer, access, served.name, to_deadline(frame.deadline_ms))
        if served.mode is Mode.INLINE and not self.outlet.is_full:
            self._answer_now(number, served, call, request)
            return
        self._held += frame.size
        job = self._running[number] = LineJob(self, number, served, call, request, frame.size)
        job.worker = shop.workers.start(job)

    def _answer_now(self, number: int, served: Served, call: Call, request: Any) -> None:
        try:
            response = served.handler(call, request)
        except Exception as error:  # boundary: a handler's failure is its call's answer
            self.refuse(number, report(call, error, self._shop.limits))
            return
        parts = self._reply(number, served, call, response)
        if parts is not None:
            self._shop.spawn(self._answer_apart, parts)

    async def answer(self, number: int, served: Served, call: Call, request: Any) -> None:
        """Run the handler and send what comes of it."""
        try:
            response = await run_unary(self._shop, served, call, request)
        except Exception as error:  # boundary: a handler's failure is its call's answer
            self.refuse(number, report(call, error, self._shop.limits))
            return
        if self.outlet.is_full:
            await self.outlet.wait_room()
        parts = self._reply(number, served, call, response)
        if parts is not None:
            await self._answer_apart(parts)

    def forget(self, number: int, size: int) -> None:
        """The call is answered or cancelled."""
        del self._running[number]
        self._held -= size

    def refuse(self, number: int, failure: Failure) -> None:
        """Answer with a failure."""
        self._put(pack(ERROR, number, encode_failure(failure))[0])

    def _reply(self, number: int, served: Served, call: Call, response: Any) -> list[Any] | None:
        """Answer on the line, or return the frame's parts where it is too large for that."""
        shop = self._shop
        try:
            parts = encode_answer(shop, served, number, response)
        except Exception as error:  # boundary: what a handler returned cannot be encoded
            self.refuse(number, report(call, error, shop.limits))
            return None
        total = sum(map(len, parts))
        if total - HEAD_BYTES <= shop.limits.shared_bytes:
            self._put(parts[0] if len(parts) == 1 else b"".join(parts))
            return None
        if total > shop.limits.message_bytes:
            text = f"{call.method}: the answer has {total} bytes, more than {shop.limits.message_bytes}"
            self.refuse(number, Failure("error", "LimitExceeded", text))
            return None
        return [bytes(part) if part is shop.scratch else part for part in parts]

    async def _answer_apart(self, parts: list[Any]) -> None:
        """Send a large answer on a stream of its own, so that it holds up no other."""
        try:
            stream = await self._shop.mesh.open_stream(self._peer, ANSWER)
            try:
                for part in parts:
                    await stream.send(part, end=part is parts[-1])
                await stream.aclose()
            except BaseException:  # why: an answer given up resets its stream too; raised again
                stream.reset()
                raise
        except STREAM_GONE:  # the line's loss tells the caller; a lone reset means it does not wait any more
            pass

    def _put(self, data: Any) -> None:
        try:
            self.outlet.put(data)
        except STREAM_GONE:  # the receiver above is told as well, and ends the line
            return


class LineJob:
    """One request on a line, for a worker."""

    __slots__ = ("_call", "_line", "_number", "_request", "_served", "_size", "deadline", "worker")

    def __init__(
        self, line: LineServer, number: int, served: Served, call: Call, request: Any, size: int
    ) -> None:
        self._line = line
        self._number = number
        self._served = served
        self._call = call
        self._request = request
        self._size = size
        self.deadline = call.deadline
        self.worker: Worker | None = None

    def cancel(self) -> None:
        """Nobody waits for the answer."""
        if self.worker is not None:
            self.worker.cancel(self)

    async def run(self) -> None:
        """See `workers.Job`."""
        try:
            await self._line.answer(self._number, self._served, self._call, self._request)
        finally:
            self._line.forget(self._number, self._size)

    def on_cancelled(self) -> None:
        """See `workers.Job`."""
        if trio.current_time() >= self.deadline:
            self._line.refuse(self._number, deadline_failure(self._call.method))
