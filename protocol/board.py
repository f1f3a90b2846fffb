"""The board: short-lived facts that peers publish about themselves and watch of each other.

Who holds which layers, how fast, how loaded. compute/ needs just this of discovery; dht/ implements it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

from mycel.protocol.mesh import PeerId


@dataclass(frozen=True, slots=True)
class Fact:
    """One peer's statement under one key. `value` is msgpack; None in a change means withdrawn or gone."""

    author: PeerId
    key: str
    value: bytes | None


class Board(Protocol):
    """Each author writes its own facts only; a fact ends when withdrawn or when its author is gone."""

    def publish(self, key: str, value: bytes) -> None:
        """State `value` under `key` (slash-separated words) for this node, replacing what stood there."""

    def withdraw(self, key: str) -> None:
        """Take back this node's fact under `key`; nothing happens where there is none."""

    def facts(self, prefix: str) -> Sequence[Fact]:
        """Facts whose key starts with `prefix`, this node's own included, ordered by (key, author)."""

    def watch(self, prefix: str) -> AbstractAsyncContextManager[AsyncIterator[Fact]]:
        """Changes under `prefix` from the moment of entering, withdrawals included."""
