"""Frames: how messages of calls lie on a stream. Bytes in, frames out; no stream is touched here.

    0   u32  size      bytes after this head of 20
    4   u8   kind      see `FrameKind`
    5   u8   name      length of the method's name (requests; else 0)
    6   u16  raws      how many raw buffers (tensors) follow the body
    8   u64  call      the caller's number for the call, never used twice in its lifetime
    16  u32  deadline  milliseconds left (requests; 0xFFFFFFFF: no deadline; else 0)
    20  name, utf-8
        lengths        where there are raws: u32 of the body, u32 of each raw buffer
        body           one msgpack value, typed by the method
        raws           each at the next multiple of 16, counted from byte 20; gaps are not looked at

All numbers are big-endian. Raw buffers keep tensors out of msgpack: they are sent from where they lie and
handed over as views into the one buffer that the frame was received into, aligned for any dtype.

Two readers, for two ways to arrive. `split` takes what the connection's reader has in hand and borrows:
its frames point into that chunk and are good until the reader goes on; this is for small frames, many to a
chunk. `FrameReader` is for streams that carry one call: it owns what it returns, holds bytes back until they
are asked for (what it has not consumed is what the peer's window is short of), and receives a large frame
straight into the buffer that becomes its tensors.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Sequence

from mycel.protocol.errors import RemoteProtocolError
from mycel.protocol.mesh import Buffer

HEAD = struct.Struct(">IBBHQI")
HEAD_BYTES = HEAD.size
Head = tuple[int, int, int, int, int, int]
"""(size, kind, length of the name, raws, call, deadline in ms)."""
ALIGN = 16
SMALL_BYTES = 16 * 1024
"""A frame up to this size waits for its end in the reader's buffer; a larger one gets a buffer of its own."""

NO_DEADLINE = 0xFFFFFFFF
CALL_MAX = (1 << 64) - 1


class FrameKind(enum.IntEnum):
    """What a frame says."""

    REQUEST = 0  # caller: begin a call; body: the request, empty where items follow instead
    RESPONSE = 1  # server: the answer of a unary or client-streaming call
    ERROR = 2  # server: the call failed; body: [cause, kind, text]
    ITEM = 3  # either: one message of a stream
    END = 4  # either: no more items
    CANCEL = 5  # caller, on the shared stream: nobody waits for this call any more


KINDS = len(FrameKind)
REQUEST, RESPONSE, ERROR, ITEM, END, CANCEL = (int(kind) for kind in FrameKind)


class Frame:
    """One frame. `owned`: body and raws stay valid; else they are views into a chunk that will be reused."""

    __slots__ = ("body", "call", "deadline_ms", "kind", "name", "owned", "raws", "size")

    def __init__(
        self,
        head: Head,
        name: bytes,
        body: Buffer,
        raws: Sequence[memoryview],
        owned: bool,
    ) -> None:
        self.size, self.kind, _, _, self.call, self.deadline_ms = head
        self.name = name
        self.body = body
        self.raws = raws
        self.owned = owned


def pack(
    kind: int,
    call: int,
    body: Buffer = b"",
    raws: Sequence[Buffer] = (),
    *,
    name: bytes = b"",
    deadline_ms: int = 0,
) -> list[Buffer]:
    """A frame as buffers to send one after the other: head with body, then (gap,) raw buffer, ...

    The raw buffers are the caller's own, not copies. Raises `struct.error` for numbers out of range.
    """
    if not raws:
        return [
            b"".join((HEAD.pack(len(name) + len(body), kind, len(name), 0, call, deadline_ms), name, body))
        ]
    sizes = [memoryview(raw).nbytes for raw in raws]
    at = len(name) + 4 + 4 * len(sizes) + len(body)
    pieces: list[Buffer] = []
    for size, raw in zip(sizes, raws, strict=True):
        gap = -at % ALIGN
        pieces += (bytes(gap), raw)
        at += gap + size
    lengths = struct.pack(f">{len(sizes) + 1}I", len(body), *sizes)
    head = HEAD.pack(at, kind, len(name), len(sizes), call, deadline_ms)
    return _join_small([head, name, lengths, body, *pieces])


def _join_small(pieces: list[Buffer]) -> list[Buffer]:
    """The same bytes with runs of small pieces made one; large ones stay what they are, not copied."""
    parts: list[Buffer] = []
    run: list[Buffer] = []
    for piece in pieces:
        if len(piece) < SMALL_BYTES:
            run.append(piece)
            continue
        if run:
            parts.append(b"".join(run))
            run = []
        parts.append(piece)
    if run:
        parts.append(b"".join(run))
    return parts


