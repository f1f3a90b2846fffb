"""Frames on a lane's socket, sealed and opened in large pieces. Pure: keys and buffers, no socket.

A lane carries frames one way. Sealed, a frame is

    the head (28 bytes) and its tag (16), then the body and its tag (16), if it has one

each by AES-128-GCM under the lane's key. The nonce counts what was sealed, from 0, so nothing can be left
out, doubled or moved; the head is the body's associated data. The operation that the head names stands for
epoch, tag and all else that describes it. A head is opened before anything in it is believed.

*Why not TLS?* Its records are 16 KiB, and each costs a call. A chunk of 1 MiB costs one.

Without encryption a frame is its head and its body. Who is at the other end was proven when the lane was set
up, and nothing after: whoever can change packets on the way can change items.

Keys: HKDF-SHA-256 over two fresh shares of 32 bytes that went over the authenticated connection, the
sender's first; `info` names both peers and the lane.
"""

from __future__ import annotations

import hmac
import struct
from dataclasses import dataclass

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from mycel.protocol.errors import RemoteProtocolError
from mycel.protocol.lane import HEAD_BYTES, Head
from mycel.protocol.mesh import PeerId

SHARE_BYTES = 32
TOKEN_BYTES = 16
MARK_BYTES = 16
HELLO_BYTES = TOKEN_BYTES + 1 + MARK_BYTES
TAG_BYTES = 16
BODY_BYTES_MAX = 4 << 20
"""The longest part; `LaneLimits.chunk_bytes` of all members stay below."""

_NONCE = struct.Struct("<4xQ")


@dataclass(frozen=True, slots=True)
class LaneKeys:
    """What one lane is sealed with, and what shows that a socket is it."""

    cipher: bytes
    hello: bytes

    def mark(self, word: bytes, token: bytes) -> bytes:
        """`MARK_BYTES` bytes that only the two ends can say; `word` is who says them."""
        return hmac.digest(self.hello, word + token, "sha256")[:MARK_BYTES]


def derive_keys(shares: tuple[bytes, bytes], sender: PeerId, receiver: PeerId, lane: int) -> LaneKeys:
    """The keys of lane number `lane` between two peers; `shares` are the sender's and the other's."""
    info = b"mycel lane 1\n" + f"{sender}\n{receiver}\n{lane}".encode()
    made = HKDF(algorithm=SHA256(), length=48, salt=None, info=info).derive(shares[0] + shares[1])
    return LaneKeys(made[:16], made[16:])


class Sealer:
    """Frames into bytes for the socket."""

    def __init__(self, key: bytes | None) -> None:
        """`key` None: without encryption."""
        self._cipher = None if key is None else AESGCM(key)
        self._count = 0
        self._buffer = memoryview(bytearray(0))

    @property
    def is_plain(self) -> bool:
        """Whether frames are not encrypted, so that what `seal` returns of a body is the body itself."""
        return self._cipher is None

    def seal(self, head: Head, body: memoryview) -> tuple[bytes, memoryview]:
        """The frame's bytes, head and body. The latter stand in this object's own buffer until the next call,
        or, without encryption, where they stood."""
        plain = head.pack()
        if body.nbytes != head.length:
            raise RemoteProtocolError(f"a body of {body.nbytes} bytes under a head of {head.length}")
        if self._cipher is None:
            return plain, body
        sealed = self._cipher.encrypt(self._nonce(), plain, None)
        if not head.length:
            return sealed, self._buffer[:0]
        whole = head.length + TAG_BYTES
        if len(self._buffer) < whole:
            self._buffer = memoryview(bytearray(whole))
        self._cipher.encrypt_into(self._nonce(), body, plain, self._buffer[:whole])
        return sealed, self._buffer[:whole]

    def _nonce(self) -> bytes:
        self._count += 1
        return _NONCE.pack(self._count - 1)


class Opener:
    """Bytes from the socket into frames."""

    def __init__(self, key: bytes | None) -> None:
        """`key` None: without encryption."""
        self._cipher = None if key is None else AESGCM(key)
        self._count = 0
        self.head_bytes = HEAD_BYTES + (TAG_BYTES if key is not None else 0)
        """Bytes of a head on the socket."""

    def open_head(self, data: memoryview) -> Head:
        """Raises `RemoteProtocolError` unless it is the next head that was sealed."""
        if self._cipher is None:
            return Head.unpack(data, BODY_BYTES_MAX)
        try:
            plain = self._cipher.decrypt(_NONCE.pack(self._count), bytes(data), None)
        except InvalidTag:
            raise RemoteProtocolError("a head on the lane is not what its sender sealed") from None
        self._count += 1
        return Head.unpack(plain, BODY_BYTES_MAX)

    def body_bytes(self, head: Head) -> int:
        """Bytes of its body on the socket."""
        return head.length + (TAG_BYTES if self._cipher is not None and head.length else 0)

    def body(self, head: Head, data: memoryview) -> LaneBody:
        """Its body, which has arrived in `data`. Once for each head, opened or not."""
        nonce = _NONCE.pack(self._count)
        if head.length:
            self._count += 1
        return LaneBody(self._cipher, nonce, head, data)


class LaneBody:
    """`mycel.protocol.lane.Body` in a lane's receive buffer."""

    __slots__ = ("_cipher", "_data", "_head", "_nonce")

    def __init__(self, cipher: AESGCM | None, nonce: bytes, head: Head, data: memoryview) -> None:
        self._cipher = cipher
        self._nonce = nonce
        self._head = head
        self._data = data

    def open(self) -> memoryview:
        """See `Body.open`: deciphered where it stands."""
        place = self._data[: self._head.length]
        if self._cipher is not None:
            self._decipher(place)
        return place

    def open_into(self, place: memoryview) -> None:
        """See `Body.open_into`."""
        if self._cipher is None:
            place[:] = self._data[: self._head.length]
        else:
            self._decipher(place)

    def _decipher(self, place: memoryview) -> None:
        if not self._head.length or self._cipher is None:
            return
        try:
            self._cipher.decrypt_into(self._nonce, self._data, self._head.pack(), place)
        except InvalidTag:
            raise RemoteProtocolError("a chunk on the lane is not what its sender sealed") from None
