"""Authors with real keys, for the tests of documents."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from mycel.protocol.identity import public_of
from mycel.protocol.identity import verify as verify_signature
from mycel.protocol.keys import OwnKey
from mycel.protocol.mesh import PeerId


class KeySigner:
    """A `Signer` with a key of its own and a calendar that is set by hand."""

    def __init__(self, number: int) -> None:
        self._key = OwnKey(number.to_bytes(32, "big"))
        self.now = 1_800_000_000.0

    @property
    def peer_id(self) -> PeerId:
        return self._key.peer_id

    def sign(self, data: bytes) -> bytes:
        return self._key.sign(data)

    def verify(self, peer: PeerId, data: bytes, signature: bytes) -> bool:
        return verify_signature(public_of(peer), data, signature)

    def wall(self) -> float:
        return self.now


@pytest.fixture(scope="session")
def signer_of() -> Callable[[int], KeySigner]:
    """Makes the signer of a number."""
    return KeySigner
