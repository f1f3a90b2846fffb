"""The exchange of blocks: serving what is here, fetching what is not, over one protocol.

A fetch talks to every member it is connected with, up to a bound, those who come later included; `Plan`
decides who is asked for what. Peers who fetch the same at the same time serve each other: a block that came
is announced at once to whoever said it would be welcome. What came is checked while it is stored, a few
blocks at a time, in the store's threads; the streams' windows hold up the senders meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mycel.dht.block.download import Download
from mycel.dht.block.manifest import Want, unique
from mycel.dht.block.upload import Uploads
from mycel.protocol.blockstore import BlockStore
from mycel.protocol.cid import Cid
from mycel.protocol.errors import LimitExceeded
from mycel.protocol.limits import DEFAULT_BLOCK_LIMITS, BlockLimits
from mycel.protocol.mesh import Mesh, PeerId

Progress = Callable[[int, int], None]
"""Blocks that came, blocks that were wanted."""


class Exchange:
    """Blocks for and from peers. `upload_bytes_per_s` 0: as fast as it goes."""

    def __init__(
        self,
        mesh: Mesh,
        store: BlockStore,
        *,
        upload_bytes_per_s: float = 0,
        limits: BlockLimits = DEFAULT_BLOCK_LIMITS,
    ) -> None:
        self.mesh = mesh
        self.store = store
        self.limits = limits
        self.uploads = Uploads(mesh, store, upload_bytes_per_s, limits)
        self.liars: dict[PeerId, int] = {}
        """Corrupt blocks by sender; none of them is asked again."""
        self.blocks_received = 0
        self.bytes_received = 0
        self.corrupt = 0
        self.broken = 0
        """Streams ended for what the peer said on them."""

    async def fetch(
        self,
        wants: Sequence[Want],
        *,
        peers: Sequence[PeerId] | None = None,
        first: Sequence[PeerId] = (),
        progress: Progress | None = None,
    ) -> None:
        """Bring the blocks that are not here, from `peers` or from all members, and keep them.

        Where there are more members than one fetch talks to, those in `first` are among them.
        They are not pinned by this. Raises `DeadlineExceeded` when nothing came from anybody for
        `limits.patience_s`, `LimitExceeded` where the store has no room, and what else the store raises.
        """
        missing = [want for want in unique(wants) if not self.store.has(want.cid)]
        total = len(missing)
        for at in range(0, total, self.limits.wants):
            turn = missing[at : at + self.limits.wants]
            download = Download(self, turn, peers, first)
            if progress is not None:
                progress(at, total)
                download.on_kept = lambda left, end=at + len(turn): progress(end - left, total)
            await download.run()

    async def get(
        self, want: Want, *, peers: Sequence[PeerId] | None = None, first: Sequence[PeerId] = ()
    ) -> bytes:
        """A block, fetched where it is not here. Raises as `fetch` does."""
        while True:
            data = await self.store.get(want.cid)
            if data is not None:
                return data
            await self.fetch([want], peers=peers, first=first)
            if not self.store.has(want.cid):
                raise LimitExceeded("the store did not keep a block that was fetched; raise its quota")

    def announce(self, cid: Cid) -> None:
        """A block came to the store from elsewhere: tell those who would welcome it."""
        self.uploads.announce(cid)

    def note_corrupt(self, peer: PeerId) -> None:
        """`peer` sent bytes that are not what it said."""
        self.corrupt += 1
        self.liars[peer] = self.liars.pop(peer, 0) + 1
        while len(self.liars) > self.limits.liars:
            del self.liars[next(iter(self.liars))]
