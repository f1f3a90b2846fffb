"""The Noise XX handshake as libp2p speaks it (libp2p specs/noise; Noise rev 34, XX_25519_ChaChaPoly_SHA256).

Three messages, each behind a two-byte length: the initiator's ephemeral key; the responder's ephemeral and
static keys and payload; the initiator's static key and payload. A payload carries the peer's identity key and
its signature over the Noise static key, which is what ties the channel to a peer id, and may carry the stream
muxers it speaks (which saves the muxer's own negotiation). The handshake itself is `noiseprotocol`'s; its
two cipher keys then go to `mycel.protocol.sealed`, which seals in place.
"""

from __future__ import annotations

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from google.protobuf.message import DecodeError
from noise.backends.default.keypairs import KeyPair25519
from noise.connection import Keypair, NoiseConnection
from noise.exceptions import NoiseHandshakeError, NoiseInvalidMessage, NoiseValueError

from mycel.protocol.errors import LocalProtocolError, RemoteProtocolError
from mycel.protocol.keys import OwnKey, PublicKey
from mycel.protocol.pb import noise_pb2

PROTOCOL = "/noise"
_NAME = b"Noise_XX_25519_ChaChaPoly_SHA256"
_SIGNED_PREFIX = b"noise-libp2p-static-key:"

MESSAGE_BYTES_MAX = 8192
"""A handshake message's bound: keys, an RSA identity key and signature, extensions (Noise allows 65535)."""

MUXERS_MAX = 16
"""Stream muxers a payload may list."""


class Static:
    """A node's Noise static key and the signed payload that ties it to the node's identity; made once."""

    __slots__ = ("payload", "private")

    def __init__(self, key: OwnKey, private: bytes, *, muxers: tuple[str, ...] = ()) -> None:
        """`private` is 32 random bytes (an X25519 private key)."""
        public = X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()
        self.private = private
        self.payload = noise_pb2.NoiseHandshakePayload(
            identity_key=key.public.serialized,
            identity_sig=key.sign(_SIGNED_PREFIX + public),
            extensions=noise_pb2.NoiseExtensions(stream_muxers=muxers) if muxers else None,
        ).SerializeToString()


class Handshake:
    """One side of a handshake: messages in (without their length), messages out (with it)."""

    __slots__ = ("_ephemeral", "_initiator", "_noise", "_sent", "_state", "_static", "muxers", "remote")

    def __init__(self, static: Static, *, initiator: bool, ephemeral: bytes) -> None:
        """`ephemeral` is 32 random bytes, fresh for every handshake."""
        self._static = static
        self._initiator = initiator
        self._sent = 0
        self.remote: PublicKey | None = None
        self.muxers: tuple[str, ...] = ()
        noise = NoiseConnection.from_name(_NAME)
        noise.set_keypair_from_private_bytes(Keypair.STATIC, static.private)
        if initiator:
            noise.set_as_initiator()
        else:
            noise.set_as_responder()
        noise.start_handshake()
        # The library warns of ephemeral keys set beforehand; ours is fresh, from the network's entropy.
        self._state = noise.noise_protocol.handshake_state
        self._state.e = KeyPair25519.from_private_bytes(ephemeral)  # type: ignore[no-untyped-call]
        self._noise = noise

    def start(self) -> bytes:
        """The initiator's first message."""
        if not self._initiator or self._sent:
            raise LocalProtocolError("only a Noise initiator starts, and once")
        return self._write(b"")

    def receive(self, message: bytes) -> bytes:
        """Take the next message; returns the answer, b"" when there is none.

        Raises `RemoteProtocolError` for a message that is malformed, does not authenticate, or whose identity
        signature does not hold.
        """
        try:
            payload = bytes(self._noise.read_message(message))
        except (InvalidTag, ValueError, IndexError, NoiseValueError, NoiseInvalidMessage) as error:
            raise RemoteProtocolError(f"Noise handshake failed: {type(error).__name__} {error}") from None
        except NoiseHandshakeError as error:
            raise LocalProtocolError(f"a Noise message out of turn: {error}") from None
        if not self._initiator and self.remote is None and not self._sent:
            if payload:
                raise RemoteProtocolError("the first Noise message carries a payload; libp2p's has none")
            return self._write(self._static.payload)
        self._check(payload)
        return self._write(self._static.payload) if self._initiator else b""

    @property
    def done(self) -> bool:
        """Whether all three messages went; `remote` is then the peer's proven key."""
        return bool(self._noise.handshake_finished)

    def keys(self) -> tuple[bytes, bytes]:
        """The 32-byte cipher keys (to send with, to receive with) of a finished handshake."""
        if not self.done:
            raise LocalProtocolError("Noise keys exist only after the handshake")
        protocol = self._noise.noise_protocol
        return bytes(protocol.cipher_state_encrypt.k), bytes(protocol.cipher_state_decrypt.k)

    def _write(self, payload: bytes) -> bytes:
        try:
            message = bytes(self._noise.write_message(payload))
        except ValueError as error:  # a peer's key of low order gives no shared secret
            raise RemoteProtocolError(f"Noise handshake failed: {error}") from None
        self._sent += 1
        return len(message).to_bytes(2, "big") + message

    def _check(self, raw: bytes) -> None:
        try:
            payload = noise_pb2.NoiseHandshakePayload.FromString(raw)
        except DecodeError:
            raise RemoteProtocolError("the Noise payload is not the message it should be") from None
        remote = PublicKey(payload.identity_key)
        static = bytes(self._state.rs.public_bytes)
        if not remote.verify(_SIGNED_PREFIX + static, payload.identity_sig):
            raise RemoteProtocolError("the identity key did not sign this Noise static key")
        if len(payload.extensions.stream_muxers) > MUXERS_MAX:
            raise RemoteProtocolError(f"more than {MUXERS_MAX} stream muxers offered")
        self.muxers = tuple(payload.extensions.stream_muxers)
        self.remote = remote
