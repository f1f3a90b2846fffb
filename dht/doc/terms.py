"""What a library asks of its node, and the words for what becomes of a part."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Protocol

from mycel.protocol.mesh import PeerId

MayWrite = Callable[[PeerId, bytes], bool]
"""Whether an author may write in this swarm, by the chain that it shows."""


class Signer(Protocol):
    """What a library needs of a mesh: who this node is, signatures, and the calendar."""

    @property
    def peer_id(self) -> PeerId: ...
    def sign(self, data: bytes) -> bytes: ...
    def verify(self, peer: PeerId, data: bytes, signature: bytes) -> bool: ...
    def wall(self) -> float: ...


class Taken(Enum):
    """What became of a part."""

    NEWS = "news"
    KNOWN = "known"
    GAP = "gap"
    """It does not continue what is here: ask for what is missing."""
    UNWANTED = "unwanted"
    """Refused for its author's sake, or for want of room: whoever passed it on did nothing wrong."""
    REFUSED = "refused"
    """Refused for what it is: nobody who checks passes it on."""


class Refusal(Exception):
    """Why a part is not taken; `reason` is one of the words above."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
