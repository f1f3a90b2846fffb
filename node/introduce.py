"""What two libp2p peers tell each other once connected: identify, its push, and ping.

These are the protocols that strangers may use (with the membership exchange and the farewell).
"""

from __future__ import annotations

import trio

from mycel.protocol import identify, multistream, varint
from mycel.protocol.errors import RemoteProtocolError
from mycel.protocol.identify import Identity
from mycel.protocol.keys import PublicKey
from mycel.protocol.mesh import Stream
from mycel.protocol.session import Session

PING = "/ipfs/ping/1.0.0"
PING_BYTES = 32
IDENTIFY_S = 10.0
"""How long a peer may take to send its identify message."""

FAREWELL = "/mycel/bye/1"
"""Says why a connection is about to be closed: a reason word, a newline, a sentence. No answer."""

FAREWELL_BYTES_MAX = 512


async def answer_ping(stream: Stream) -> None:
    """Echo 32 bytes until the peer has enough (libp2p specs/ping)."""
    while data := await stream.receive_some(PING_BYTES):
        if len(data) < PING_BYTES:
            data += await stream.receive_exactly(PING_BYTES - len(data))
        await stream.send(data)
    await stream.send_eof()


async def ping(stream: Stream, payload: bytes) -> float:
    """Seconds until `payload` (32 bytes) came back. Raises `RemoteProtocolError` when other bytes came."""
    began = trio.current_time()
    await stream.send(payload)
    if await stream.receive_exactly(PING_BYTES) != payload:
        raise RemoteProtocolError("a ping came back with other bytes than it went")
    took = trio.current_time() - began
    await stream.aclose()
    return took


async def read_identity(stream: Stream, sender: PublicKey) -> Identity:
    """The identify message on `stream`. Raises `RemoteProtocolError`, and as the stream does."""
    held = bytearray()
    while True:
        cut = varint.split_prefixed(held, identify.MESSAGE_BYTES_MAX)
        if cut is not None:
            break
        piece = await stream.receive_some()
        if not piece:
            raise RemoteProtocolError("identify ended in the middle of its message")
        held += piece
    await stream.aclose()
    return identify.read(cut[0], sender)


def say_farewell(session: Session, reason: str, text: str) -> None:
    """Queue a farewell, where a stream for it can be opened."""
    if session.can_open:
        channel = session.open()
        channel.prefix = multistream.proposal(FAREWELL)
        channel.try_send(f"{reason}\n{text}".encode()[:FAREWELL_BYTES_MAX], end=True)


def read_farewell(raw: bytes) -> tuple[str, str]:
    """Reason word and sentence of a farewell, cut and cleaned for logs."""
    word, _, text = raw[:FAREWELL_BYTES_MAX].decode(errors="replace").partition("\n")
    if word not in ("closed", "left", "refused", "protocol", "superseded"):
        word = "closed"
    return word, "the peer said: " + "".join(c if c.isprintable() else " " for c in text)
