"""Facts of authors that this node does not hear itself: their signed sheets, as others pass them on.

A sheet is everything that an author states at one moment, under one signature. It is worth something for
`TTL_S` from then on. Calendars differ by more than that, so each who passes it on says how old it is at least
by its own clock, counted from when it asked; one who lies can stretch it to what calendars may differ, and no
further. A newer sheet of an author replaces the one before, and an older one changes nothing.

When the connection to an author ends, its facts end, and only what it signed after that moment counts again:
otherwise what others have not yet noticed would bring the dead back. So it is, too, with a sheet that ran
out.

What does not hold is counted by its reason: `forged`, `foreign` (its author shows no membership),
`oversized`, `malformed`, `skewed` (calendars differ by too much) and `full` (no room for one more author). No
streams here.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from mycel.dht.facts import FACTS_PER_AUTHOR_MAX, Statement, check
from mycel.protocol.board import Fact
from mycel.protocol.errors import RemoteProtocolError
from mycel.protocol.identity import in_domain
from mycel.protocol.limits import DEFAULT_LIMITS
from mycel.protocol.mesh import PeerId

TTL_S = 60.0
"""How long an author's word counts where nobody brings a newer one."""
SHEET_BYTES_MAX = 256 * 1024
"""A peer with fifty models says 40 kB."""
CHAIN_BYTES_MAX = 4096
AUTHORS_MAX = 1024
"""Authors heard of through others; the mesh connects as many directly..."""
TOTAL_BYTES_MAX = 32 * 1024 * 1024
"""...and all their sheets together."""
MARK_BYTES = 8

MayState = Callable[[PeerId, bytes], bool]
"""Whether an author belongs here, by the chain that it shows."""


class Sheet(msgspec.Struct, frozen=True, array_like=True):
    """Everything that an author states."""

    author: PeerId
    sequence: int
    issued: float
    """By the author's calendar, seconds since 1970."""
    facts: tuple[tuple[str, bytes], ...]


class Word(msgspec.Struct, frozen=True, array_like=True):
    """A sheet as it was signed, and how old it is by the clocks of those who passed it on."""

    sheet: bytes
    signature: bytes
    chain: bytes
    age_s: float


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Sheet)


def sign_sheet(sheet: Sheet, sign: Callable[[bytes], bytes], chain: bytes) -> Word:
    """The author's word."""
    packed = _encoder.encode(sheet)
    return Word(packed, sign(in_domain("board", packed)), chain, 0.0)


def read_sheet(word: Word) -> Sheet:
    """The sheet, its signature not yet looked at. Raises `RemoteProtocolError` out of bounds."""
    try:
        sheet = _decoder.decode(word.sheet)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise RemoteProtocolError(f"a sheet that cannot be read: {error}") from None
    if len(sheet.facts) > FACTS_PER_AUTHOR_MAX:
        raise RemoteProtocolError(f"a sheet with more than {FACTS_PER_AUTHOR_MAX} facts")
    for key, value in sheet.facts:
        check(Statement(sheet.sequence, key, value))
    if not (0 < sheet.sequence < 1 << 62 and math.isfinite(sheet.issued) and 0 <= word.age_s < math.inf):
        raise RemoteProtocolError("a sheet with impossible numbers")
    return sheet


def mark_of(author: PeerId) -> bytes:
    """Eight bytes that stand for an author where many are named."""
    return hashlib.sha256(author.encode()).digest()[:MARK_BYTES]


@dataclass(frozen=True, slots=True)
class Held:
    """A sheet that was taken."""

    facts: Mapping[str, bytes]
    word: Word
    sequence: int
    signed_s: float
    """When, by this node's clock."""
    source: PeerId


