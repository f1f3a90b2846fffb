"""One fetch: a stream to each peer, a plan over all of them, and a few blocks being stored at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import trio

from mycel.dht.block.manifest import Want
from mycel.dht.block.message import BLOCK_PROTOCOL, Kind, read, write
from mycel.dht.block.plan import Plan
from mycel.protocol.blockstore import CorruptBlock
from mycel.protocol.cid import Cid, cid_text
from mycel.protocol.errors import (
    ConnectionLost,
    DeadlineExceeded,
    MycelError,
    Refused,
    RemoteProtocolError,
    StreamReset,
)
from mycel.protocol.mesh import Access, PeerId, PeerUp, Stream

if TYPE_CHECKING:
    from mycel.dht.block.exchange import Exchange

LOOK_S = 1.0
"""How often peers are looked at for silence."""


class Download:
    """What one fetch does. `peers` None: every member, those in `first` before others."""

    def __init__(
        self,
        exchange: Exchange,
        wants: Sequence[Want],
        peers: Sequence[PeerId] | None,
        first: Sequence[PeerId] = (),
    ) -> None:
        self.on_kept: Callable[[int], None] | None = None
        """Called with the number of blocks left after each one that is kept."""
        self._exchange = exchange
        self._mesh = exchange.mesh
        self._limits = exchange.limits
        self._sizes = {want.cid: want.nbytes for want in wants}
        self._plan = Plan(wants, self._mesh.entropy(8), exchange.limits)
        self._only = peers
        self._first = first
        self._lines: dict[PeerId, _Line] = {}
        self._talking: dict[PeerId, None] = {}
        self._left: dict[PeerId, None] = {}
        """Who broke the rules."""
        self._keeping: dict[Cid, None] = {}
        self._storing = trio.Semaphore(exchange.limits.storing)
        self._ended = trio.Event()
        self._failure: MycelError | None = None
        self._news_at = trio.current_time()
        self._nursery: trio.Nursery

    async def run(self) -> None:
        """Fetch. Raises as `Exchange.fetch` says."""
        if self._plan.is_done:
            return
        async with trio.open_nursery() as self._nursery:
            self._nursery.start_soon(self._watch_peers)
            self._nursery.start_soon(self._watch_time)
            await self._ended.wait()
            self._nursery.cancel_scope.cancel()
        if self._failure is not None:
            raise self._failure

    def _end(self, failure: MycelError | None = None) -> None:
        self._failure = self._failure or failure
        self._ended.set()

    # --- peers

    async def _watch_peers(self) -> None:
        """Talk to members, and to those who come."""
        async with self._mesh.events() as events:
            self._meet_all()
            async for event in events:
                if isinstance(event, PeerUp):
                    self._meet(event.peer, event.access)

    def _meet_all(self) -> None:
        infos = dict(self._mesh.peers)
        early = [infos.pop(peer) for peer in dict.fromkeys(self._first) if peer in infos]
        for info in [*early, *infos.values()]:
            self._meet(info.peer, info.access)

    def _meet(self, peer: PeerId, access: Access) -> None:
        is_asked = access >= Access.MEMBER if self._only is None else peer in self._only
        if not is_asked or peer in self._talking or peer in self._left or peer in self._exchange.liars:
            return
        if len(self._talking) < self._limits.peers:
            self._talking[peer] = None
            self._nursery.start_soon(self._talk, peer)

    async def _talk(self, peer: PeerId) -> None:
        """Ask `peer` as long as it is connected and sound."""
        try:
            while peer in self._mesh.peers and peer not in self._exchange.liars:
                try:
                    await self._talk_once(peer)
                except RemoteProtocolError:
                    self._exchange.broken += 1
                    self._left[peer] = None
                    return
                except (StreamReset, ConnectionLost, Refused):
                    pass
                await trio.sleep(self._limits.retry_s)
        finally:
            del self._talking[peer]

    async def _talk_once(self, peer: PeerId) -> None:
        stream = await self._mesh.open_stream(peer, BLOCK_PROTOCOL)
        line = self._lines[peer] = _Line(stream)
        self._plan.add(peer)
        failure: MycelError | None = None
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(line.send, self._plan.left)
                try:
                    await self._listen(peer, stream)
                except (StreamReset, ConnectionLost, Refused, RemoteProtocolError) as error:
                    failure = error
                nursery.cancel_scope.cancel()
        finally:
            stream.reset()
            self._plan.drop(peer)
            del self._lines[peer]
        self._ask()
        if failure is not None:
            raise failure

    async def _listen(self, peer: PeerId, stream: Stream) -> None:
        while (message := await read(stream)) is not None:
            kind, cids, size = message
            if kind == "have":
                self._plan.on_have(peer, cids)
            elif kind == "gone":
                for cid in cids:
                    self._plan.on_gone(peer, cid)
            elif kind == "block":
                await self._take(peer, stream, cids[0], size)
            else:
                raise RemoteProtocolError(f"{kind!r} from a peer that was asked for blocks")
            self._ask()

    async def _take(self, peer: PeerId, stream: Stream, cid: Cid, size: int) -> None:
        """A block arrives: hand it on to be checked and kept."""
        if not self._plan.was_asked(peer, cid):
            raise RemoteProtocolError("a block that it was not asked for")
        wanted = self._sizes[cid]
        if wanted is not None and size != wanted:
            raise RemoteProtocolError(f"a block of {size} bytes instead of {wanted}")
        data = await stream.receive_exactly(size)
        self._plan.on_arrival(peer, cid, trio.current_time())
        if not self._plan.is_wanted(cid) or cid in self._keeping:
            self._plan.on_spare(peer, cid)
            return
        self._keeping[cid] = None
        await self._storing.acquire()  # the peer waits meanwhile: nothing is read
        self._nursery.start_soon(self._keep, peer, cid, data)

    async def _keep(self, peer: PeerId, cid: Cid, data: bytes) -> None:
        try:
            await self._exchange.store.put(cid, data)
        except CorruptBlock:
            self._exchange.note_corrupt(peer)
            self._plan.on_corrupt(peer, cid)
            if peer in self._lines:
                self._lines[peer].stream.reset()
        except MycelError as error:
            self._end(error)
        else:
            self._on_kept(cid, len(data))
        finally:
            del self._keeping[cid]
            self._storing.release()
        self._ask()

    def _on_kept(self, cid: Cid, nbytes: int) -> None:
        self._exchange.blocks_received += 1
        self._exchange.bytes_received += nbytes
        self._news_at = trio.current_time()
        for back in self._plan.on_stored(cid):
            self._lines[back.peer].say("back", back.cid)
        self._exchange.announce(cid)
        if self.on_kept is not None:
            self.on_kept(len(self._plan.left))
        if self._plan.is_done:
            self._end()

    def _ask(self) -> None:
        for ask in self._plan.asks(trio.current_time()):
            self._lines[ask.peer].say("get", ask.cid)

    # --- time

    async def _watch_time(self) -> None:
        """Free what silent peers were asked for; give up when nothing comes from anybody."""
        while True:
            await trio.sleep(LOOK_S)
            now = trio.current_time()
            if now - self._news_at >= self._limits.patience_s and not self._keeping:
                left = self._plan.left
                self._end(
                    DeadlineExceeded(
                        f"{len(left)} blocks did not come from {len(self._lines)} peers within "
                        f"{self._limits.patience_s:g} s, first {cid_text(left[0])}: connect to a peer that "
                        "has the model, then ask again; what came is kept"
                    )
                )
            self._plan.on_time(now)
            self._meet_all()  # those for whom there was no room
            self._ask()


class _Line:
    """What is to be said to one peer."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self._waiting: dict[Kind, list[Cid]] = {"back": [], "get": []}
        self._work = trio.Event()

    def say(self, kind: Kind, cid: Cid) -> None:
        """Tell the peer."""
        self._waiting[kind].append(cid)
        self._work.set()

    async def send(self, wants: list[Cid]) -> None:
        """Say what is wanted, then what comes up. Ends where the stream does: its reader says why."""
        try:
            await self.stream.send(write("want", wants))
            while True:
                await self._work.wait()
                self._work = trio.Event()
                for kind in self._waiting:
                    cids, self._waiting[kind] = self._waiting[kind], []
                    if cids:
                        await self.stream.send(write(kind, cids))
        except (StreamReset, ConnectionLost, Refused):
            return
