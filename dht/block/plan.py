"""Who is asked for which block: rarest first, from many peers, each as far ahead as it is fast.

Pure: news and the time go in, what to ask and to take back comes out. Every ask is answered by its block or
by "gone", also one that was taken back, so what a peer has under way is always known.

*Rarest first.* Of the blocks a peer has, the one that the fewest known peers have goes first. Equally rare
ones are ordered by a draw of this node's own, so that peers who fetch the same model at the same time take
different blocks from its only holder, and the rest from each other.

*As far ahead as it is fast.* A peer's rate is measured from its arrivals; what it may have under way is a
second's worth of it, within bounds. So a fast peer is never idle and a slow one never sits on much.

*The end.* When all that is left has been asked of somebody, a block that would come much later from there
than from an idle peer is asked of that one as well, and taken back where it did not come first. A peer that
says nothing for long gets nothing more to do, and what it was asked for goes to others.

*Lies.* A block that is not what its name says is its sender's fault: the sender is dropped (`drop`), and
what it was asked for is asked of others.
"""

from __future__ import annotations

import hashlib
import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from mycel.dht.block.manifest import Want
from mycel.protocol.cid import Cid
from mycel.protocol.limits import DEFAULT_BLOCK_LIMITS, BlockLimits
from mycel.protocol.mesh import PeerId

RATE_S = 2.0
"""How far back a peer's rate is measured, roughly..."""
RATE_S_MIN = 0.05
"""...and over what at least: the first blocks of a burst come with no time between them."""
HASTE = 2.0
"""A second peer is asked for a block that would come so many times sooner from it."""
ASKERS_MAX = 2


@dataclass(frozen=True, slots=True)
class Ask:
    """Ask `peer` for a block."""

    peer: PeerId
    cid: Cid


@dataclass(frozen=True, slots=True)
class TakeBack:
    """Tell `peer` that a block it was asked for is not needed any more."""

    peer: PeerId
    cid: Cid


@dataclass(slots=True)
class _Wanted:
    """A block that is not here."""

    nbytes: int
    draw: bytes
    holders: int = 0
    asked: list[PeerId] = field(default_factory=list)


@dataclass(slots=True)
class _Source:
    """A peer that may have some."""

    has: dict[Cid, None] = field(default_factory=dict)
    heap: list[tuple[int, bytes, Cid]] = field(default_factory=list)
    asked: dict[Cid, int] = field(default_factory=dict)
    asked_bytes: int = 0
    rate: float = 0.0
    came: float = 0.0
    """Bytes, those of long ago counted for less, and..."""
    took: float = 0.0
    """...the seconds they took."""
    since: float = 0.0
    """Of the last arrival, or of the first ask after a pause."""
    is_stalled: bool = False