class Sheets:
    """The sheets that one node holds. `now` is this node's clock, `wall` its calendar, in seconds."""

    def __init__(
        self,
        verify: Callable[[PeerId, bytes, bytes], bool],
        may_state: MayState,
        hears: Callable[[PeerId], bool],
    ) -> None:
        """`hears` says of whom this node hears itself: nobody else's word on them is taken."""
        self._hears = hears
        self._verify = verify
        self._may_state = may_state
        self._held: dict[PeerId, Held] = {}
        self._bytes = 0
        self._ended: dict[PeerId, tuple[float, int]] = {}
        """When what an author had said ended, and how far it was."""
        self.refused: dict[str, int] = {}
        """Sheets that were not taken, by reason."""

    @property
    def known(self) -> dict[PeerId, int]:
        """How far this node is with each author."""
        return {author: held.sequence for author, held in self._held.items()}

    def under(self, prefix: str) -> Sequence[Fact]:
        """Facts whose key starts with `prefix`, in no particular order."""
        return [
            Fact(author, key, value)
            for author, held in self._held.items()
            for key, value in held.facts.items()
            if key.startswith(prefix)
        ]

    def word(self, author: PeerId, now: float) -> Word | None:
        """The author's word to pass on, as old as it is; None where none is held."""
        held = self._held.get(author)
        return None if held is None else msgspec.structs.replace(held.word, age_s=now - held.signed_s)

    def oldest_source(self, before: float) -> PeerId | None:
        """Who told the oldest word, if that was signed before `before`."""
        held = min(self._held.values(), key=lambda one: (one.signed_s, one.source), default=None)
        return held.source if held is not None and held.signed_s < before else None

    def take(self, word: Word, source: PeerId, now: float, wall: float) -> list[Fact]:
        """Take a word in for which `source` was asked at `now`; the changes it makes."""
        if len(word.sheet) > SHEET_BYTES_MAX or len(word.chain) > CHAIN_BYTES_MAX:
            return self._refuse("oversized")
        try:
            sheet = read_sheet(word)
        except RemoteProtocolError:
            return self._refuse("malformed")
        if not self._is_news(sheet, now - word.age_s, now):
            return []
        reason = self._fault(word, sheet, wall)
        if reason:
            return self._refuse(reason)
        before = self._held.get(sheet.author)
        self._bytes += len(word.sheet) - (len(before.word.sheet) if before else 0)
        facts = dict(sheet.facts)
        self._held[sheet.author] = Held(facts, word, sheet.sequence, now - word.age_s, source)
        return _changes(sheet.author, before.facts if before else {}, facts)

    def _is_news(self, sheet: Sheet, signed_s: float, now: float) -> bool:
        held = self._held.get(sheet.author)
        ended_s, sequence = self._ended.get(sheet.author, (-math.inf, 0))
        last = max(sequence, held.sequence if held else 0)
        is_newer = sheet.sequence > last and signed_s > max(now - TTL_S, ended_s)
        return is_newer and not self._hears(sheet.author)

    def _fault(self, word: Word, sheet: Sheet, wall: float) -> str:
        before = self._held.get(sheet.author)
        added = len(word.sheet) - (len(before.word.sheet) if before else 0)
        if abs(wall - sheet.issued) > TTL_S + DEFAULT_LIMITS.clock_skew_s:
            return "skewed"
        if (before is None and len(self._held) >= AUTHORS_MAX) or self._bytes + added > TOTAL_BYTES_MAX:
            return "full"
        if not self._may_state(sheet.author, word.chain):
            return "foreign"
        return "" if self._verify(sheet.author, in_domain("board", word.sheet), word.signature) else "forged"

    def _refuse(self, reason: str) -> list[Fact]:
        self.refused[reason] = self.refused.get(reason, 0) + 1
        return []

    def on_up(self, author: PeerId) -> list[Fact]:
        """The author is connected: it speaks for itself. The changes."""
        self._ended.pop(author, None)
        return self._drop(author)

    def on_down(self, author: PeerId, sequence: int, now: float) -> list[Fact]:
        """The author's connection ended when it was so far. The changes."""
        self._end(author, sequence, now)
        return self._drop(author)

    def on_gone(self, authors: Iterable[PeerId], source: PeerId, now: float) -> list[Fact]:
        """`source` hears of these no more; the changes, where it was who told of them."""
        changes = []
        for author in authors:
            held = self._held.get(author)
            if held is not None and held.source == source:
                self._end(author, held.sequence, now)
                changes += self._drop(author)
        return changes

    def expire(self, now: float) -> list[Fact]:
        """Words that are too old end; the changes."""
        changes = []
        for author, held in list(self._held.items()):
            if held.signed_s <= now - TTL_S:
                self._end(author, held.sequence, now)
                changes += self._drop(author)
        return changes

    def _end(self, author: PeerId, sequence: int, now: float) -> None:
        self._ended.pop(author, None)
        self._ended[author] = (now, sequence)
        if len(self._ended) > AUTHORS_MAX:
            del self._ended[next(iter(self._ended))]

    def _drop(self, author: PeerId) -> list[Fact]:
        held = self._held.pop(author, None)
        if held is None:
            return []
        self._bytes -= len(held.word.sheet)
        return _changes(author, held.facts, {})


def _changes(author: PeerId, old: Mapping[str, bytes], new: Mapping[str, bytes]) -> list[Fact]:
    return [Fact(author, key, new.get(key)) for key in sorted({**old, **new}) if old.get(key) != new.get(key)]
