"""Serving a call that has a stream of its own: large messages, and all streaming calls.

The peer's REQUEST comes first, then its ITEMs and END where the method takes a stream; the answer is a
RESPONSE, or ITEMs and END, or an ERROR. A reset stream is a cancelled call: the handler is cancelled.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import trio

from mycel.protocol.callbook import Served
from mycel.protocol.errors import LimitExceeded, RemoteProtocolError
from mycel.protocol.failure import Failure, bad_request, deadline_failure, encode_failure
from mycel.protocol.frame import END, ERROR, ITEM, REQUEST, RESPONSE, Frame, pack
from mycel.protocol.inlet import Inlet
from mycel.protocol.mesh import Buffer, PeerId, Stream
from mycel.protocol.message import MessageError
from mycel.protocol.method import Call, Kind
from mycel.protocol.outlet import STREAM_GONE, Budget
from mycel.protocol.shop import Shop, report, run_unary, to_deadline

SINGLE = "/mycel/call/1"


def check_size(parts: list[Buffer], message_bytes: int) -> None:
    """Raise `LimitExceeded` for a frame that is too large to send."""
    total = sum(map(len, parts))
    if total > message_bytes:
        raise LimitExceeded(
            f"a message of {total} bytes, more than message_bytes allows ({message_bytes}); send it in pieces"
        )


async def send_parts(stream: Stream, parts: list[Buffer], *, end: bool = False) -> None:
    """Send one frame, and end the stream with it where `end`. Raises as `Stream.send`."""
    last = len(parts) - 1
    for index, part in enumerate(parts):
        await stream.send(part, end=end and index == last)


class SingleServer:
    """Serves one such stream, which is one call."""

    def __init__(self, shop: Shop, stream: Stream, budget: Budget, first: bytes = b"") -> None:
        """`first` is what somebody else took off the stream, uncredited."""
        self._shop = shop
        self._stream = stream
        self._peer: PeerId = stream.peer
        self._scope = trio.CancelScope(deadline=trio.current_time() + shop.limits.request_s)
        limits = shop.limits
        self._inlet = Inlet(
            stream,
            limits.message_bytes,
            on_news=self._on_news,
            budget=budget,
            first=first,
        )
        self._number = 0
        self._call: Call | None = None
        self._bad_item: MessageError | None = None
        self._is_sending = False

    def _on_news(self, is_lost: bool) -> None:
        if is_lost:
            self._scope.cancel()

    async def run(self) -> None:
        """Serve the call; returns when it is answered, refused or lost."""
        try:
            with self._scope:
                failure = await self._serve()
                if failure is not None:
                    await self._stream.send(self._refusal(failure), end=True)
            if self._scope.cancelled_caught:
                self._cut_short()
            await self._stream.aclose()
        except STREAM_GONE:
            return
        except RemoteProtocolError as error:
            self._shop.mesh.disconnect(self._peer, str(error))
        finally:
            self._inlet.release()

    def _cut_short(self) -> None:
        """The handler was cancelled: say so if it was the deadline, and if there is a place to say it."""
        if (
            self._inlet.error is not None
            or self._call is None
            or self._is_sending
            or not self._stream.try_send(self._refusal(deadline_failure(self._call.method)))
        ):
            self._stream.reset()

    def _refusal(self, failure: Failure) -> Buffer:
        return pack(ERROR, self._number, encode_failure(failure))[0]

    async def _serve(self) -> Failure | None:
        head = await self._inlet.head()
        if head is None:
            return None
        self._scope.deadline = to_deadline(head[5])
        frame = await self._inlet.frame()
        if frame is None or frame.kind != REQUEST:
            raise RemoteProtocolError("a call's stream begins with something else than a request")
        self._number = frame.call
        found = self._shop.book.find(frame.name, self._peer)
        self._shop.book.count(found)
        if isinstance(found, Failure):
            return found
        served, access = found
        self._call = Call(self._peer, access, served.method.name, self._scope.deadline)
        return await self._run_handler(served, self._call, frame)

    async def _run_handler(self, served: Served, call: Call, frame: Frame) -> Failure | None:
        limits = self._shop.limits
        kind = served.method.kind
        argument: Any = self._items(served)
        if kind in (Kind.UNARY, Kind.SERVER_STREAM):
            try:
                argument = served.request.decode(frame.body, frame.raws)
            except MessageError as error:
                return bad_request(call.method, error, limits.error_text)
        try:
            if kind in (Kind.UNARY, Kind.CLIENT_STREAM):
                response = await run_unary(self._shop, served, call, argument)
                await self._send(RESPONSE, served, response, end=True)
            else:
                async with aclosing(served.handler(call, argument)) as items:
                    async for item in items:
                        await self._send(ITEM, served, item)
                await self._stream.send(pack(END, self._number)[0], end=True)
        except Exception as error:  # boundary: a handler's failure is its call's answer
            if self._inlet.error is not None:
                raise self._inlet.error from error
            if error is self._bad_item:
                return bad_request(call.method, self._bad_item, limits.error_text)
            return report(call, error, limits)
        return None

    async def _items(self, served: Served) -> AsyncIterator[Any]:
        try:
            while (frame := await self._inlet.frame()) is not None:
                if frame.kind == END:
                    return
                if frame.kind != ITEM:
                    raise MessageError(f"a frame of kind {frame.kind} came among the items")
                yield served.request.decode(frame.body, frame.raws)
            raise MessageError("the stream ended without saying so")
        except MessageError as error:
            self._bad_item = error
            raise

    async def _send(self, kind: int, served: Served, value: Any, *, end: bool = False) -> None:
        body, raws = served.response.encode(value)
        parts = pack(kind, self._number, body, raws)
        check_size(parts, self._shop.limits.message_bytes)
        self._is_sending = True
        await send_parts(self._stream, parts, end=end)
        self._is_sending = False
