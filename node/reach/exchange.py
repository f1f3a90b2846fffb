"""Short exchanges of bytes over a bare pipe, without a connection core: echoes and proofs."""

from __future__ import annotations

from mycel.protocol.errors import RemoteProtocolError
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
