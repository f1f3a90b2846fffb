"""Which socket is the one: what two punching peers say first on a socket between their fresh ports.

Many sockets may come to stand at once, over the LAN, by a hairpin, in both directions; and anybody may knock
at an open port. On every socket, whoever dialled it, both sides say at once

    nonce (16 bytes) || HMAC(key, role || nonce)        role: "asks" or "answers"

and the asking side, when the other's holds, the byte 1 on the socket it chose, the first that was proven; it
hangs up on the others. HMAC is HMAC-SHA-256; the key is HKDF-SHA-256 over the two shares of the exchange and
both peer ids, so it is known to these two peers only and good for this exchange only. The proof picks a
socket and keeps strangers away from the handshake; who the peer is and that nobody listens is Noise's to
prove, afterwards.

A `Proof` is one side on one socket. It reads just what it needs, for what follows belongs to the handshake.
"""

from __future__ import annotations

import hmac

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from mycel.protocol.errors import RemoteProtocolError
from mycel.protocol.mesh import PeerId

NONCE_BYTES = 16
TAG_BYTES = 32
CHOSEN = b"\x01"


def proof_key(asks: PeerId, answers: PeerId, shares: tuple[bytes, bytes]) -> bytes:
    """The key (32 bytes) of an exchange; `shares` are the asking and the answering side's."""
    info = f"mycel punch 1\n{asks}\n{answers}".encode()
    return HKDF(algorithm=SHA256(), length=32, salt=None, info=info).derive(shares[0] + shares[1])


class Stranger(RemoteProtocolError):
    """Whoever is at the other end is not the peer of this exchange."""


class Proof:
    """One side's proof on one socket.

    Send `outgoing` first; then read `needs` bytes at a time into `receive` until `is_done`.
    """

    def __init__(self, key: bytes, *, asks: bool, nonce: bytes) -> None:
        """`nonce` is 16 fresh random bytes."""
        self._key = key
        self.asks = asks
        self.outgoing = nonce + self._tag(asks, nonce)
        self.needs = NONCE_BYTES + TAG_BYTES
        self.is_proven = False
        """Whether the other side proved itself."""
        self.is_done = False
        """Whether the socket is the one: for the asking side, whether it may choose it."""

    def receive(self, data: bytes) -> None:
        """`needs` bytes came. Raises `Stranger`."""
        if self.is_proven:
            if data != CHOSEN:
                raise Stranger("a punched socket was not chosen in the due way")
            self.needs, self.is_done = 0, True
            return
        nonce, tag = data[:NONCE_BYTES], data[NONCE_BYTES:]
        if not hmac.compare_digest(self._tag(not self.asks, nonce), tag):
            raise Stranger("a stranger is on the punched port: its proof does not hold")
        self.is_proven = True
        self.needs, self.is_done = (0, True) if self.asks else (len(CHOSEN), False)

    def _tag(self, asks: bool, nonce: bytes) -> bytes:
        return hmac.digest(self._key, (b"asks" if asks else b"answers") + nonce, "sha256")
