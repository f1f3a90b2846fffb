"""What stands in one author's document: keys (words) with values (bytes), kept by pycrdt.

An update is what one transaction of the writer changed. Overwritten and deleted values leave marks in a CRDT;
`rebuilt` leaves them behind: the live keys in order, written in one transaction into a fresh document. Two
nodes with the same content rebuild the same bytes, so an author may compact its document without sending
it again.
"""

from __future__ import annotations

from collections.abc import Mapping

from pycrdt import Doc, Map, MapEvent, TransactionEvent

from mycel.dht.doc.update import CLIENT_ID, ROOT, check_update
from mycel.protocol.errors import RemoteProtocolError

VALUE_OVERHEAD = 16
"""Bytes that a live value takes in a snapshot beside its key and itself, at most."""


class Content:
    """The keys and values of one document."""

    def __init__(self) -> None:
        self._doc: Doc[Map[bytes]] = Doc(client_id=CLIENT_ID)
        self._map = self._doc.get(ROOT, type=Map)
        self._mirror = _Mirror()
        self._updates: list[bytes] | None = None
        self._map.observe(self._mirror.on_event)

    @property
    def live(self) -> Mapping[str, bytes]:
        """Keys and values, in no particular order. Do not change it."""
        return self._mirror.live

    @property
    def live_bytes(self) -> int:
        """What a snapshot of it would take, at most."""
        return self._mirror.bytes

    def take_changed(self) -> list[str]:
        """Keys that were touched since this was asked last, in order."""
        changed, self._mirror.changed = self._mirror.changed, {}
        return sorted(changed)

    def apply(self, update: bytes) -> None:
        """Take in an update. Raises `RemoteProtocolError` for bytes that are none."""
        check_update(update)
        try:
            self._doc.apply_update(update)
        except (ValueError, RuntimeError) as error:
            raise RemoteProtocolError(f"an update that pycrdt refuses: {error}") from None

    def change(self, changes: Mapping[str, bytes | None]) -> bytes:
        """Set keys, or delete those whose value is None; the update that does the same elsewhere."""
        updates = self._own_updates()
        updates.clear()
        with self._doc.transaction():
            for key, value in changes.items():
                if value is not None:
                    self._map[key] = value
                elif key in self.live:
                    del self._map[key]
        return updates[0] if updates else b""

    def _own_updates(self) -> list[bytes]:
        """Where pycrdt puts each transaction's update, once somebody writes here."""
        if self._updates is None:
            updates = self._updates = []

            def keep(event: TransactionEvent) -> None:
                updates.append(event.update)

            self._doc.observe(keep)
        return self._updates


class _Mirror:
    """What is live, by pycrdt's events: reading it all anew would cost each update the whole document."""

    def __init__(self) -> None:
        self.live: dict[str, bytes] = {}
        self.bytes = 0
        self.changed: dict[str, None] = {}

    def on_event(self, event: MapEvent) -> None:
        keys: Mapping[str, Mapping[str, bytes]] = event.keys  # type: ignore[attr-defined]  # its stub lacks it
        for key, change in keys.items():
            self.changed[key] = None
            old = self.live.pop(key, None)
            if old is not None:
                self.bytes -= _size(key, old)
            if "newValue" in change:
                value = self.live[key] = bytes(change["newValue"])
                self.bytes += _size(key, value)


def _size(key: str, value: bytes) -> int:
    return len(key.encode()) + len(value) + VALUE_OVERHEAD


def rebuilt(live: Mapping[str, bytes]) -> bytes:
    """The canonical update that makes this content of nothing: equal content, equal bytes."""
    return Content().change({key: live[key] for key in sorted(live)})
