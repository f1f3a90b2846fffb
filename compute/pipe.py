"""What a daemon and its worker process say to each other, over a socket pair.

Frames are those of the wire (`mycel.protocol.frame`), messages those of calls (`mycel.protocol.message`):
msgpack checked against its type on arrival, tensors behind it as raw bytes. The daemon asks (REQUEST with a
number), the worker answers with that number: any number of ITEMs (progress), then a RESPONSE or an ERROR
whose body is a `Failure`. The worker's first frame is its `Hello`, number 0. One request is served at a
time, in order; an answer that nobody waits for any more is recognised by its number and dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

import msgspec

from mycel.compute.engine import Done, EngineStats, ModelCard, StageInfo, StageSpec, Work
from mycel.protocol.frame import HEAD_BYTES, Frame, read_head, read_rest
from mycel.protocol.mesh import Buffer
from mycel.protocol.message import Codec

PIPE_BYTES_MAX = 1 << 30
"""Largest frame: a step of 4 096 rows of 16 384 float32 is a quarter of it."""
SMALL_BYTES = 64 * 1024
"""Frames up to half of this are cut from one buffer; larger ones are received where they stay."""
GATHER_MAX = 512
"""Buffers in one sendmsg; Linux takes 1 024."""

Req = TypeVar("Req")
Res = TypeVar("Res")


class Operation(Generic[Req, Res]):
    """One thing that a worker can be asked."""

    def __init__(self, name: str, request: type[Req], response: type[Res]) -> None:
        self.name = name.encode()
        self.request = Codec(request)
        self.response = Codec(response)


class Rewind(msgspec.Struct, frozen=True):
    """Cut `session`'s cache back to rows [0:position)."""

    session: str
    position: int


class Nothing(msgspec.Struct, frozen=True):
    """No news."""


class Progress(msgspec.Struct, frozen=True):
    """How far a load is."""

    fraction: float
    what: str


class TorchDevice(msgspec.Struct, frozen=True):
    """A device that torch can use."""

    name: str
    """What `StageSpec.device` takes: cpu, cuda:0, ..."""
    description: str
    memory_bytes: int
    memory_free_bytes: int


class Hello(msgspec.Struct, frozen=True):
    """A worker is up."""

    pid: int
    torch: str
    """torch's version."""
    devices: tuple[TorchDevice, ...]
    start_s: float
    """From the process's birth to here: mostly importing torch and transformers."""


class Failure(msgspec.Struct, frozen=True):
    """Why a request failed.

    `kind`: "unsupported", "missing" (no such model), "value" (the request makes no sense), "order" (no
    stage is loaded); after "memory" and "crash" the worker exits, because what it holds is in doubt.
    """

    kind: str
    text: str


DESCRIBE = Operation("describe", str, ModelCard)
TOKENIZER_FILES = Operation("tokenizer_files", str, dict[str, bytes])
LOAD = Operation("load", StageSpec, StageInfo)
STEP = Operation("step", list[Work], list[Done])
REWIND = Operation("rewind", Rewind, Nothing)
FORGET = Operation("forget", str, Nothing)
STATS = Operation("stats", Nothing, EngineStats)

HELLO = Codec(Hello)
FAILURE = Codec(Failure)
PROGRESS = Codec(Progress)


class FrameReceiver:
    """Reassembles frames from a socket's `recv_into`: offer `room()`, say `got(n)`, take `next()`.

    A large frame is received straight into the buffer that its tensors will be views of. Frames own their
    (writable) memory. A receive that was given up midway loses nothing: the next one goes on.
    """

    def __init__(self, size_max: int = PIPE_BYTES_MAX) -> None:
        self._size_max = size_max
        self._buffer = memoryview(bytearray(SMALL_BYTES))
        self._start = self._end = 0
        self._large: memoryview | None = None
        self._large_head = (0, 0, 0, 0, 0, 0)
        self._filled = 0

    def room(self) -> memoryview:
        """Where the next bytes belong; never empty after `next` gave None."""
        if self._large is not None:
            return self._large[self._filled :]
        if self._start == self._end:
            self._start = self._end = 0
        elif self._end == SMALL_BYTES:
            rest = self._end - self._start
            self._buffer[:rest] = bytes(self._buffer[self._start : self._end])
            self._start, self._end = 0, rest
        return self._buffer[self._end :]

    def got(self, count: int) -> None:
        """`count` bytes were put at the front of `room()`."""
        if self._large is not None:
            self._filled += count
        else:
            self._end += count

    def next(self) -> Frame | None:
        """The next whole frame, None while it is not whole. Raises `RemoteProtocolError` for garbage."""
        if self._large is not None:
            if self._filled < len(self._large):
                return None
            large, self._large = self._large, None
            return read_rest(self._large_head, large, True)
        held = self._end - self._start
        if held < HEAD_BYTES:
            return None
        head = read_head(self._buffer, self._start, self._size_max)
        begin, end = self._start + HEAD_BYTES, self._start + HEAD_BYTES + head[0]
        if end <= self._end:
            self._start = end
            return read_rest(head, memoryview(bytearray(self._buffer[begin:end])), True)
        if end - self._start > SMALL_BYTES // 2:
            self._large, self._large_head = memoryview(bytearray(head[0])), head
            self._filled = self._end - begin
            self._large[: self._filled] = self._buffer[begin : self._end]
            self._start = self._end = 0
        return None


def advance(parts: Sequence[Buffer], sent: int) -> list[Buffer]:
    """What is left to send of `parts` after `sent` bytes of them went out."""
    rest: list[Buffer] = []
    for part in parts:
        size = memoryview(part).nbytes
        if sent >= size:
            sent -= size
        else:
            rest.append(memoryview(part).cast("B")[sent:] if sent else part)
            sent = 0
    return rest
