"""Hearsay: facts of members that this node is not connected with, from those who are.

Who is connected hears an author itself (`mycel.dht.board`), at once and for as long as the connection stands.
The rest goes round as signed sheets, and only where somebody lacks them: now and then a node asks one member,
drawn at random, for the authors that it does not hear itself; it names those that it does by marks. The
member asks such an author for its sheet, or hands on one that it got in the same way, so words travel as many
hops as the mesh is wide. Where everybody is connected with everybody, the answer is empty.

What was learnt so is asked for again where it came from, before it runs out; and where that member hears of
the author no more, its facts end with it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from types import NoneType

import msgspec
import trio

from mycel.dht.board import SwarmBoard
from mycel.dht.sheet import (
    AUTHORS_MAX,
    MARK_BYTES,
    SHEET_BYTES_MAX,
    TTL_S,
    Sheet,
    Word,
    mark_of,
    read_sheet,
    sign_sheet,
)
from mycel.protocol.errors import LimitExceeded, MycelError, RemoteProtocolError
from mycel.protocol.mesh import Access, Mesh, PeerId
from mycel.protocol.method import Call, Method
from mycel.protocol.rpc import Rpc

ASK_S = 2.0
"""Between two questions, give or take half."""
CALL_S = 3.0
FRESH_S = 15.0
"""An author's sheet is fetched again for others when it is so old, or when the author has said more..."""
FETCH_S = 1.0
"""...but not more often than this."""
FETCH_MAX = 32
"""Authors whose sheets are fetched for one question. The next one gets the others."""
REPLY_BYTES_MAX = 512 * 1024
FACT_OVERHEAD = 16
"""Bytes that a fact takes in a sheet beside its key and value, at most."""


class Ask(msgspec.Struct, frozen=True, array_like=True):
    """What is there beyond those I hear myself (marks, one after the other) and what I know?"""

    hears: bytes
    known: dict[PeerId, int]


class Told(msgspec.Struct, frozen=True, array_like=True):
    """Words that are newer, and those of the known authors that are not heard of here."""

    words: list[Word]
    gone: list[PeerId]


ASK = Method("board.ask", Ask, Told, access=Access.SUBMIT, idempotent=True)
SHEET = Method("board.sheet", NoneType, Word, idempotent=True)


@dataclass(frozen=True, slots=True)
class Fetched:
    """The word of a connected author, for others."""

    word: Word
    sequence: int
    at: float


