"""What is said on a `/mycel/block/1` stream.

A message is its length in 4 bytes, big endian, and msgpack of [kind, CIDs one after another, size]. Who
opened the stream asks, the other answers:

    want    blocks that would be welcome; answered by `have` for those here now, and for others when they come
    get     send these, in this order
    back    of these, send what is not on its way yet no more
    have    these are here
    gone    these are not sent: not here, or taken back
    block   the one block named, `size` bytes, which follow the message

Every `get` of a block is answered by its `block` or by `gone`, once.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import msgspec

from mycel.protocol.cid import Cid, cids_from
from mycel.protocol.errors import RemoteProtocolError
from mycel.protocol.limits import DEFAULT_BLOCK_LIMITS
from mycel.protocol.mesh import Stream

BLOCK_PROTOCOL = "/mycel/block/1"
Kind = Literal["want", "get", "back", "have", "gone", "block"]


class _Frame(msgspec.Struct, frozen=True, array_like=True):
    kind: Kind
    cids: bytes
    size: int = 0


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Frame)


def write(kind: Kind, cids: Iterable[Cid], size: int = 0) -> bytes:
    """One message."""
    packed = _encoder.encode(_Frame(kind, b"".join(cids), size))
    return len(packed).to_bytes(4, "big") + packed


async def read(stream: Stream) -> tuple[Kind, list[Cid], int] | None:
    """The next message, None at the end of the stream.

    Raises `RemoteProtocolError` for what is none, and as `Stream.receive_some` does.
    """
    first = await stream.receive_some(1)
    if not first:
        return None
    size = int.from_bytes(first + await stream.receive_exactly(3), "big")
    if size > DEFAULT_BLOCK_LIMITS.message_bytes:
        raise RemoteProtocolError(f"a block message of {size} bytes is too long")
    return parse(await stream.receive_exactly(size))


def parse(packed: bytes) -> tuple[Kind, list[Cid], int]:
    """What a message says. Raises `RemoteProtocolError`."""
    try:
        frame = _decoder.decode(packed)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise RemoteProtocolError(f"block message: {error}") from None
    cids = cids_from(frame.cids)
    if frame.kind == "block" and (len(cids) != 1 or not 0 <= frame.size <= DEFAULT_BLOCK_LIMITS.block_bytes):
        raise RemoteProtocolError(f"a block of {frame.size} bytes with {len(cids)} names")
    return frame.kind, cids, frame.size
