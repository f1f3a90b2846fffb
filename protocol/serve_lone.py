"""Serving a call that came whole with the first bytes of its stream: a small unary request.

The counterpart of `call_lone`. What did not come so is left to `serve_single`, with the bytes that did come.
"""

from __future__ import annotations

from typing import Any

import trio

from mycel.protocol.callbook import Served
from mycel.protocol.failure import Failure, bad_request, deadline_failure, encode_failure
from mycel.protocol.frame import ERROR, HEAD_BYTES, REQUEST, Frame, pack, split
from mycel.protocol.mesh import Access, Buffer, Stream
from mycel.protocol.message import MessageError
from mycel.protocol.method import Call, Kind
from mycel.protocol.serve_line import Shop, encode_answer, report, run_unary, to_deadline
from mycel.protocol.serve_single import check_size, send_parts


class LoneServer:
    """Serves one such stream."""

    __slots__ = ("_found", "_frame", "_scope", "_shop", "_stream", "first", "is_lost")

    def __init__(self, shop: Shop, stream: Stream) -> None:
        self._shop = shop
        self._stream = stream
        self._scope: trio.CancelScope | None = None
        self._frame: Frame | None = None
        self._found: tuple[Served, Access] | None = None
        self.first = b""
        """What came before anybody else listened, for whoever serves the stream if this does not."""
        self.is_lost = False
        stream.deliver_to(self._on_data, credit=False)

    def is_whole(self) -> bool:
        """Whether this is a unary call of a method served here, and all of it has come.

        Raises `RemoteProtocolError`.
        """
        first = self.first
        if len(first) < HEAD_BYTES or int.from_bytes(first[:4], "big") + HEAD_BYTES != len(first):
            return False
        if len(first) > self._shop.limits.shared_bytes:
            return False
        frame = split(memoryview(first), len(first))[0][0]
        frame.owned = True
        found = self._shop.book.find(frame.name, self._stream.peer)
        if isinstance(found, Failure) or found[0].method.kind is not Kind.UNARY or frame.kind != REQUEST:
            return False
        self._frame, self._found = frame, found
        return True

    async def run(self) -> None:
        """Answer. Raises what the stream's methods raise."""
        assert self._frame is not None
        assert self._found is not None
        frame, (served, access) = self._frame, self._found
        limits = self._shop.limits
        deadline = to_deadline(frame.deadline_ms)
        answer: list[Buffer] | Failure
        try:
            request = served.request.decode(frame.body, frame.raws)
        except MessageError as error:
            answer = bad_request(served.name, error, limits.error_text)
        else:
            call = Call(self._stream.peer, access, served.name, deadline)
            with trio.CancelScope(deadline=deadline) as self._scope:
                answer = deadline_failure(served.name)
                if not self.is_lost:
                    answer = await self._ask_handler(served, call, request, frame.call)
        if self.is_lost:
            return
        if isinstance(answer, Failure):
            answer = pack(ERROR, frame.call, encode_failure(answer))
        await self._send(answer, deadline)

    async def _ask_handler(
        self, served: Served, call: Call, request: Any, number: int
    ) -> list[Buffer] | Failure:
        try:
            response = await run_unary(self._shop, served, call, request)
            parts = encode_answer(self._shop, served, number, response)
            check_size(parts, self._shop.limits.message_bytes)
        except Exception as error:  # boundary: a handler's failure is its call's answer
            return report(call, error, self._shop.limits)
        return parts

    async def _send(self, parts: list[Buffer], deadline: float) -> None:
        if len(parts) == 1 and self._stream.try_send(parts[0], end=True):
            return
        kept = [bytes(part) if part is self._shop.scratch else part for part in parts]
        with trio.CancelScope(deadline=deadline) as self._scope:
            await send_parts(self._stream, kept, end=True)
        if self._scope.cancelled_caught:
            self._stream.reset()

    def _on_data(self, chunk: memoryview | None, error: Exception | None) -> None:
        if chunk is not None:
            if self._frame is None:
                self.first += chunk
        elif error is not None:
            self.is_lost = True
            if self._scope is not None:
                self._scope.cancel()