class Hearsay:
    """The service. `chain` is what shows others that this node belongs here."""

    def __init__(self, mesh: Mesh, rpc: Rpc, board: SwarmBoard, chain: Callable[[], bytes]) -> None:
        self._mesh = mesh
        self._rpc = rpc
        self._board = board
        self._chain = chain
        self._own: Fetched | None = None
        self._fetched: dict[PeerId, Fetched] = {}
        self._marks: dict[PeerId, bytes] = {}
        self.words = 0
        """Words handed out so far."""
        rpc.serve(ASK, self._on_ask)
        rpc.serve(SHEET, self._on_sheet)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Ask until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._ask_anybody)
            nursery.start_soon(self._ask_sources)
            task_status.started()

    # --- asking

    async def _ask_anybody(self) -> None:
        while True:
            await trio.sleep(ASK_S * (0.5 + self._draw(1 << 20) / (1 << 20)))
            self._board.tell(self._board.sheets.expire(trio.current_time()))
            members = self._members()
            if members:
                await self._ask(members[self._draw(len(members))])

    async def _ask_sources(self) -> None:
        while True:
            await trio.sleep(ASK_S)
            source = self._board.sheets.oldest_source(trio.current_time() - FRESH_S)
            if source is not None and source in self._mesh.peers:
                await self._ask(source)

    async def _ask(self, peer: PeerId) -> None:
        hears = b"".join(self._mark(author) for author in [*self._members(), self._mesh.peer_id])
        request = Ask(hears, self._board.sheets.known)
        asked, wall = trio.current_time(), self._mesh.wall()
        try:
            told = await self._rpc.call(peer, ASK, request, deadline_s=CALL_S)
        except MycelError:  # another one will do
            return
        for word in told.words:
            self._board.tell(self._board.sheets.take(word, peer, asked, wall))
        self._board.tell(self._board.sheets.on_gone(told.gone, peer, trio.current_time()))

    def _members(self) -> list[PeerId]:
        return sorted(peer for peer, info in self._mesh.peers.items() if info.access >= Access.MEMBER)

    def _mark(self, author: PeerId) -> bytes:
        mark = self._marks.get(author)
        if mark is None:
            if len(self._marks) > 4 * len(self._mesh.peers) + 64:
                self._marks.clear()
            mark = self._marks[author] = mark_of(author)
        return mark

    def _draw(self, count: int) -> int:
        return int.from_bytes(self._mesh.entropy(8), "big") % count

    # --- answering

    async def _on_ask(self, call: Call, request: Ask) -> Told:
        if len(request.known) > AUTHORS_MAX:
            raise LimitExceeded(
                f"a question that names {len(request.known)} authors; {AUTHORS_MAX} are allowed"
            )
        marks = range(0, len(request.hears), MARK_BYTES)
        hears = {request.hears[at : at + MARK_BYTES]: None for at in marks}
        direct = [one for one in self._members() if one != call.peer and self._mark(one) not in hears]
        await self._fetch(direct)
        now = trio.current_time()
        held = self._board.sheets.known
        words: list[Word] = []
        size = 0
        for author in [*direct, *sorted(held)]:
            word, sequence = self._word(author, held, now)
            if word is None or self._mark(author) in hears or sequence <= request.known.get(author, 0):
                continue
            if words and size + len(word.sheet) > REPLY_BYTES_MAX:
                break
            words.append(word)
            size += len(word.sheet)
        self.words += len(words)
        gone = [one for one in sorted(request.known) if one not in held and one not in self._mesh.peers]
        return Told(words, gone)

    def _word(self, author: PeerId, held: dict[PeerId, int], now: float) -> tuple[Word | None, int]:
        if author in held:
            return self._board.sheets.word(author, now), held[author]
        fetched = self._fetched.get(author)
        if fetched is None or now - fetched.at >= TTL_S:
            return None, 0
        return msgspec.structs.replace(fetched.word, age_s=now - fetched.at), fetched.sequence

    async def _fetch(self, authors: list[PeerId]) -> None:
        """Have recent words of connected authors here."""
        now = trio.current_time()
        for gone in [author for author in self._fetched if author not in self._mesh.peers]:
            del self._fetched[gone]
        due = [author for author in authors if self._is_due(author, now)]
        due.sort(key=lambda author: self._fetched[author].at if author in self._fetched else 0.0)
        async with trio.open_nursery() as nursery:
            for author in due[:FETCH_MAX]:
                nursery.start_soon(self._fetch_one, author)

    def _is_due(self, author: PeerId, now: float) -> bool:
        fetched = self._fetched.get(author)
        if fetched is None:
            return True
        age = now - fetched.at
        return age > FRESH_S or (age > FETCH_S and self._board.latest(author) > fetched.sequence)

    async def _fetch_one(self, author: PeerId) -> None:
        asked = trio.current_time()
        with contextlib.suppress(MycelError):  # without its word others go on with what they have
            word = await self._rpc.call(author, SHEET, None, deadline_s=CALL_S / 2)
            sheet = read_sheet(word)
            if sheet.author != author or len(word.sheet) > SHEET_BYTES_MAX:
                raise RemoteProtocolError(f"{author} handed out a sheet that is not its own")
            self._fetched[author] = Fetched(word, sheet.sequence, asked - word.age_s)

    async def _on_sheet(self, call: Call, request: None) -> Word:
        """This node's word, signed anew where it says something else or is a while old."""
        now = trio.current_time()
        own = self._own
        if own is None or now - own.at > FETCH_S or self._board.latest(self._mesh.peer_id) > own.sequence:
            facts, size = [], 0
            for key, value in self._board.own_facts():
                size += len(key.encode()) + len(value) + FACT_OVERHEAD
                if size < SHEET_BYTES_MAX:
                    facts.append((key, value))
            sequence = self._board.next_sequence()
            sheet = Sheet(self._mesh.peer_id, sequence, self._mesh.wall(), tuple(facts))
            own = self._own = Fetched(sign_sheet(sheet, self._mesh.sign, self._chain()), sequence, now)
        return msgspec.structs.replace(own.word, age_s=now - own.at)
