"""Who said what: the facts of all authors, their order, and their bounds. No streams here.

Each author numbers its statements, upwards also over its restarts; an older statement that arrives after a
newer one about the same key (two connections may overlap for a moment) changes nothing. An author may have a
bounded number of facts of a bounded size; one that says more has broken the protocol.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from mycel.protocol.board import Fact
from mycel.protocol.errors import RemoteProtocolError
from mycel.protocol.mesh import PeerId

FACTS_PER_AUTHOR_MAX = 256
"""A peer states a few facts per model it serves."""
KEY_CHARS_MAX = 256
VALUE_BYTES_MAX = 16 * 1024
"""A model's card takes about 500 bytes."""


class Statement(msgspec.Struct, frozen=True, array_like=True):
    """An author's word on one of its keys. `value` None withdraws it."""

    sequence: int
    key: str
    value: bytes | None


class Facts:
    """What is known."""

    def __init__(self) -> None:
        self._by_author: dict[PeerId, dict[str, Statement]] = {}

    def state(self, author: PeerId, statement: Statement) -> Fact | None:
        """Take a statement in; the change it makes, None where it makes none.

        Raises `RemoteProtocolError` when it breaks a bound.
        """
        check(statement)
        known = self._by_author.setdefault(author, {})
        before = known.get(statement.key)
        if before is not None and before.sequence >= statement.sequence:
            return None
        if before is None and len(known) >= FACTS_PER_AUTHOR_MAX:
            raise RemoteProtocolError(f"more than {FACTS_PER_AUTHOR_MAX} facts from {author}")
        known[statement.key] = statement
        old = None if before is None else before.value
        return None if old == statement.value else Fact(author, statement.key, statement.value)

    def forget(self, author: PeerId) -> list[Fact]:
        """The author is gone: its facts end. The changes."""
        known = self._by_author.pop(author, {})
        return [Fact(author, key, None) for key in sorted(known) if known[key].value is not None]

    def latest(self, author: PeerId) -> int:
        """The number of the author's latest statement, 0 where there is none."""
        return max((one.sequence for one in self._by_author.get(author, {}).values()), default=0)

    def of(self, author: PeerId) -> list[Statement]:
        """The author's statements, withdrawals included, ordered by key."""
        known = self._by_author.get(author, {})
        return [known[key] for key in sorted(known)]

    def under(self, prefix: str) -> Sequence[Fact]:
        """Facts whose key starts with `prefix`, ordered by (key, author)."""
        found = [
            Fact(author, key, statement.value)
            for author, known in self._by_author.items()
            for key, statement in known.items()
            if statement.value is not None and key.startswith(prefix)
        ]
        return sorted(found, key=lambda fact: (fact.key, fact.author))


def check(statement: Statement) -> None:
    """Raise `RemoteProtocolError` for a statement out of bounds."""
    if not 0 < len(statement.key) <= KEY_CHARS_MAX:
        raise RemoteProtocolError(f"a fact's key has 1 to {KEY_CHARS_MAX} characters")
    if statement.value is not None and len(statement.value) > VALUE_BYTES_MAX:
        raise RemoteProtocolError(
            f"a fact's value has at most {VALUE_BYTES_MAX} bytes, not {len(statement.value)}"
        )
