"""What a store holds, by size and last use, and what goes when room is needed. Pure.

A shelf has a quota. Room is reserved before a block is written; where there is none, the block that was not
used for the longest time goes, and pinned ones never. A pin is a name and the blocks it keeps, which may
still be on their way; a block may have several.
"""

from __future__ import annotations

from collections.abc import Sequence

from mycel.protocol.cid import Cid
from mycel.protocol.errors import LimitExceeded


class Shelf:
    """Sizes and pins. `quota_bytes` 0: as much as the disk takes."""

    def __init__(self, quota_bytes: int = 0) -> None:
        self.quota_bytes = quota_bytes
        self.used_bytes = 0
        self._sizes: dict[Cid, int] = {}  # the least recently used first
        self._pins: dict[str, tuple[Cid, ...]] = {}
        self._pinned: dict[Cid, int] = {}

    def __contains__(self, cid: Cid) -> bool:
        return cid in self._sizes

    def __len__(self) -> int:
        return len(self._sizes)

    @property
    def pins(self) -> dict[str, tuple[Cid, ...]]:
        """Names and what they keep. Do not change it."""
        return self._pins

    def reserve(self, nbytes: int) -> list[Cid]:
        """Take room for a block to come; the blocks that go for it, which are off the shelf from now on.

        Raises `LimitExceeded`, and nothing goes, where the pinned ones leave no room.
        """
        gone: list[Cid] = []
        if self.quota_bytes:
            excess = self.used_bytes + nbytes - self.quota_bytes
            for cid, size in self._sizes.items():
                if excess <= 0:
                    break
                if cid not in self._pinned:
                    gone.append(cid)
                    excess -= size
            if excess > 0:
                raise LimitExceeded(
                    f"blocks may take {self.quota_bytes >> 20} MiB here and pinned ones leave no room for "
                    f"{nbytes} bytes: remove a model, or raise the quota"
                )
        for cid in gone:
            self.remove(cid)
        self.used_bytes += nbytes
        return gone

    def release(self, nbytes: int) -> None:
        """The reserved room is not needed."""
        self.used_bytes -= nbytes

    def place(self, cid: Cid, nbytes: int) -> None:
        """A block stands in the room that was reserved for it."""
        if cid in self._sizes:
            self.used_bytes -= nbytes
        self._sizes[cid] = nbytes

    def touch(self, cid: Cid) -> None:
        """A block was used."""
        if cid in self._sizes:
            self._sizes[cid] = self._sizes.pop(cid)

    def remove(self, cid: Cid) -> None:
        """A block is gone."""
        self.used_bytes -= self._sizes.pop(cid, 0)

    def pin(self, name: str, cids: Sequence[Cid]) -> None:
        """Keep these under `name` instead of what it kept."""
        self.unpin(name)
        self._pins[name] = tuple(cids)
        for cid in cids:
            self._pinned[cid] = self._pinned.get(cid, 0) + 1

    def unpin(self, name: str) -> None:
        """`name` keeps nothing."""
        for cid in self._pins.pop(name, ()):
            self._pinned[cid] -= 1
            if not self._pinned[cid]:
                del self._pinned[cid]
