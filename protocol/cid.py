"""Content identifiers: the name of a block is the hash of its bytes, so a name can be checked by anybody.

A CID here is version 1, codec raw, multihash sha2-256 of 32 bytes (CIDv1 and multihash specifications of
multiformats): 36 bytes, or as text 59 characters of base32 that begin with "bafkrei". Other kinds are
refused: one block has one name.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from typing import NewType

from mycel.protocol.errors import RemoteProtocolError
from mycel.protocol.mesh import Buffer

Cid = NewType("Cid", bytes)
"""A content identifier in its binary form."""

PREFIX = b"\x01\x55\x12\x20"
"""CID version 1, raw bytes, sha2-256, 32 bytes of it."""
CID_BYTES = len(PREFIX) + 32
TEXT_CHARS = 59


def cid_of(data: Buffer) -> Cid:
    """The name of `data`."""
    return Cid(PREFIX + hashlib.sha256(data).digest())


def cid_from(raw: bytes) -> Cid:
    """`raw` as a CID, checked. Raises `RemoteProtocolError`."""
    if len(raw) != CID_BYTES or not raw.startswith(PREFIX):
        raise RemoteProtocolError(f"{raw[:8].hex()}... ({len(raw)} bytes) is no CID of a raw sha2-256 block")
    return Cid(raw)


def cids_from(packed: bytes) -> list[Cid]:
    """CIDs that stand one after another in `packed`. Raises `RemoteProtocolError`."""
    if len(packed) % CID_BYTES:
        raise RemoteProtocolError(f"a list of CIDs of {CID_BYTES} bytes each has {len(packed)} bytes")
    return [cid_from(packed[at : at + CID_BYTES]) for at in range(0, len(packed), CID_BYTES)]


def cid_text(cid: Cid) -> str:
    """`cid` in base32 (multibase "b")."""
    return "b" + base64.b32encode(cid).decode("ascii").rstrip("=").lower()


def parse_cid(text: str) -> Cid:
    """The CID that `text` spells. Raises `RemoteProtocolError` where it spells none, or not so."""
    try:
        raw = base64.b32decode(text[1:].upper() + "=" * (-(len(text) - 1) % 8))
    except (binascii.Error, ValueError):
        raw = b""
    if len(raw) != CID_BYTES or not raw.startswith(PREFIX) or cid_text(Cid(raw)) != text:
        raise RemoteProtocolError(
            f"{text[:80]!r} is no CID: it is {TEXT_CHARS} characters beginning with bafkrei"
        )
    return Cid(raw)
