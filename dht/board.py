"""The board, pushed: each node tells its own facts to every member it is connected to.

One stream per peer carries an author's statements: all of them at first, then each change. A peer that
reads slowly gets the latest word on each key, not every word. When the connection to an author ends, its
facts end too, and come again with the next one. Facts travel one hop: nobody passes on what others said.
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


class PushBoard:
    """A `Board` over a `Mesh`. `run` must be running for facts to travel."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
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
        return self._facts.under(prefix)

    def watch(self, prefix: str) -> AbstractAsyncContextManager[AsyncIterator[Fact]]:
        """See `Board.watch`. A slow reader gets the latest change of each fact."""
        return self._watches.watch(prefix)

    def _say(self, key: str, value: bytes | None) -> None:
        self._sequence += 1
        statement = Statement(self._sequence, key, value)
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
        for change in self._facts.forget(author):
            self._watches.tell(change)

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
                self._sequence += 1
                packed = _encoder.encode(Statement(self._sequence, change.key, change.value))
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
