"""Short exchanges of bytes, over a bare pipe (echoes, proofs) or over a stream."""

from __future__ import annotations

from mycel.protocol import varint
from mycel.protocol.errors import RemoteProtocolError
from mycel.protocol.mesh import Stream
from mycel.protocol.network import Pipe


async def send_all(pipe: Pipe, data: bytes) -> None:
    """Send all of `data`. Raises `PipeBroken`; a cancelled send may have sent a part."""
    view = memoryview(data)
    while view:
        count = pipe.try_send(view)
        view = view[count:]
        if not count:
            await pipe.wait_writable()


async def receive_exactly(pipe: Pipe, count: int) -> bytes:
    """Exactly `count` bytes. Raises `PipeBroken`; `RemoteProtocolError` when the pipe ends before them."""
    buffer = bytearray(count)
    view = memoryview(buffer)
    while view:
        got = pipe.try_recv_into(view)
        if got is None:
            await pipe.wait_readable()
        elif got == 0:
            raise RemoteProtocolError(f"the pipe ended {len(view)} bytes short of {count}")
        else:
            view = view[got:]
    return bytes(buffer)


async def receive_end(pipe: Pipe) -> None:
    """Park until the other end closes; whatever it sends is thrown away. Raises `PipeBroken`."""
    scratch = bytearray(256)
    while (got := pipe.try_recv_into(scratch)) != 0:
        if got is None:
            await pipe.wait_readable()


async def receive_prefixed(stream: Stream, limit: int) -> bytes:
    """The next message behind its length. Raises `RemoteProtocolError` where it is longer than `limit`."""
    head = b""
    while not head or head[-1] & 0x80:
        head += await stream.receive_exactly(1)
        if len(head) > varint.BYTES_MAX:
            break
    decoded = varint.decode(head)
    size = decoded[0] if decoded is not None else limit + 1
    if size > limit:
        raise RemoteProtocolError(f"a message longer than the {limit} bytes that are allowed")
    return await stream.receive_exactly(size)
