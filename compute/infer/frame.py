"""Frames of the stage stream as bytes.

A frame is a big-endian u32 with the length of its header, a u32 with the length of its body, the header
(msgpack, an array whose first item names the kind), and the body: a step's hidden state as it lies in memory.
Both lengths are bounded before anything is buffered for them, and the body must be exactly what the
header's dtype and shape ask for.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import msgspec

from mycel.compute.infer.messages import CreditFrame, Frame, NoticeFrame, StepFrame, TokenFrame
from mycel.protocol.errors import RemoteProtocolError
from mycel.protocol.tensor import Tensor

HEADER_BYTES_MAX = 1 << 20
"""A header holds at most a prompt's token ids (up to five bytes each)."""
BODY_BYTES_MAX = 64 << 20
"""Hidden states of one step: 1024 rows of 16 384 float32."""

_LENGTHS = struct.Struct(">II")


class _StepHeader(msgspec.Struct, frozen=True, array_like=True, tag="s"):
    session: str
    epoch: int
    position: int
    count: int
    tokens: tuple[int, ...] | None
    dtype: str
    shape: tuple[int, ...]


_Header = _StepHeader | TokenFrame | CreditFrame | NoticeFrame
_decoder: msgspec.msgpack.Decoder[_Header] = msgspec.msgpack.Decoder(_Header)
_encoder = msgspec.msgpack.Encoder()


def encode_frame(frame: Frame) -> bytes:
    """The frame's bytes."""
    if not isinstance(frame, StepFrame):
        header = _encoder.encode(frame)
        return _LENGTHS.pack(len(header), 0) + header
    hidden = frame.hidden
    dtype, shape, body = ("", (), b"") if hidden is None else (hidden.dtype, hidden.shape, hidden.data)
    header = _encoder.encode(
        _StepHeader(frame.session, frame.epoch, frame.position, frame.count, frame.tokens, dtype, shape)
    )
    return b"".join((_LENGTHS.pack(len(header), memoryview(body).nbytes), header, body))


def decode_frame(header: bytes, body: bytes) -> Frame:
    """The frame of these parts. Raises `RemoteProtocolError` for anything else than a whole valid frame."""
    try:
        frame = _decoder.decode(header)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise RemoteProtocolError(f"stage frame: {error}") from None
    if not isinstance(frame, _StepHeader):
        if body:
            raise RemoteProtocolError(f"stage frame: {type(frame).__name__} with a body")
        return frame
    hidden = Tensor(frame.dtype, frame.shape, body).check() if frame.dtype else None
    if (hidden is None) == (frame.tokens is None) or (hidden is None and body):
        raise RemoteProtocolError("stage frame: a step carries either tokens or a hidden state")
    rows = len(frame.tokens) if hidden is None and frame.tokens is not None else frame.shape[:1]
    if frame.position < 0 or frame.count < 1 or rows not in (frame.count, (frame.count,)):
        raise RemoteProtocolError(f"stage frame: {frame.count} rows said at {frame.position}, {rows} came")
    return StepFrame(frame.session, frame.epoch, frame.position, frame.count, frame.tokens, hidden)


class FrameReader:
    """Cuts arriving bytes into frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes | bytearray | memoryview) -> Iterator[Frame]:
        """Frames completed by `data`. Raises `RemoteProtocolError`; the stream is then of no more use."""
        self._buffer += data
        at = 0
        try:
            while len(self._buffer) - at >= _LENGTHS.size:
                header_bytes, body_bytes = _LENGTHS.unpack_from(self._buffer, at)
                if header_bytes > HEADER_BYTES_MAX or body_bytes > BODY_BYTES_MAX:
                    raise RemoteProtocolError(f"stage frame of {header_bytes} + {body_bytes} bytes")
                body_at = at + _LENGTHS.size + header_bytes
                end = body_at + body_bytes
                if len(self._buffer) < end:
                    return
                with memoryview(self._buffer) as view:
                    header, body = bytes(view[at + _LENGTHS.size : body_at]), bytes(view[body_at:end])
                at = end
                yield decode_frame(header, body)
        finally:
            del self._buffer[:at]
