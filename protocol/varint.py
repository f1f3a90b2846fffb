"""Unsigned varints as multiformats writes them: seven bits a byte, lowest first, minimal length.

Both decoders raise `RemoteProtocolError`, for their bytes come from a peer.
"""

from __future__ import annotations

from mycel.protocol.errors import RemoteProtocolError

BYTES_MAX = 9
"""Bytes of the longest varint (63 bits), multiformats' own bound."""


def encode(value: int) -> bytes:
    """`value` (0 to 2**63 - 1) as a varint."""
    if not 0 <= value < 1 << 63:
        raise ValueError(f"a varint holds 0 to 2**63 - 1, not {value}")
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def decode(data: bytes | bytearray | memoryview, offset: int = 0) -> tuple[int, int] | None:
    """The varint at `offset` and the offset after it; None when `data` ends inside it.

    Raises `RemoteProtocolError` for one that is too long or not minimal.
    """
    value = 0
    for count in range(BYTES_MAX):
        if offset + count >= len(data):
            return None
        byte = data[offset + count]
        value |= (byte & 0x7F) << (7 * count)
        if byte < 0x80:
            if byte == 0 and count:
                raise RemoteProtocolError("a varint is longer than it needs to be")
            return value, offset + count + 1
    raise RemoteProtocolError(f"a varint is longer than {BYTES_MAX} bytes")


def prefixed(data: bytes) -> bytes:
    """`data` behind its length."""
    return encode(len(data)) + data


def split_prefixed(data: bytes | bytearray | memoryview, limit: int) -> tuple[bytes, int] | None:
    """The length-prefixed message at the front of `data` and the offset after it; None while incomplete.

    Raises `RemoteProtocolError` when it says to be longer than `limit` bytes.
    """
    head = decode(data)
    if head is None:
        return None
    size, start = head
    if size > limit:
        raise RemoteProtocolError(f"a message of {size} bytes where at most {limit} are allowed")
    if len(data) < start + size:
        return None
    return bytes(data[start : start + size]), start + size
