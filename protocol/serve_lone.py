"""Serving a call that came whole with the first bytes of its stream: a small unary request.

The counterpart of `call_lone`, and as short: read in the connection's reader, done by a worker, answered with
the end of the stream. What did not come so is left to `serve_single`, with the bytes that did come.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mycel.protocol.callbook import Served
from mycel.protocol.failure import Failure, bad_request, deadline_failure, encode_failure
from mycel.protocol.frame import ERROR, HEAD_BYTES, REQUEST, Frame, pack, read_head, read_rest
from mycel.protocol.mesh import Access, Buffer, PeerId, Stream
from mycel.protocol.message import MessageError
from mycel.protocol.method import Call, Kind
from mycel.protocol.outlet import STREAM_GONE
from mycel.protocol.serve_single import check_size, send_parts
from mycel.protocol.shop import Shop, encode_answer, report, run_unary, to_deadline
from mycel.protocol.workers import Worker


class LoneServer:
    """One such stream, and the job that answers it."""

    __slots__ = (
        "_call",
        "_frame",
        "_has_ended",
        "_is_sending",
        "_on_end",
        "_request",
        "_served",
        "_shop",
        "_stream",
        "_worker",
        "deadline",
        "first",
        "is_lost",
    )

    def __init__(self, shop: Shop, stream: Stream, on_end: Callable[[PeerId], None]) -> None:
        """`on_end` is called once the call that `serve` began is over."""
        self._shop = shop
        self._stream = stream
        self._on_end = on_end
        self._worker: Worker | None = None
        self._frame: Frame | None = None
        self._is_sending = False
        self._has_ended = False
        self._request: Any = None
        self.first = b""
        """What came before anybody else listened, for whoever serves the stream if this does not."""
        self.is_lost = False
        stream.deliver_to(self._on_data, credit=False)

    def serve(self) -> bool:
        """Begin to serve the call; False where it is not a whole unary call of a method known here.

        Raises `RemoteProtocolError`.
        """
        first = self.first
        if not HEAD_BYTES <= len(first) <= self._shop.limits.shared_bytes:
            return False
        head = read_head(first, 0, self._shop.limits.message_bytes)
        if head[0] + HEAD_BYTES != len(first) or head[1] != REQUEST:
            return False
        frame = read_rest(head, memoryview(first)[HEAD_BYTES:], True)
        found = self._shop.book.find(frame.name, self._stream.peer)
        if isinstance(found, Failure) or found[0].method.kind is not Kind.UNARY:
            return False
        self._shop.book.count(found)
        self._frame = frame
        self._begin(frame, *found)
        return True

    def _begin(self, frame: Frame, served: Served, access: Access) -> None:
        self._served = served
        self.deadline = to_deadline(frame.deadline_ms)
        self._call = Call(self._stream.peer, access, served.name, self.deadline)
        try:
            self._request = served.request.decode(frame.body, frame.raws)
        except MessageError as error:
            self._request = bad_request(served.name, error, self._shop.limits.error_text)
        self._worker = self._shop.workers.start(self)

    async def run(self) -> None:
        """See `workers.Job`."""
        try:
            await self._send(await self._answer())
            if not self._has_ended:  # else the stream is over both ways already
                await self._stream.aclose()
        except STREAM_GONE:  # nobody waits for the answer
            return
        finally:
            self._on_end(self._stream.peer)

    def on_cancelled(self) -> None:
        """See `workers.Job`."""
        if not (self.is_lost or self._is_sending):
            try:
                if self._stream.try_send(self._refusal(deadline_failure(self._call.method)), end=True):
                    return
            except STREAM_GONE:  # then this changes nothing either
                pass
        self._stream.reset()

    async def _answer(self) -> list[Buffer]:
        call = self._call
        if isinstance(self._request, Failure):
            return [self._refusal(self._request)]
        assert self._frame is not None
        try:
            response = await run_unary(self._shop, self._served, call, self._request)
            parts = encode_answer(self._shop, self._served, self._frame.call, response)
            check_size(parts, self._shop.limits.message_bytes)
        except Exception as error:  # boundary: a handler's failure is its call's answer
            return [self._refusal(report(call, error, self._shop.limits))]
        return parts

    async def _send(self, parts: list[Buffer]) -> None:
        if len(parts) == 1 and self._stream.try_send(parts[0], end=True):
            return
        kept = [bytes(part) if part is self._shop.scratch else part for part in parts]
        self._is_sending = True
        await send_parts(self._stream, kept, end=True)

    def _refusal(self, failure: Failure) -> Buffer:
        assert self._frame is not None
        return pack(ERROR, self._frame.call, encode_failure(failure))[0]

    def _on_data(self, chunk: memoryview | None, error: Exception | None) -> None:
        if chunk is not None:
            if self._frame is None:
                self.first = self.first + bytes(chunk) if self.first else bytes(chunk)
        elif error is None:
            self._has_ended = True
        else:
            self.is_lost = True
            if self._worker is not None:
                self._worker.cancel(self)
