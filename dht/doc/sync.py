"""Documents between nodes: news is pushed, and what was missed is found by comparing.

A node pushes what is new to it, its own writes and what it took from others, to a few neighbours chosen at
random, one call at a time to each, so that a slow neighbour gets fewer and larger messages. Every two
seconds, whenever a peer comes, and whenever a part does not continue what is here, it compares with one peer:
one digest per bucket of authors, versions for the buckets that differ, then whatever either side lacks.
So a partition, a lost message or a restart costs time and no change.

    documents.write({"capacity/0": packed, "capacity/1": None})     # sets and deletes keys of this node's own
    await documents.synced()                                        # where it must survive a loss of power
    documents.read("capacity/")                                     # [Fact(author, key, value), ...] of all
    async with documents.watch("capacity/") as changes: ...         # Facts; value None: deleted

What is written is on its way to the disk when `write` returns, and is told to nobody before it is there: so
no author can be heard to say two things under one version because its power went.
"""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import trio

from mycel.dht.changes import Watches
from mycel.dht.doc.gossip import Outbox
from mycel.dht.doc.library import Library
from mycel.dht.doc.message import (
    COMPARE,
    PUSH,
    SYNC,
    Compare,
    Differing,
    Missing,
    Part,
    PushParts,
    PushReply,
    Vector,
    Version,
)
from mycel.dht.doc.terms import Taken
from mycel.dht.doc.wanted import Wanted
from mycel.protocol.board import Fact
from mycel.protocol.errors import ConnectionLost, LimitExceeded, MycelError, UsageProblem
from mycel.protocol.limits_doc import DEFAULT_DOCUMENT_LIMITS, DocumentLimits
from mycel.protocol.mesh import Access, Mesh, PeerId, PeerUp
from mycel.protocol.method import Call
from mycel.protocol.rpc import Rpc

log = logging.getLogger("mycel.dht")

COMPARE_ALL_S = 5.0
"""How long a node that started goes on comparing before it takes its own document for what others have of it.
It is done sooner where it compared with everybody that it is connected with, or with..."""
COMPARE_ENOUGH = 3

COMPARERS = 4
"""Comparisons that this node makes at once: when everybody comes at once after a partition."""

PARTS_AT_ONCE = 8
"""Parts that are taken in before other tasks get their turn: a signature each, a millisecond together."""


