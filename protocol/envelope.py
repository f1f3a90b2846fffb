"""Signed envelopes (libp2p RFC 0002): a payload, what kind it is, and its author's signature.

What is signed is `domain`, payload type and payload, each behind its length, so that a signature made for one
purpose is worth nothing for another. Peer records (`mycel.protocol.identify`) and relay vouchers
(`mycel.protocol.relay`) travel so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from google.protobuf.message import DecodeError, EncodeError

from mycel.protocol import varint
from mycel.protocol.errors import RemoteProtocolError
from mycel.protocol.keys import PublicKey
from mycel.protocol.pb import record_pb2

Sign = Callable[[bytes], bytes]
"""Signs bytes with a node's own key (`OwnKey.sign`, `Mesh.sign`)."""


@dataclass(frozen=True, slots=True)
class Kind:
    """What an envelope holds."""

    domain: bytes
    payload_type: bytes
    """The multicodec of the payload."""
    name: str
    """For people: "peer record"."""


def seal(public: PublicKey, sign: Sign, kind: Kind, payload: bytes) -> bytes:
    """`payload` in an envelope of the owner of `public`, who signs with `sign`."""
    envelope = record_pb2.Envelope(
        payload_type=kind.payload_type, payload=payload, signature=sign(_signed(kind, payload))
    )
    envelope.public_key.ParseFromString(public.serialized)
    return envelope.SerializeToString()


def open_sealed(raw: bytes, kind: Kind) -> tuple[PublicKey, bytes]:
    """The signer and the payload of an envelope.

    Raises `RemoteProtocolError` for bytes that are none, another kind, or a signature that does not hold.
    """
    try:
        envelope = record_pb2.Envelope.FromString(raw)
        signer = envelope.public_key.SerializeToString()
    except (DecodeError, EncodeError) as error:  # the latter where the key lacks a field
        raise RemoteProtocolError(f"not a signed {kind.name}: {error}") from None
    key = PublicKey(signer)
    if envelope.payload_type != kind.payload_type:
        raise RemoteProtocolError(f"an envelope that holds no {kind.name}")
    if not key.verify(_signed(kind, envelope.payload), envelope.signature):
        raise RemoteProtocolError(f"the signature of a {kind.name} does not hold")
    return key, envelope.payload


def _signed(kind: Kind, payload: bytes) -> bytes:
    return varint.prefixed(kind.domain) + varint.prefixed(kind.payload_type) + varint.prefixed(payload)
