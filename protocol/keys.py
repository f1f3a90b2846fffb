"""Keys and the peer ids made of them (libp2p specs/peer-ids).

A node's own key is Ed25519. Foreign libp2p peers may carry RSA, secp256k1 or ECDSA identity keys, so those
verify too. A peer id is the multihash of the serialized public key: the key itself ("identity") when it
is at most 42 bytes long, which Ed25519 keys are, else its SHA-256. Its text form is base58.
"""

from __future__ import annotations

import hashlib

import base58
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.serialization import load_der_public_key
from google.protobuf.message import DecodeError

from mycel.protocol.errors import RemoteProtocolError
from mycel.protocol.mesh import PeerId
from mycel.protocol.pb import crypto_pb2

KEY_BYTES_MAX = 4096
"""A serialized public key's bound: RSA with 8192 bits needs 1064 bytes."""

RSA_BITS_MIN = 2048
RSA_BITS_MAX = 8192
_INLINE_BYTES_MAX = 42
_IDENTITY = b"\x00"
_SHA256 = b"\x12\x20"


class PublicKey:
    """A peer's public key of any kind that libp2p knows."""

    __slots__ = ("_key", "peer_id", "serialized")

    def __init__(self, serialized: bytes) -> None:
        """Raises `RemoteProtocolError` for bytes that are no key, or one of a kind or size not accepted."""
        self._key = _load(serialized)
        self.serialized = serialized
        self.peer_id = _peer_id(serialized)

    def verify(self, data: bytes, signature: bytes) -> bool:
        """Whether `signature` over `data` is by this key."""
        key = self._key
        try:
            if isinstance(key, ed25519.Ed25519PublicKey):
                key.verify(signature, data)
            elif isinstance(key, rsa.RSAPublicKey):
                key.verify(signature, data, padding.PKCS1v15(), hashes.SHA256())
            else:
                key.verify(signature, data, ec.ECDSA(hashes.SHA256()))
        except InvalidSignature:
            return False
        return True


class OwnKey:
    """This node's Ed25519 key: it signs, and its public half is the node's peer id."""

    __slots__ = ("_key", "public", "seed")

    def __init__(self, seed: bytes) -> None:
        """`seed` is the 32-byte Ed25519 private key. Raises `ValueError` for another length."""
        self._key = ed25519.Ed25519PrivateKey.from_private_bytes(seed)
        self.seed = seed
        raw = self._key.public_key().public_bytes_raw()
        self.public = PublicKey(serialize(raw))

    @property
    def peer_id(self) -> PeerId:
        return self.public.peer_id

    def sign(self, data: bytes) -> bytes:
        """The 64-byte Ed25519 signature over `data`."""
        return self._key.sign(data)


def serialize(ed25519_public: bytes) -> bytes:
    """libp2p's serialized form of a raw 32-byte Ed25519 public key."""
    return crypto_pb2.PublicKey(Type=crypto_pb2.Ed25519, Data=ed25519_public).SerializeToString()


def key_of(peer: PeerId) -> PublicKey | None:
    """The key inside a peer id, None where the id holds only its hash.

    Raises `ValueError` for text that is no peer id, `RemoteProtocolError` for an inlined key that is none.
    """
    raw = peer_id_bytes(peer)
    if raw[:1] == _IDENTITY:
        return PublicKey(raw[2:])
    return None


def peer_id_bytes(peer: PeerId) -> bytes:
    """The multihash behind a peer id's text. Raises `ValueError` for text that is no peer id."""
    try:
        raw: bytes = base58.b58decode(peer)
    except ValueError as error:
        raise ValueError(f"{peer!r} is not a peer id: {error}") from None
    return check_peer_id(raw)


def check_peer_id(raw: bytes) -> bytes:
    """`raw` itself when it is a peer id's multihash. Raises `ValueError` otherwise."""
    inline = raw[:1] == _IDENTITY and 2 <= len(raw) <= 2 + _INLINE_BYTES_MAX and raw[1] == len(raw) - 2
    hashed = raw[:2] == _SHA256 and len(raw) == 34
    if not inline and not hashed:
        raise ValueError("not a peer id: neither an inlined key nor a SHA-256 multihash")
    return raw


def peer_id_text(raw: bytes) -> PeerId:
    """The text form of a peer id's multihash. Raises `ValueError` for bytes that are none."""
    text: bytes = base58.b58encode(check_peer_id(raw))
    return PeerId(text.decode("ascii"))


def _peer_id(serialized: bytes) -> PeerId:
    if len(serialized) <= _INLINE_BYTES_MAX:
        raw = _IDENTITY + bytes([len(serialized)]) + serialized
    else:
        raw = _SHA256 + hashlib.sha256(serialized).digest()
    return peer_id_text(raw)


_Key = ed25519.Ed25519PublicKey | ec.EllipticCurvePublicKey | rsa.RSAPublicKey


def _load(serialized: bytes) -> _Key:
    if len(serialized) > KEY_BYTES_MAX:
        raise RemoteProtocolError(f"a public key of {len(serialized)} bytes, more than {KEY_BYTES_MAX}")
    try:
        message = crypto_pb2.PublicKey.FromString(serialized)
        return _load_kind(message.Type, message.Data)
    except (DecodeError, ValueError, UnsupportedAlgorithm) as error:
        raise RemoteProtocolError(f"not a public key: {error}") from None


def _load_kind(kind: int, data: bytes) -> _Key:
    if kind == crypto_pb2.Ed25519:
        return ed25519.Ed25519PublicKey.from_public_bytes(data)
    if kind == crypto_pb2.Secp256k1:
        return ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256K1(), data)
    key = load_der_public_key(data)
    if kind == crypto_pb2.ECDSA and isinstance(key, ec.EllipticCurvePublicKey):
        return key
    if kind == crypto_pb2.RSA and isinstance(key, rsa.RSAPublicKey):
        if not RSA_BITS_MIN <= key.key_size <= RSA_BITS_MAX:
            raise ValueError(f"RSA with {key.key_size} bits, not {RSA_BITS_MIN} to {RSA_BITS_MAX}")
        return key
    raise ValueError("the key is of another kind than it says")