class Documents:
    """The documents of a swarm at one node. `run` must be running for them to travel."""

    def __init__(
        self, mesh: Mesh, rpc: Rpc, library: Library, limits: DocumentLimits = DEFAULT_DOCUMENT_LIMITS
    ) -> None:
        self.library = library
        self._mesh = mesh
        self._rpc = rpc
        self._limits = limits
        self._outboxes: dict[PeerId, Outbox] = {}
        self._pushes: dict[PeerId, trio.CancelScope] = {}
        self._due: dict[PeerId, None] = {}
        self._due_news = trio.Event()
        self._faults: dict[PeerId, int] = {}
        self._wanted = Wanted(limits.authors)
        self._compared: dict[PeerId, None] | None = {}
        """Who was compared with since the start; None once that was enough."""
        self._compared_s = math.inf
        self._watches = Watches()
        self.sent_parts = 0
        """Parts pushed or given out so far."""
        rpc.serve(PUSH, self._on_push)
        rpc.serve(COMPARE, self._on_compare)
        rpc.serve(SYNC, self._on_sync)

    # --- reading and writing

    def write(self, changes: Mapping[str, bytes | None]) -> None:
        """Set keys of this node's document (None deletes): on its way to the disk and then to all others.

        Raises as `Library.write`.
        """
        before = self.library.write(changes)
        if before is not None:
            self._offer(self._mesh.peer_id, before)

    async def synced(self) -> None:
        """Until what this node wrote is on the disk. Raises `UsageProblem` where it could not be kept: it
        stands and is shared while this node runs, and later only where others keep it."""
        await self.library.synced()

    def read(self, prefix: str) -> list[Fact]:
        """What all authors say under keys that start so, ordered by (key, author)."""
        return self.library.read(prefix)

    def watch(self, prefix: str) -> AbstractAsyncContextManager[AsyncIterator[Fact]]:
        """Changes under `prefix` from the moment of entering; a slow reader gets the latest of each key."""
        return self._watch(prefix)

    @asynccontextmanager
    async def _watch(self, prefix: str) -> AsyncIterator[AsyncIterator[Fact]]:
        self.library.on_changes = self._tell
        try:
            async with self._watches.watch(prefix) as changes:
                yield changes
        finally:
            if not self._watches:
                self.library.on_changes = None

    def _tell(self, facts: Sequence[Fact]) -> None:
        for fact in facts:
            self._watches.tell(fact)

    # --- the service

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Push and compare until cancelled."""
        async with trio.open_nursery() as nursery:
            for _ in range(COMPARERS):
                nursery.start_soon(self._compare_due)
            nursery.start_soon(self._compare_now_and_then)
            while True:
                try:
                    await self._follow_peers(nursery, task_status)
                except LimitExceeded:  # too far behind: look at the peers anew
                    task_status = trio.TASK_STATUS_IGNORED

    async def _follow_peers(self, nursery: trio.Nursery, task_status: trio.TaskStatus[None]) -> None:
        async with self._mesh.events() as events:
            for peer in [peer for peer in self._outboxes if peer not in self._mesh.peers]:
                self._forget(peer)
            for info in list(self._mesh.peers.values()):
                self._on_up(nursery, info.peer, info.access)
            task_status.started()
            async for event in events:
                for outbox in self._outboxes.values():
                    outbox.speak_again()
                if isinstance(event, PeerUp):
                    self._on_up(nursery, event.peer, event.access)
                else:
                    self._forget(event.peer)
                    self._fill(nursery)

    def _on_up(self, nursery: trio.Nursery, peer: PeerId, access: Access) -> None:
        if access < Access.MEMBER:
            return
        if self._mesh.peer_id < peer or self._compared is not None:  # one of the two is enough
            self._compare_soon(peer)
        if peer in self._outboxes:
            return
        if len(self._outboxes) >= self._limits.push_peers:
            # Each of n members should be among the chosen with the same chance, in whatever order they came.
            chosen = self._draw(sum(1 for info in self._mesh.peers.values() if info.access >= Access.MEMBER))
            if chosen >= self._limits.push_peers:
                return
            self._forget(sorted(self._outboxes)[chosen])
        self._choose(nursery, peer)

    def _choose(self, nursery: trio.Nursery, peer: PeerId) -> None:
        self._outboxes[peer] = Outbox(self.library, self._limits)
        self._pushes[peer] = trio.CancelScope()
        nursery.start_soon(self._push, peer, self._outboxes[peer], self._pushes[peer])

    def _fill(self, nursery: trio.Nursery) -> None:
        """Choose somebody in the place of a neighbour that is gone."""
        others = sorted(
            peer
            for peer, info in self._mesh.peers.items()
            if info.access >= Access.MEMBER and peer not in self._outboxes
        )
        if others and len(self._outboxes) < self._limits.push_peers:
            self._choose(nursery, others[self._draw(len(others))])

    def _forget(self, peer: PeerId) -> None:
        self._due.pop(peer, None)
        self._faults.pop(peer, None)
        if peer in self._outboxes:
            del self._outboxes[peer]
            self._pushes.pop(peer).cancel()

    def _draw(self, count: int) -> int:
        return int.from_bytes(self._mesh.entropy(8), "big") % count

    # --- pushing

    def _offer(
        self, author: PeerId, before: Version, source: PeerId | None = None, *, was_missed: bool = False
    ) -> None:
        for peer, outbox in self._outboxes.items():
            if peer != source:
                outbox.put(author, before, even_if_quiet=was_missed)

    async def _push(self, peer: PeerId, outbox: Outbox, scope: trio.CancelScope) -> None:
        with scope:
            while True:
                await outbox.wait()
                parts = outbox.take()
                sent = {part.head.author: None for part in parts}
                try:
                    for author in await self._send(peer, parts):
                        if author in sent:
                            outbox.knew(author)
                except MycelError:  # it will find out by comparing
                    self._compare_soon(peer)
                    await trio.sleep(self._limits.retry_s)

    async def _send(self, peer: PeerId, parts: Sequence[Part]) -> list[PeerId]:
        """Push; the authors of whom nothing was news."""
        if not parts:
            return []
        await self._settle_own()
        self.sent_parts += len(parts)
        reply = await self._rpc.call(peer, PUSH, PushParts(list(parts)), deadline_s=self._limits.call_s)
        return reply.knew

    async def _on_push(self, call: Call, request: PushParts) -> PushReply:
        became = await self._take(call.peer, request.parts)
        return PushReply([author for author, was in became.items() if was is Taken.KNOWN])

    async def _take(
        self, peer: PeerId, parts: Sequence[Part], *, was_missed: bool = False
    ) -> dict[PeerId, Taken]:
        """Take in what `peer` passed on, and pass on what is news; what became of each author's last part."""
        became: dict[PeerId, Taken] = {}
        for number, part in enumerate(parts, 1):
            if number % PARTS_AT_ONCE == 0:
                await trio.lowlevel.checkpoint()
            author = part.head.author
            before = self.library.version(author)
            was = became[author] = self.library.take(part)
            if was in (Taken.NEWS, Taken.KNOWN) and peer in self._outboxes:
                self._outboxes[peer].has(author, part.head.version)
            if was is Taken.NEWS:
                source = peer if author != self._mesh.peer_id else None
                self._offer(author, before, source, was_missed=was_missed)
            elif was is Taken.GAP:
                if was_missed:
                    self._wanted.tear(author)
                self._compare_soon(peer)
            elif was is Taken.UNWANTED:
                self._wanted.leave(part.head, trio.current_time())
            elif was is Taken.REFUSED and not self._is_tolerable(peer):
                break
        return became

    async def _settle_own(self) -> None:
        """Before anything is given out: what this node wrote must not be gone after a loss of power."""
        try:
            await self.library.synced()
        except UsageProblem as error:
            log.warning("what this node wrote is shared, but not kept: %s", error)

    def _is_tolerable(self, peer: PeerId) -> bool:
        """Count a part that honest peers do not send; False once there were too many: the peer is dropped."""
        self._faults[peer] = self._faults.get(peer, 0) + 1
        if self._faults[peer] < self._limits.refusals:
            return True
        self._mesh.disconnect(peer, f"{self._limits.refusals} parts of documents that do not hold")
        return False

    # --- comparing

    def _compare_soon(self, peer: PeerId) -> None:
        self._due[peer] = None
        self._due_news.set()

    async def _compare_now_and_then(self) -> None:
        while True:
            await trio.sleep(self._limits.compare_s * (0.5 + self._draw(1 << 20) / (1 << 20)))
            peers = [peer for peer, info in self._mesh.peers.items() if info.access >= Access.MEMBER]
            if peers:
                self._compare_soon(sorted(peers)[self._draw(len(peers))])

    async def _compare_due(self) -> None:
        while True:
            await self._due_news.wait()
            if not self._due:
                self._due_news = trio.Event()
                continue
            peer = next(iter(self._due))
            del self._due[peer]
            try:
                await self._compare(peer)
            except ConnectionLost:
                pass
            except MycelError:  # it may be busy, or not know our membership yet; the next one will do
                await trio.sleep(self._limits.retry_s)

    async def _compare(self, peer: PeerId) -> None:
        """Find out where this node and `peer` differ, and mend it both ways."""
        limit_s = self._limits.call_s
        digests = Compare(self.library.vector.digests)
        differing = await self._rpc.call(peer, COMPARE, digests, deadline_s=limit_s)
        if differing.buckets:
            await self._mend(peer, differing.buckets)
        self._note_compared(peer)

    async def _mend(self, peer: PeerId, buckets: list[int]) -> None:
        while True:
            whole = self._wanted.torn
            versions = self._wanted.of(self.library.vector.of(buckets), buckets, trio.current_time())
            reply = await self._rpc.call(
                peer, SYNC, Vector(buckets, versions), deadline_s=self._limits.call_s
            )
            became = await self._take(peer, reply.parts, was_missed=True)
            self._wanted.mend(whole)
            if (reply.is_all or Taken.NEWS not in became.values()) and not self._wanted.torn:
                break
        outbox = Outbox(self.library, self._limits)
        for author, version in reply.wants.items():
            outbox.put(author, Version(*version))
        while parts := outbox.take():
            await self._send(peer, parts)

    def _note_compared(self, peer: PeerId) -> None:
        """Count up to when this node may take its own document for what others have of it."""
        if self._compared is None:
            return
        self._compared[peer] = None
        self._compared_s = min(self._compared_s, trio.current_time())
        members = [one for one, info in self._mesh.peers.items() if info.access >= Access.MEMBER]
        is_long_enough = trio.current_time() >= self._compared_s + COMPARE_ALL_S
        is_enough = len(self._compared) >= COMPARE_ENOUGH or all(one in self._compared for one in members)
        if is_enough or is_long_enough:
            self._compared = None
            before = self.library.version(self._mesh.peer_id)
            self.library.on_compared()
            self._offer(self._mesh.peer_id, before)

    def renew(self, chain: bytes) -> None:
        """Show another chain from now on."""
        before = self.library.version(self._mesh.peer_id)
        self.library.renew(chain)
        self._offer(self._mesh.peer_id, before)

    async def _on_compare(self, call: Call, request: Compare) -> Differing:
        return Differing(self.library.vector.differing(request.buckets))

    async def _on_sync(self, call: Call, request: Vector) -> Missing:
        if len(request.versions) > self._limits.authors:
            raise LimitExceeded(f"a vector of {len(request.versions)} authors; documents.authors bounds it")
        missing = self.library.missing(request)
        for author in list(missing.wants):
            if not self._wanted.lets_in(author, Version(*request.versions[author]), trio.current_time()):
                del missing.wants[author]
        await self._settle_own()
        self.sent_parts += len(missing.parts)
        if call.peer in self._outboxes:
            for author, version in request.versions.items():
                self._outboxes[call.peer].has(author, min(version, self.library.version(author)))
        return missing
