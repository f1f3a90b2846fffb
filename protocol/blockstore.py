"""The block store: bytes by their content's name, checked on the way in and on the way out.

compute/ needs just this of where model files come from; dht/ implements it on disk and in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from mycel.protocol.cid import Cid
from mycel.protocol.errors import MycelError

FINGERPRINT_FILE = "mycel-fingerprint"
"""In a model's directory made of blocks: the fingerprint of the files that it was cut from, and on a second
line the name it goes by. Peers with the files, and peers with some of its layers, mean the same model."""


class CorruptBlock(MycelError):
    """Bytes that are not what their name says."""


class BlockStore(Protocol):
    """Blocks that this node holds."""

    @property
    def used_bytes(self) -> int:
        """What they take, with those on their way in."""

    @property
    def quota_bytes(self) -> int:
        """What they may take; 0: as much as there is."""

    def has(self, cid: Cid) -> bool:
        """Whether the block is here."""

    async def get(self, cid: Cid) -> bytes | None:
        """The block, None where it is not here. What is damaged is not here, and is removed."""

    async def append(self, cid: Cid, descriptor: int) -> bool:
        """Write the block to an open file where that stands; False where it is not here: nothing is written.

        Where the file system can, both share its extents from then on.
        """

    async def put(self, cid: Cid, data: bytes) -> None:
        """Keep a block. When this returns, the end of this process does not lose it.

        Raises `CorruptBlock` where `data` is not `cid`'s content, `LimitExceeded` where there is no room.
        """

    async def pin(self, name: str, cids: Sequence[Cid]) -> None:
        """Keep these, also those still to come, whatever else is evicted; replaces what `name` pinned."""

    def pinned(self, name: str) -> Sequence[Cid]:
        """What `name` keeps, here or still to come."""

    def pins(self) -> Sequence[str]:
        """Names that pin something, in order."""

    async def unpin(self, name: str) -> None:
        """Let go what `name` pinned; nothing happens where it pinned nothing."""
