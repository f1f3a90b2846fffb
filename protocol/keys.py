"""Public keys and the peer ids made of them.

A libp2p peer id is a multihash of the key's protobuf encoding (libp2p spec, peer-ids.md). Keys of at most
42 encoded bytes stand in it whole (the identity multihash), so an Ed25519 peer id *is* its public key:

    0x00 0x24            identity multihash of 36 bytes
    0x08 0x01            field 1, key type 1 (Ed25519)
    0x12 0x20 <32 bytes> field 2, the key
"""

from __future__ import annotations

import base58

from mycel.protocol.errors import RemoteProtocolError
from mycel.protocol.mesh import PeerId

ED25519_PUBLIC_BYTES = 32
_PREFIX = bytes((0x00, 0x24, 0x08, 0x01, 0x12, 0x20))


def peer_id_of_ed25519(public: bytes) -> PeerId:
    """The peer id of an Ed25519 public key (32 bytes)."""
    if len(public) != ED25519_PUBLIC_BYTES:
        raise ValueError(f"an Ed25519 public key has {ED25519_PUBLIC_BYTES} bytes, not {len(public)}")
    return PeerId(base58.b58encode(_PREFIX + public).decode("ascii"))


def ed25519_of_peer_id(peer: str) -> bytes:
    """The Ed25519 public key (32 bytes) inside a peer id.

    Raises `RemoteProtocolError` for text that is no peer id, or one of another key type.
    """
    if len(peer) > 64:
        raise RemoteProtocolError(f"a peer id of {len(peer)} characters is too long")
    try:
        raw = base58.b58decode(peer)
    except ValueError as error:
        raise RemoteProtocolError(f"{peer!r} is not a peer id: {error}") from None
    if len(raw) != len(_PREFIX) + ED25519_PUBLIC_BYTES or not raw.startswith(_PREFIX):
        raise RemoteProtocolError(f"{peer!r} is not the peer id of an Ed25519 key")
    return raw[len(_PREFIX) :]
