"""What neighbours said of attempts that did not begin at this node yet, and how giving one up is said."""

from __future__ import annotations

from collections import OrderedDict

import msgspec

from mycel.protocol.errors import RemoteProtocolError
from mycel.protocol.lane import GONE, READY
from mycel.protocol.mesh import PeerId

WHY_CHARS = 512


class Gone(msgspec.Struct, array_like=True, frozen=True):
    """The body of a GONE frame."""

    suspect: str
    """Whom the sender suspects, empty where it cannot tell."""
    why: str


_gone = msgspec.msgpack.Decoder(Gone)


def write_gone(suspect: PeerId | None, why: str) -> bytes:
    """The body that says so; a long reason is cut."""
    return msgspec.msgpack.encode(Gone(suspect or "", why[:WHY_CHARS]))


def read_gone(body: bytes) -> tuple[PeerId | None, str]:
    """(suspect, why). Raises `RemoteProtocolError`."""
    try:
        gone = _gone.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise RemoteProtocolError(f"a peer that gave up does not say why: {error}") from None
    return (PeerId(gone.suspect) if gone.suspect else None), gone.why[:WHY_CHARS]


class Early:
    """Control frames by peer and operation: the latest `most` of them, the oldest go first."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._said: OrderedDict[tuple[PeerId, bytes, int], bytes] = OrderedDict()

    def add(self, peer: PeerId, digest: bytes, kind: int, body: bytes) -> None:
        """`peer` said something of an operation that is not under way here."""
        self._said[peer, digest, kind] = body
        while len(self._said) > self._most:
            self._said.popitem(last=False)

    def pop(self, peer: PeerId, digest: bytes) -> list[tuple[int, bytes]]:
        """What `peer` said of an operation, as (kind, body); it is forgotten."""
        keys = [key for key in ((peer, digest, READY), (peer, digest, GONE)) if key in self._said]
        return [(key[2], self._said.pop(key)) for key in keys]

    def descriptions(self, peer: PeerId) -> list[bytes]:
        """Descriptions of the operations that `peer` is ready for and this node is not."""
        return [body for (who, _, kind), body in self._said.items() if who == peer and kind == READY]
