"""Making a call on a stream of its own: large messages, and all streaming calls.

`CallStream` is the caller's end. Leaving it early resets the stream, which cancels the handler.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Generic

import trio

from mycel.protocol.callbook import codec_of
from mycel.protocol.errors import (
    ConnectionLost,
    LocalProtocolError,
    MycelError,
    RemoteProtocolError,
    StreamReset,
)
from mycel.protocol.failure import decode_failure, lost
from mycel.protocol.frame import END, ERROR, HEAD, HEAD_BYTES, ITEM, REQUEST, RESPONSE, Frame, pack
from mycel.protocol.inlet import Inlet
from mycel.protocol.limits import CallLimits
from mycel.protocol.mesh import Buffer, Stream
from mycel.protocol.message import MessageError
from mycel.protocol.method import Kind, Method, Req, Res
from mycel.protocol.outlet import STREAM_GONE
from mycel.protocol.serve_single import check_size, send_parts


def begin_frame(
    method: Method[Any, Any],
    number: int,
    request: Any,
    deadline_ms: int,
    limits: CallLimits,
    scratch: bytearray | None = None,
) -> list[Buffer]:
    """The frame that begins a call, with the request where the method takes exactly one. It may be
    written to `scratch`, and is good until that is used again.

    Raises `LocalProtocolError` for a request that cannot be encoded, `LimitExceeded` for one too large.
    """
    name = method.name.encode()
    if method.kind not in (Kind.UNARY, Kind.SERVER_STREAM):
        return pack(REQUEST, number, name=name, deadline_ms=deadline_ms)
    codec = codec_of(method.request)
    parts: list[Buffer]
    if scratch is None or codec.has_tensors:
        body, raws = codec.encode(request)
        parts = pack(REQUEST, number, body, raws, name=name, deadline_ms=deadline_ms)
    else:
        begin = HEAD_BYTES + len(name)
        codec.encode_into(request, scratch, begin)
        HEAD.pack_into(scratch, 0, len(scratch) - HEAD_BYTES, REQUEST, len(name), 0, number, deadline_ms)
        scratch[HEAD_BYTES:begin] = name
        parts = [scratch]
    check_size(parts, limits.message_bytes)
    return parts


class CallStream(Generic[Req, Res]):
    """The caller's end of a call with its own stream. One task sends and one receives at a time."""

    def __init__(self, stream: Stream, number: int, method: Method[Req, Res], limits: CallLimits) -> None:
        self._stream = stream
        self._number = number
        self._method = method
        self._limits = limits
        self._request = codec_of(method.request)
        self._response = codec_of(method.response)
        self._blocked: trio.CancelScope | None = None
        self._is_cut = False
        self._sent_end = method.kind in (Kind.UNARY, Kind.SERVER_STREAM)
        self._done: MycelError | trio.EndOfChannel | None = None

    async def begin(self, request: list[Buffer]) -> None:
        """Send the frame that begins the call; to be called once, before all else. Raises as `Rpc.call`."""
        sent = 0
        try:  # before the stream is listened to: then its negotiation rides with the request
            if self._stream.try_send(request[0], end=self._sent_end and len(request) == 1):
                sent = 1
        except StreamReset as error:
            raise lost(error, self._stream.peer, self._method.name) from error
        self._inlet = Inlet(self._stream, self._limits.message_bytes, on_news=self._on_news)
        if sent < len(request):
            await self._put(request[sent:], end=self._sent_end)

    async def send(self, item: Req) -> None:
        """Send one request; waits while the handler is behind. Raises as `Rpc.call`.

        Once the handler has answered nobody reads requests any more, and they are dropped.
        """
        if self._sent_end:
            raise LocalProtocolError(f"{self._method.name}: this side has ended its requests")
        body, raws = self._request.encode(item)
        parts = pack(ITEM, self._number, body, raws)
        check_size(parts, self._limits.message_bytes)
        await self._put(parts)

    async def end(self) -> None:
        """Say that no more requests come; responses still do."""
        if not self._sent_end:
            self._sent_end = True
            await self._put(pack(END, self._number), end=True)

    async def receive(self) -> Res:
        """The next response. Raises `trio.EndOfChannel` after the last, else as `Rpc.call`."""
        if self._done is not None:
            raise self._done
        try:
            frame = await self._inlet.frame()
            if frame is None:
                raise ConnectionLost(f"{self._stream.peer} ended {self._method.name} without an answer")
            return self._on_frame(frame)
        except StreamReset as error:
            self._done = lost(error, self._stream.peer, self._method.name)
            raise self._done from error
        except MycelError as error:
            self._done = error
            raise

    def __aiter__(self) -> AsyncIterator[Res]:
        return self

    async def __anext__(self) -> Res:
        try:
            return await self.receive()
        except trio.EndOfChannel:
            raise StopAsyncIteration from None

    async def finish(self) -> None:
        """Close in order after the last response, else reset, which cancels the handler."""
        if isinstance(self._done, trio.EndOfChannel) and not self._is_cut:
            await self._stream.aclose()
        else:
            self._stream.reset()

    def reset(self) -> None:
        """Cancel the call."""
        self._stream.reset()

    def _on_frame(self, frame: Frame) -> Res:
        kind = self._method.kind
        is_single = kind in (Kind.UNARY, Kind.CLIENT_STREAM)
        if frame.kind == ERROR:
            raise decode_failure(frame.body)
        if frame.kind == END and not is_single:
            self._done = trio.EndOfChannel()
            raise self._done
        if frame.kind != (RESPONSE if is_single else ITEM):
            raise RemoteProtocolError(
                f"{self._stream.peer} answered {self._method.name} with a frame of kind {frame.kind}"
            )
        try:
            value: Res = self._response.decode(frame.body, frame.raws)
        except MessageError as error:
            raise RemoteProtocolError(
                f"{self._stream.peer} answered {self._method.name} with: {error}"
            ) from error
        if is_single:
            self._done = trio.EndOfChannel()
        return value

    def _is_answered(self) -> bool:
        if self._done is not None:
            return True
        try:
            return self._inlet.next_kind in (RESPONSE, ERROR, END)
        except RemoteProtocolError:  # the receiving side raises it
            return True

    def _on_news(self, is_lost: bool) -> None:
        if not is_lost and self._blocked is not None and self._is_answered():
            self._blocked.cancel()

    async def _put(self, parts: list[Buffer], *, end: bool = False) -> None:
        if not self._is_answered():
            try:
                with trio.CancelScope() as self._blocked:
                    self._is_cut, was_cut = True, self._is_cut
                    await send_parts(self._stream, parts, end=end)
                    self._is_cut = was_cut
            except STREAM_GONE as error:
                if not self._is_answered():
                    if isinstance(error, StreamReset):
                        raise lost(error, self._stream.peer, self._method.name) from error
                    raise
            finally:
                self._blocked = None
        if self._inlet.next_kind == ERROR:
            await self.receive()
