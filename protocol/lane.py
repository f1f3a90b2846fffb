"""The seam beside the mesh for bulk bytes: parcels of arrays between peers, fast, and off the trio thread.

`Lanes` carries parcels. In `mycel.node.lanes` they are sockets of their own between two peers, keyed through
the authenticated connection and driven by threads; `mycel.compute.collective.streams` is the twin over the
mesh's own streams, for simulated worlds and for peers that no socket reaches. What is sent when is decided
by whoever hands parcels over, and is the same over both.

A frame is a head and a body:

    op       16 bytes   which operation, a digest over all that describes it, epoch and tag included
    kind      1 byte    PART, READY or GONE
    phase     1 byte    )
    part      2 bytes   )  which piece of the array a PART is; what they mean is the operation's business
    chunk     4 bytes   )
    length    4 bytes   of the body

READY says that its sender takes parts of the operation from now on; nothing is sent before, so that nothing
has to be kept for operations that did not begin yet. GONE says that its sender gave it up.

A parcel's body is memory that an operation works in. `Gate` is what keeps the two apart: carriers read and
write such memory only between `enter` and `leave`, and never wait for the network in between, so that closing
a gate takes no longer than sealing a chunk.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from mycel.protocol.errors import RemoteProtocolError
from mycel.protocol.mesh import PeerId

PART = 0
READY = 1
GONE = 2

_HEAD = struct.Struct(">16sBBHII")
HEAD_BYTES = _HEAD.size
OP_BYTES = 16


class Head(NamedTuple):
    """What stands before a body."""

    op: bytes
    kind: int
    phase: int = 0
    part: int = 0
    chunk: int = 0
    length: int = 0

    def pack(self) -> bytes:
        """The `HEAD_BYTES` bytes on the wire."""
        return _HEAD.pack(*self)

    @classmethod
    def unpack(cls, data: bytes | bytearray | memoryview, longest: int) -> Head:
        """Read a head. Raises `RemoteProtocolError` for an unknown kind or a body of more than `longest`."""
        head = cls._make(_HEAD.unpack(data))
        if head.kind > GONE:
            raise RemoteProtocolError(f"a bulk frame of unknown kind {head.kind}")
        if head.length > longest:
            raise RemoteProtocolError(f"a bulk frame of {head.length} bytes; the longest has {longest}")
        return head


class Gate(Protocol):
    """Stands before memory that an operation works in."""

    def enter(self) -> bool:
        """Whether the memory may be used now, until `leave`. False for ever once the gate was closed."""

    def leave(self) -> None:
        """The memory is not used any more."""

    @property
    def is_closed(self) -> bool:
        """Whether nobody may enter any more."""


@dataclass(slots=True, eq=False)
class Parcel:
    """A part for `peer`. `fill` gives its body, `head.length` bytes, and is called within the gate only; None
    where there is nothing to send any more.

    Parcels that follow from what came go before those that do not: what others wait for, and what is still in
    this core's cache.
    """

    peer: PeerId
    head: Head
    fill: Callable[[], memoryview | None]
    gate: Gate
    is_answer: bool = False
    """Whether it follows from what came."""


class Body(Protocol):
    """The body of a frame that has arrived whole, still sealed. One of the two is called, at most once.

    Both raise `RemoteProtocolError` where it is not what its sender had sealed.
    """

    def open(self) -> memoryview:
        """The bytes, in the carrier's own memory: valid until `Taker.take` returns."""

    def open_into(self, place: memoryview) -> None:
        """Put the bytes into `place`, which has as many. What stands there after an error is anything."""


class Taker(Protocol):
    """Takes what arrives."""

    def take(self, peer: PeerId, head: Head, body: Body) -> None:
        """A frame of `peer`, in whatever thread carries it. Errors of the body are passed on."""

    def lost(self, peer: PeerId, why: str) -> None:
        """Nothing can be sent to `peer` any more, until the next `reach`. In trio's thread."""


class Lanes(Protocol):
    """Carries parcels between peers, each whole and once, in no particular order, or says `lost`."""

    def attach(self, taker: Taker) -> None:
        """Give what arrives to `taker` from now on."""

    async def reach(self, peer: PeerId) -> None:
        """See to it that bulk can be sent to `peer` as fast as there is a way. Raises `ConnectionLost`."""

    def send(self, parcel: Parcel) -> None:
        """Send a parcel when its turn comes. Never blocks, never raises; from any thread."""

    def tell(self, peer: PeerId, head: Head, body: bytes) -> None:
        """Send a control frame. Never blocks, never raises; in trio's thread only."""

    def moved(self, peer: PeerId) -> int:
        """Bytes that came from `peer` so far: whether it still moves."""

    def rate(self, peer: PeerId) -> float | None:
        """Bytes a second that this node measured towards `peer`, None before the first bulk."""