def read_head(buffer: Buffer, at: int, size_max: int) -> Head:
    """The head at `at`. Raises `RemoteProtocolError` for a kind or a size that cannot be."""
    head: Head = HEAD.unpack_from(buffer, at)
    if head[1] >= KINDS:
        raise RemoteProtocolError(f"frame of unknown kind {head[1]}")
    if head[0] > size_max:
        raise RemoteProtocolError(f"frame of {head[0]} bytes, more than the {size_max} allowed here")
    return head


def read_rest(head: Head, rest: memoryview, owned: bool) -> Frame:
    """The frame behind `head`, whose `size` bytes are `rest`. Raises `RemoteProtocolError`."""
    named, count = head[2], head[3]
    if not count:
        if not named:
            return Frame(head, b"", rest, (), owned)
        if named > head[0]:
            raise RemoteProtocolError(f"frame of {head[0]} bytes with a name of {named}")
        return Frame(head, bytes(rest[:named]), rest[named:], (), owned)
    at = named + 4 + 4 * count
    if at > head[0]:
        raise RemoteProtocolError(f"frame of {head[0]} bytes cannot hold {count} lengths")
    body_size, *sizes = struct.unpack_from(f">{count + 1}I", rest, named)
    body = rest[at : at + body_size]
    at += body_size
    raws: list[memoryview] = []
    for size in sizes:
        at += -at % ALIGN
        raws.append(rest[at : at + size])
        at += size
    if at != head[0]:
        raise RemoteProtocolError(f"frame of {head[0]} bytes whose parts need {at}")
    return Frame(head, bytes(rest[:named]), body, raws, owned)


def split(chunk: memoryview, size_max: int) -> tuple[list[Frame], int]:
    """All whole frames at the front of `chunk`, borrowed, and how many bytes they take.

    Raises `RemoteProtocolError`; frames before the bad one are lost with it.
    """
    frames: list[Frame] = []
    at, end = 0, len(chunk)
    while end - at >= HEAD_BYTES:
        head = read_head(chunk, at, size_max)
        begin = at + HEAD_BYTES
        if begin + head[0] > end:
            break
        at = begin + head[0]
        frames.append(read_rest(head, chunk[begin:at], False))
    return frames, at


class FrameReader:
    """Reassembles the frames of one stream, handing each out when asked."""

    def __init__(self, size_max: int) -> None:
        self._size_max = size_max
        self._buffer = bytearray()
        self._head: Head | None = None
        self._own: bytearray | None = None  # where a large frame is received
        self._filled = 0
        self._used = 0

    def feed(self, chunk: Buffer) -> None:
        """Take what arrived. Copies it once."""
        if self._own is not None and not self._buffer:
            taken = min(len(chunk), len(self._own) - self._filled)
            self._own[self._filled : self._filled + taken] = chunk[:taken]
            self._filled += taken
            self._used += taken
            chunk = memoryview(chunk)[taken:]
        if len(chunk):
            self._buffer += chunk

    def head(self) -> Head | None:
        """(size, kind, name, raws, call, deadline) of the next frame, once it came; its rest may not have.

        Raises `RemoteProtocolError`.
        """
        if self._head is None and len(self._buffer) >= HEAD_BYTES:
            self._head = read_head(self._buffer, 0, self._size_max)
            self._take(HEAD_BYTES)
        return self._head

    def next(self) -> Frame | None:
        """The next frame, None while it is not whole. Raises `RemoteProtocolError`."""
        head = self.head()
        if head is None:
            return None
        size = head[0]
        if self._own is None:
            if len(self._buffer) < size <= SMALL_BYTES:
                return None
            if len(self._buffer) >= size:
                rest = bytes(memoryview(self._buffer)[:size])
                self._take(size)
                self._head = None
                return read_rest(head, memoryview(rest), True)
            self._own = bytearray(size)
            self._filled = len(self._buffer)
            self._own[: self._filled] = self._buffer
            self._take(self._filled)
        if self._filled < size:
            return None
        own, self._own, self._head = self._own, None, None
        return read_rest(head, memoryview(own), True)

    @property
    def is_empty(self) -> bool:
        """Whether no part of a frame is held: the one place where a stream may end."""
        return self._head is None and not self._buffer

    def used(self) -> int:
        """Bytes consumed since the last time asked: what the peer's window can be credited."""
        used, self._used = self._used, 0
        return used

    def _take(self, count: int) -> None:
        del self._buffer[:count]
        self._used += count