class Plan:
    """What one fetch still wants, who has it, and who was asked."""

    def __init__(
        self, wants: Sequence[Want], seed: bytes, limits: BlockLimits = DEFAULT_BLOCK_LIMITS
    ) -> None:
        """`seed` makes the draw; a size that is not known counts as the largest."""
        self._limits = limits
        self._sources: dict[PeerId, _Source] = {}
        self._wanted = {
            want.cid: _Wanted(
                limits.block_bytes if want.nbytes is None else want.nbytes,
                hashlib.sha256(seed + want.cid).digest()[:8],
            )
            for want in wants
        }

    @property
    def is_done(self) -> bool:
        """Whether nothing is wanted any more."""
        return not self._wanted

    @property
    def left(self) -> list[Cid]:
        """What is wanted."""
        return list(self._wanted)

    @property
    def sources(self) -> int:
        """Peers that are known and not dropped."""
        return len(self._sources)

    def rate(self, peer: PeerId) -> float:
        """Measured bytes per second of a peer, 0 where nothing came from it."""
        source = self._sources.get(peer)
        return 0.0 if source is None else source.rate

    def was_asked(self, peer: PeerId, cid: Cid) -> bool:
        """Whether `peer` owes an answer about `cid`."""
        source = self._sources.get(peer)
        return source is not None and cid in source.asked

    def is_wanted(self, cid: Cid) -> bool:
        """Whether `cid` has not come yet."""
        return cid in self._wanted

    # --- news

    def add(self, peer: PeerId) -> None:
        """A peer to ask, of which nothing is known."""
        self._sources.setdefault(peer, _Source())

    def drop(self, peer: PeerId) -> None:
        """A peer is gone, or lied: what it was asked for is free for others."""
        source = self._sources.pop(peer, None)
        if source is None:
            return
        for cid in source.has:
            self._count(cid, -1)
        for cid in source.asked:
            self._release(peer, cid)

    def on_have(self, peer: PeerId, cids: Iterable[Cid]) -> None:
        """A peer says that it has these; what is not wanted is passed over."""
        source = self._sources.get(peer)
        if source is None:
            return
        for cid in cids:
            wanted = self._wanted.get(cid)
            if wanted is None or cid in source.has:
                continue
            source.has[cid] = None
            wanted.holders += 1
            heapq.heappush(source.heap, (wanted.holders, wanted.draw, cid))

    def on_gone(self, peer: PeerId, cid: Cid) -> None:
        """A peer answers that it does not send `cid`."""
        source = self._sources.get(peer)
        if source is None:
            return
        if cid in source.has:
            del source.has[cid]
            self._count(cid, -1)
        self._answered(source, cid)
        self._release(peer, cid)

    def on_arrival(self, peer: PeerId, cid: Cid, now: float) -> None:
        """A block came, to be checked; it counts for its sender's pace."""
        source = self._sources.get(peer)
        if source is None:
            return
        nbytes = source.asked.get(cid, 0)
        took = now - source.since
        fade = math.exp(-took / RATE_S)
        source.came = source.came * fade + nbytes
        source.took = source.took * fade + took
        source.rate = source.came / max(source.took, RATE_S_MIN)
        source.since = now
        source.is_stalled = False
        self._answered(source, cid)

    def on_spare(self, peer: PeerId, cid: Cid) -> None:
        """A block that came was let go, for the same is being checked; where that fails it is asked again."""
        self._release(peer, cid)

    def on_stored(self, cid: Cid) -> list[TakeBack]:
        """A block was checked and is kept; who else was asked for it."""
        wanted = self._wanted.pop(cid, None)
        if wanted is None:
            return []
        for source in self._sources.values():
            source.has.pop(cid, None)
        return [TakeBack(peer, cid) for peer in wanted.asked if self.was_asked(peer, cid)]

    def on_time(self, now: float) -> None:
        """Look for peers that say nothing: what they were asked for is free for others."""
        for peer, source in self._sources.items():
            if source.asked and not source.is_stalled and now - source.since >= self._limits.stall_s:
                source.is_stalled = True
                for cid in source.asked:
                    self._release(peer, cid)

    # --- what to ask

    def asks(self, now: float) -> list[Ask]:
        """Whom to ask for what now. The asks count as made."""
        made: list[Ask] = []
        busy = False
        asking = [peer for peer, source in self._sources.items() if self._has_room(source)]
        while asking:
            left = []
            for peer in asking:
                source = self._sources[peer]
                cid = self._rarest(source)
                if cid is not None:
                    made.append(self._ask(peer, source, cid, now))
                    if self._has_room(source):
                        left.append(peer)
                else:
                    busy = True
            asking = left
        return made + self._hurry(now) if busy else made

    def _has_room(self, source: _Source) -> bool:
        limits = self._limits
        ahead = min(max(source.rate * limits.ahead_s, limits.ahead_bytes_min), limits.ahead_bytes_max)
        return not source.is_stalled and source.asked_bytes < ahead and len(source.asked) < limits.asked

    def _rarest(self, source: _Source) -> Cid | None:
        """The block to ask this peer for, None where all that it has is asked for already."""
        while source.heap:
            holders, draw, cid = heapq.heappop(source.heap)
            wanted = self._wanted.get(cid)
            if wanted is None or wanted.asked or cid not in source.has or cid in source.asked:
                continue
            if wanted.holders != holders:
                heapq.heappush(source.heap, (wanted.holders, draw, cid))
                continue
            return cid
        return None

    def _ask(self, peer: PeerId, source: _Source, cid: Cid, now: float) -> Ask:
        wanted = self._wanted[cid]
        wanted.asked.append(peer)
        if not source.asked:
            source.since = now
        source.asked[cid] = wanted.nbytes
        source.asked_bytes += wanted.nbytes
        return Ask(peer, cid)

    def _hurry(self, now: float) -> list[Ask]:
        """Ask idle peers for what would come much later from where it was asked."""
        made: list[Ask] = []
        idle = {peer: s for peer, s in self._sources.items() if not s.asked and not s.is_stalled and s.rate}
        for peer, source in idle.items():
            latest, worst = 0.0, None
            for cid in source.has:
                wanted = self._wanted[cid]
                if len(wanted.asked) >= ASKERS_MAX or not wanted.asked:
                    continue
                wait = min(self._wait(self._sources[other], now) for other in wanted.asked)
                if wait > max(latest, HASTE * wanted.nbytes / source.rate):
                    latest, worst = wait, cid
            if worst is not None:
                made.append(self._ask(peer, source, worst, now))
        return made

    def _wait(self, source: _Source, now: float) -> float:
        """Seconds until a peer has sent what it was asked for, at its pace."""
        pace = source.rate or self._limits.ahead_bytes_min / self._limits.stall_s
        return max(source.asked_bytes / pace - (now - source.since), now - source.since)

    # --- bookkeeping

    def _count(self, cid: Cid, change: int) -> None:
        wanted = self._wanted.get(cid)
        if wanted is not None:
            wanted.holders += change

    def _answered(self, source: _Source, cid: Cid) -> None:
        source.asked_bytes -= source.asked.pop(cid, 0)

    def _release(self, peer: PeerId, cid: Cid) -> None:
        """`peer` is not counted on for `cid`: where nobody is, it goes back to all who have it."""
        wanted = self._wanted.get(cid)
        if wanted is None or peer not in wanted.asked:
            return
        wanted.asked.remove(peer)
        if not wanted.asked:
            for source in self._sources.values():
                if cid in source.has:
                    heapq.heappush(source.heap, (wanted.holders, wanted.draw, cid))

    def on_corrupt(self, peer: PeerId, cid: Cid) -> None:
        """`peer` sent other bytes than `cid`'s: it is dropped."""
        self._release(peer, cid)
        self.drop(peer)

    def seconds_to_stall(self, now: float) -> float:
        """Until `on_time` may have something to find, infinity where nobody was asked."""
        waits = [
            source.since + self._limits.stall_s - now
            for source in self._sources.values()
            if source.asked and not source.is_stalled
        ]
        return max(0.0, min(waits, default=math.inf))
