"""The board: each node tells its own facts to every member it is connected to, and hears of the others.

One stream per peer carries an author's statements: all of them at first, then each change. A peer that
reads slowly gets the latest word on each key, not every word. When the connection to an author ends, its
facts end too, at once: failovers wait for that. They come again with the next connection, or with what the
author said later, as others pass it on: facts of members that are not connected are those of their sheets
(`mycel.dht.sheet`), which `mycel.dht.hearsay` brings.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager

import msgspec
import trio
from trio import TaskStatus

from mycel.dht.changes import Changes, Watches
from mycel.dht.facts import FACTS_PER_AUTHOR_MAX, KEY_CHARS_MAX, VALUE_BYTES_MAX, Facts, Statement, check
from mycel.dht.sheet import MayState, Sheets
from mycel.protocol.board import Fact
from mycel.protocol.errors import (
    ConnectionLost,
    LimitExceeded,
    Refused,
    RemoteProtocolError,
    StreamReset,
)
from mycel.protocol.mesh import Access, Mesh, PeerDown, PeerId, Stream

BOARD_PROTOCOL = "/mycel/board/1"

RETRY_S = 2.0
"""Before telling a peer again that ended the stream: it may not have settled our membership yet."""

REOPEN_S = 0.05
"""Before telling a peer again whose connection ended: it may have another one. If not, it is down by then."""

_STATEMENT_BYTES_MAX = VALUE_BYTES_MAX + 4 * KEY_CHARS_MAX + 32
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Statement)


def anybody(author: PeerId, chain: bytes) -> bool:
    """Everybody may state facts: for meshes that have no memberships."""
    return True


class SwarmBoard:
    """A `Board` over a `Mesh`. `run` must be running for facts to travel."""

    def __init__(self, mesh: Mesh, may_state: MayState = anybody) -> None:
        self._mesh = mesh
        self.sheets = Sheets(mesh.verify, may_state, self._hears)
        """Facts of authors that are not connected."""
        self._facts = Facts()
        self._sequence = int(mesh.wall() * 1000)
        self._watches = Watches()  # of all authors
        self._outboxes: dict[PeerId, Changes] = {}  # of peers: own facts
        self._inbound: dict[PeerId, Stream] = {}
        mesh.serve_stream(BOARD_PROTOCOL, self._listen)

    # --- Board

    def publish(self, key: str, value: bytes) -> None:
        """See `Board.publish`. Raises `LimitExceeded` for a fact, or a number of facts, out of bounds."""
        self._say(key, value)

    def withdraw(self, key: str) -> None:
        """See `Board.withdraw`."""
        if any(fact.key == key and fact.author == self._mesh.peer_id for fact in self._facts.under(key)):
            self._say(key, None)

    def facts(self, prefix: str) -> Sequence[Fact]:
        """See `Board.facts`."""
        heard = self.sheets.under(prefix)
        if not heard:
            return self._facts.under(prefix)
        return sorted([*self._facts.under(prefix), *heard], key=lambda fact: (fact.key, fact.author))

    def watch(self, prefix: str) -> AbstractAsyncContextManager[AsyncIterator[Fact]]:
        """See `Board.watch`. A slow reader gets the latest change of each fact."""
        return self._watches.watch(prefix)

    # --- hearsay

    def _hears(self, author: PeerId) -> bool:
        info = self._mesh.peers.get(author)
        return author == self._mesh.peer_id or (info is not None and info.access >= Access.MEMBER)

    def own_facts(self) -> Sequence[tuple[str, bytes]]:
        """Keys and values that this node states, ordered by key."""
        stated = self._facts.of(self._mesh.peer_id)
        return [(one.key, one.value) for one in stated if one.value is not None]

    def latest(self, author: PeerId) -> int:
        """The number of the latest statement of this node or of a connected author."""
        return self._facts.latest(author)

    def next_sequence(self) -> int:
        """A number for a further statement: of this node's calendar, and greater than all before."""
        self._sequence = max(self._sequence + 1, int(self._mesh.wall() * 1000))
        return self._sequence

    def tell(self, changes: Sequence[Fact]) -> None:
        """Give changes to those who watch."""
        for change in changes:
            self._watches.tell(change)

    def _say(self, key: str, value: bytes | None) -> None:
        statement = Statement(self.next_sequence(), key, value)
        try:
            check(statement)
            change = self._facts.state(self._mesh.peer_id, statement)
        except RemoteProtocolError as error:
            raise LimitExceeded(str(error)) from None
        if change is not None:
            self._watches.tell(change)
            for outbox in self._outboxes.values():
                outbox.put(change)

    # --- the service

    async def run(self, *, task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Push to every member until cancelled, and forget those that go."""
        async with trio.open_nursery() as nursery, self._mesh.events() as events:
            pushes: dict[PeerId, trio.CancelScope] = {}

            def push_to(peer: PeerId, access: Access) -> None:
                if peer in pushes:
                    pushes.pop(peer).cancel()
                if access >= Access.MEMBER:
                    self.tell(self.sheets.on_up(peer))
                if access >= Access.SUBMIT:
                    self._outboxes[peer] = Changes("")
                    pushes[peer] = trio.CancelScope()
                    nursery.start_soon(self._push, peer, pushes[peer])

            for info in list(self._mesh.peers.values()):
                push_to(info.peer, info.access)
            task_status.started()
            async for event in events:
                if isinstance(event, PeerDown):
                    if event.peer in pushes:
                        pushes.pop(event.peer).cancel()
                        del self._outboxes[event.peer]
                    self._forget(event.peer)
                else:
                    push_to(event.peer, event.access)

    def _forget(self, author: PeerId) -> None:
        self._inbound.pop(author, None)
        self.tell(self.sheets.on_down(author, self._facts.latest(author), trio.current_time()))
        self.tell(self._facts.forget(author))

    async def _push(self, peer: PeerId, scope: trio.CancelScope) -> None:
        """Tell `peer` everything, then every change; begin again when it ends the stream but stays."""
        with scope:
            while True:
                outbox = self._outboxes[peer] = Changes("")
                for statement in self._facts.of(self._mesh.peer_id):
                    outbox.put(Fact(self._mesh.peer_id, statement.key, statement.value))
                wait = RETRY_S
                try:
                    await self._push_from(outbox, await self._mesh.open_stream(peer, BOARD_PROTOCOL))
                except ConnectionLost:
                    wait = REOPEN_S
                except (StreamReset, Refused, RemoteProtocolError):
                    pass
                await trio.sleep(wait)

    async def _push_from(self, outbox: Changes, stream: Stream) -> None:
        stream.deliver_to(lambda data, error: None if data is not None else outbox.end(error))
        try:
            async for change in outbox:
                packed = _encoder.encode(Statement(self.next_sequence(), change.key, change.value))
                await stream.send(len(packed).to_bytes(4, "big") + packed)
        finally:
            stream.reset()

    async def _listen(self, stream: Stream) -> None:
        """An author's statements, until its stream ends."""
        author = stream.peer
        before = self._inbound.get(author)
        self._inbound[author] = stream
        if before is not None:
            before.reset()
        with contextlib.suppress(StreamReset, ConnectionLost):
            await self._listen_to(author, stream)

    async def _listen_to(self, author: PeerId, stream: Stream) -> None:
        count = 0
        while True:
            size = int.from_bytes(await stream.receive_exactly(4), "big")
            if size > _STATEMENT_BYTES_MAX:
                raise RemoteProtocolError(f"a statement of {size} bytes; {_STATEMENT_BYTES_MAX} are allowed")
            try:
                statement = _decoder.decode(await stream.receive_exactly(size))
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
                raise RemoteProtocolError(f"board statement: {error}") from None
            if self._inbound.get(author) is not stream:
                return  # the author is gone, or speaks over a newer stream
            change = self._facts.state(author, statement)
            if change is not None:
                self._watches.tell(change)
            count += 1
            if count % FACTS_PER_AUTHOR_MAX == 0:
                await trio.lowlevel.checkpoint()
