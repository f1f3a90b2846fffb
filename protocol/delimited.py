"""Reading one message behind its length (a varint) from a stream that goes on with something else.

libp2p's small protocols talk so: circuit relay, DCUtR, identify. Not a byte behind the message is taken.
"""

from __future__ import annotations

from mycel.protocol import varint
from mycel.protocol.errors import RemoteProtocolError
from mycel.protocol.mesh import Stream


async def receive_prefixed(stream: Stream, limit: int) -> bytes:
    """The next message of at most `limit` bytes. Raises `RemoteProtocolError`, and as the stream does."""
    head = b""
    while (cut := varint.decode(head)) is None:
        byte = await stream.receive_some(1)
        if not byte:
            raise RemoteProtocolError("the stream ended before a whole message came")
        head += byte
    if cut[0] > limit:
        raise RemoteProtocolError(f"a message of {cut[0]} bytes where at most {limit} are allowed")
    return await stream.receive_exactly(cut[0])
