"""Noise transport messages, sealed and opened in place (libp2p specs/noise, "Wire format").

A transport message is a two-byte length and up to 65535 bytes of ciphertext, the last 16 of them the tag. The
cost of a cipher in Python is not the cipher but copies and calls, so plaintext is written straight into the
output buffer, behind the room for its length, and encrypted where it stands; one buffer holds four full
messages and goes to the pipe in one call. Opening decrypts within the receive buffer the same way.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from mycel.protocol.errors import RemoteProtocolError

LENGTH = 2
TAG = 16
CIPHERTEXT_MAX = 65535
PLAINTEXT_MAX = CIPHERTEXT_MAX - TAG
MESSAGES = 4
NESTED_PLAINTEXT_MAX = PLAINTEXT_MAX - TAG - LENGTH - 12
"""Plaintext of a message that just fills a yamux frame which just fills a message: for a connection that runs
within a stream of another one, so that each of its messages is one frame and one message all the way."""

CAPACITY = MESSAGES * (LENGTH + CIPHERTEXT_MAX)
"""Bytes of an output buffer: what one `send` hands to the pipe at most."""

_SIZE = struct.Struct(">H")
_NONCE = struct.Struct("<4xQ")


class Outlet:
    """Plaintext in, sealed messages out, through one buffer that exists only while it holds something.

    Layout: [begin:sealed) are whole messages not yet handed to the pipe; the open message starts at `sealed`
    and its plaintext is [sealed + 2 : tail).
    """

    __slots__ = (
        "_begin",
        "_buffer",
        "_cipher",
        "_limit",
        "_most",
        "_nonce",
        "_sealed",
        "_spare",
        "_tail",
        "_view",
    )

    def __init__(self, key: bytes, spare: list[bytearray], most: int = PLAINTEXT_MAX) -> None:
        """`spare` is a stock of buffers of `CAPACITY` bytes, shared by the connections of one node; `most` is
        the plaintext of one message."""
        self._most = most
        self._cipher = ChaCha20Poly1305(key)
        self._nonce = 0
        self._spare = spare
        self._buffer: bytearray | None = None
        self._view = memoryview(b"")
        self._begin = self._sealed = 0
        self._tail = LENGTH
        self._limit = LENGTH + most

    def room(self) -> int:
        """Plaintext bytes that still fit into the open message (0: none, and no further message fits)."""
        return self._limit - self._tail

    def make_room(self, count: int) -> bool:
        """Whether `count` bytes fit into the open message; it is closed where only the next may have room."""
        if self._tail + count > self._limit:
            self.seal()
        return self._tail + count <= self._limit

    def reserve(self, count: int) -> tuple[memoryview, int]:
        """The buffer and the offset where the caller writes `count` bytes now (`count` <= `room()`)."""
        if self._buffer is None:
            self._buffer = self._spare.pop() if self._spare else bytearray(CAPACITY)
            self._view = memoryview(self._buffer)
        offset = self._tail
        self._tail = offset + count
        return self._view, offset

    def seal(self) -> None:
        """Close the open message, if it holds anything, and open the next one."""
        start = self._sealed + LENGTH
        tail = self._tail
        if tail == start:
            return
        end = tail + TAG
        view = self._view
        self._cipher.encrypt_into(_NONCE.pack(self._nonce), view[start:tail], None, view[start:end])
        self._nonce += 1
        _SIZE.pack_into(view, self._sealed, end - start)
        self._sealed = end
        self._tail = end + LENGTH
        self._limit = max(min(self._tail + self._most, CAPACITY - TAG), self._tail)

    def outgoing(self) -> memoryview:
        """Sealed bytes that wait for the pipe."""
        return self._view[self._begin : self._sealed]

    def sent(self, count: int) -> bool:
        """The pipe took `count` bytes; True where those were all."""
        self._begin += count
        is_empty = self._begin == self._sealed and self._tail == self._sealed + LENGTH
        if is_empty and self._buffer is not None:
            if len(self._spare) < SPARE_MAX:
                self._spare.append(self._buffer)
            self._view = memoryview(b"")
            self._buffer = None
            self._begin = self._sealed = 0
            self._tail = LENGTH
            self._limit = LENGTH + self._most
        return is_empty


SPARE_MAX = 8
"""Output buffers kept for reuse by one node."""


class Opener:
    """Received bytes in, plaintext out, a message at a time."""

    __slots__ = ("_cipher", "_held", "_nonce")

    def __init__(self, key: bytes) -> None:
        self._cipher = ChaCha20Poly1305(key)
        self._nonce = 0
        self._held = bytearray()

    def receive(self, data: memoryview, take: Callable[[memoryview], None]) -> None:
        """Open every complete message in `data` (writable; decrypted in place) and hand it to `take`.

        An incomplete message is kept, at most 65537 bytes. Raises `RemoteProtocolError` when a message does
        not authenticate.
        """
        offset = 0
        size = len(data)
        held = self._held
        if held:
            offset = self._complete(data)
            if offset < 0:
                return
            whole = memoryview(held)
            self._held = bytearray()
            self._open(whole, LENGTH, len(whole), take)
        while size - offset >= LENGTH:
            end = offset + LENGTH + (data[offset] << 8 | data[offset + 1])
            if end > size:
                break
            self._open(data, offset + LENGTH, end, take)
            offset = end
        if offset < size:
            self._held += data[offset:]

    def _complete(self, data: memoryview) -> int:
        """Move what the held message lacks from `data`; returns how much, -1 when it is still incomplete."""
        held = self._held
        moved = 0
        if len(held) < LENGTH:
            moved = min(LENGTH - len(held), len(data))
            held += data[:moved]
            if len(held) < LENGTH:
                return -1
        lacking = LENGTH + (held[0] << 8 | held[1]) - len(held)
        piece = data[moved : moved + lacking]
        held += piece
        return moved + lacking if len(piece) == lacking else -1

    def _open(self, data: memoryview, start: int, end: int, take: Callable[[memoryview], None]) -> None:
        if end - start < TAG:
            raise RemoteProtocolError(f"a Noise message of {end - start} bytes, shorter than its tag")
        plain = data[start : end - TAG]
        try:
            self._cipher.decrypt_into(_NONCE.pack(self._nonce), data[start:end], None, plain)
        except InvalidTag:
            raise RemoteProtocolError("a Noise message does not authenticate") from None
        self._nonce += 1
        take(plain)
