"""Who signs: a node by its own key, a swarm by its root key, a ticket by its delegation key.

All three are Ed25519. A node's own key is `mycel.protocol.keys.OwnKey`, whose public half is its peer id in
libp2p's spelling; the other two are bare `SigningKey`s that nothing but certificates knows. Keys are made
from 32 seed bytes that the caller brings (`Network.entropy`), so a simulated world replays.

A key that signs for several purposes must never produce bytes that mean something for another purpose.
Whatever Mycel signs starts with a domain line (`in_domain`); no domain is a prefix of another, and none
collides with libp2p's own ("noise-libp2p-static-key:", "libp2p-peer-record").

Ed25519 as in RFC 8032; signatures are 64 bytes and deterministic.
"""

from __future__ import annotations

from collections.abc import Callable

import base58
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from mycel.protocol.keys import OwnKey, peer_id_bytes
from mycel.protocol.mesh import PeerId

SEED_BYTES = 32
PUBLIC_BYTES = 32
SIGNATURE_BYTES = 64
_ED25519_ID = bytes((0x00, 0x24, 0x08, 0x01, 0x12, 0x20))
"""How every Ed25519 peer id begins: identity multihash of 36 bytes, key type 1, 32 bytes of key."""


class SigningKey:
    """An Ed25519 private key. `repr` shows the public half only."""

    def __init__(self, seed: bytes) -> None:
        """Make the key of a 32-byte seed. Raises `ValueError` for another length."""
        if len(seed) != SEED_BYTES:
            raise ValueError(f"an Ed25519 seed has {SEED_BYTES} bytes, not {len(seed)}")
        self._private = Ed25519PrivateKey.from_private_bytes(seed)
        self.public = self._private.public_key().public_bytes_raw()

    @property
    def seed(self) -> bytes:
        """The 32 secret bytes this key is made of: for key files and tickets, never for logs."""
        return self._private.private_bytes_raw()

    def sign(self, data: bytes) -> bytes:
        """Signature (64 bytes) over `data`, which should begin with its domain."""
        return self._private.sign(data)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {base58.b58encode(self.public).decode()}>"


def generate_key(entropy: Callable[[int], bytes]) -> OwnKey:
    """A fresh key for a node, from 32 bytes of `entropy`."""
    return OwnKey(entropy(SEED_BYTES))


def public_of(peer: PeerId) -> bytes:
    """The Ed25519 public key (32 bytes) that a peer id spells.

    Raises `ValueError` for text that is no peer id, or one of another kind of key.
    """
    raw = peer_id_bytes(peer)
    if len(raw) != len(_ED25519_ID) + PUBLIC_BYTES or not raw.startswith(_ED25519_ID):
        raise ValueError(f"{peer} is not the peer id of an Ed25519 key")
    return raw[len(_ED25519_ID) :]


def in_domain(domain: str, payload: bytes) -> bytes:
    """The bytes to sign for `payload` in `domain` (words without a line break)."""
    return b"mycel " + domain.encode("ascii") + b"\n" + payload


def verify(public: bytes, data: bytes, signature: bytes) -> bool:
    """Whether `signature` over `data` is by the key with this public half. Never raises."""
    if len(public) != PUBLIC_BYTES or len(signature) != SIGNATURE_BYTES:
        return False
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, data)
    except (InvalidSignature, ValueError):
        return False
    return True


def verify_peer(peer: PeerId, data: bytes, signature: bytes) -> bool:
    """Whether `signature` over `data` is by `peer`'s key; False for a peer id without an Ed25519 key."""
    try:
        public = public_of(peer)
    except ValueError:
        return False
    return verify(public, data, signature)
