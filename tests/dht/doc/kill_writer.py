"""A node that writes and says what it wrote, until it is killed: `kill_writer.py FILE`.

Each line on standard output is a write that was acknowledged.
"""

from __future__ import annotations

import sys
from pathlib import Path

from mycel.dht.doc.library import Library
from mycel.dht.doc.store import SqliteStore
from mycel.protocol.keys import OwnKey
from mycel.protocol.limits_doc import DocumentLimits
from mycel.protocol.mesh import PeerId

LIMITS = DocumentLimits(log_bytes=1500)  # so that compactions are interrupted too
SEED = bytes(31) + b"\x01"


class Signer:
    """The killed node's key."""

    def __init__(self) -> None:
        self._key = OwnKey(SEED)

    @property
    def peer_id(self) -> PeerId:
        return self._key.peer_id

    def sign(self, data: bytes) -> bytes:
        return self._key.sign(data)

    def verify(self, peer: PeerId, data: bytes, signature: bytes) -> bool:
        raise NotImplementedError("it takes nothing from others")

    def wall(self) -> float:
        return 1_800_000_000.0


def main() -> None:
    """Write one key after the other."""
    library = Library(Signer(), SqliteStore(Path(sys.argv[1])), lambda *_: True, limits=LIMITS)
    held = {fact.key: int(fact.value or b"0") for fact in library.read("")}
    number = max(held.values(), default=0)
    while True:
        number += 1
        library.write({f"k{number % 30}": b"%d" % number})
        print(number, flush=True)


if __name__ == "__main__":
    main()
