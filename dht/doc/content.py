"""What stands in one author's document: keys (words) with values (bytes).

An update is what one transaction of the writer changed; pycrdt writes it, and `Content` reads it. Overwritten
and deleted values leave marks in a CRDT; `rebuilt` leaves them behind: the live keys in order, written in one
transaction into a fresh document. Two nodes with the same content rebuild the same bytes, so an author may
compact its document without sending it again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from mycel.dht.doc.update import CLIENT_ID, ROOT, Update, read_update
from mycel.protocol.errors import RemoteProtocolError

if TYPE_CHECKING:
    from pycrdt import Doc, Map, TransactionEvent

VALUE_OVERHEAD = 16
"""Bytes that a live value takes in a snapshot beside its key and itself, at most."""


class Content:
    """The keys and values of one document, as its updates make them. After an error it is not to be used."""

    def __init__(self, updates: Sequence[bytes] = ()) -> None:
        self._live: dict[str, bytes] = {}
        self._bytes = 0
        self._changed: dict[str, None] = {}
        self._clock = 0
        self._latest: dict[str, int] = {}  # clock of each key's latest item, deleted ones included
        self._key_at: dict[int, str] = {}  # the other way round
        for update in updates:
            if update:  # the snapshot of an empty document is empty
                self.apply(update)

    @property
    def live(self) -> Mapping[str, bytes]:
        """Keys and values, in no particular order. Do not change it."""
        return self._live

    @property
    def live_bytes(self) -> int:
        """What a snapshot of it would take, at most."""
        return self._bytes

    def take_changed(self) -> list[str]:
        """Keys that were touched since this was asked last, in order."""
        changed, self._changed = self._changed, {}
        return sorted(changed)

    def apply(self, data: bytes) -> None:
        """Take in an update. Raises `RemoteProtocolError` for one that does not continue this document."""
        update = read_update(data)
        if update.items and update.clock != self._clock:
            raise RemoteProtocolError(f"an update for clock {update.clock} of a document at {self._clock}")
        replaced = self._add(update)
        for clock, count in update.deleted:
            if count > len(self._latest) + len(replaced):
                raise RemoteProtocolError("an update that deletes more than there is")
            for number in range(clock, clock + count):
                if replaced.pop(number, number) is not None:  # each item is deleted once
                    self._delete(number)

    def _add(self, update: Update) -> dict[int, None]:
        """Add the items; the clocks of those that they replaced."""
        replaced: dict[int, None] = {}
        for item in update.items:
            if item.key is not None:
                key = item.key
                if key in self._latest:
                    raise RemoteProtocolError("an update that begins a key for the second time")
            else:
                found = self._key_at.pop(item.origin, None)
                if found is None:
                    raise RemoteProtocolError("an update of a value that is not a key's latest")
                key = found
                replaced[item.origin] = None
            self._latest[key] = self._clock
            self._key_at[self._clock] = key
            self._clock += 1
            self._forget(key)
            self._live[key] = item.value
            self._bytes += _size(key, item.value)
        return replaced

    def _delete(self, clock: int) -> None:
        key = self._key_at.get(clock)
        if key is None or key not in self._live:
            raise RemoteProtocolError("an update that deletes what is not there")
        self._forget(key)

    def _forget(self, key: str) -> None:
        self._changed[key] = None
        old = self._live.pop(key, None)
        if old is not None:
            self._bytes -= _size(key, old)


class Writer:
    """Writes updates to a document that begins with `updates`, which this node wrote itself."""

    def __init__(self, updates: Sequence[bytes] = ()) -> None:
        from pycrdt import Doc, Map  # not when the daemon starts: it takes 60 ms

        self._doc: Doc[Map[bytes]] = Doc(client_id=CLIENT_ID)
        self._map = self._doc.get(ROOT, type=Map)
        for update in updates:
            if update:
                self._doc.apply_update(update)
        own = self._updates = list[bytes]()

        def keep(event: TransactionEvent) -> None:
            own.append(event.update)

        self._doc.observe(keep)

    def change(self, changes: Mapping[str, bytes | None]) -> bytes:
        """Set keys, or delete those whose value is None; the update, empty where nothing changes."""
        self._updates.clear()
        with self._doc.transaction():
            for key, value in changes.items():
                if value is not None:
                    self._map[key] = value
                elif key in self._map:
                    del self._map[key]
        return self._updates[0] if self._updates else b""


def rebuilt(live: Mapping[str, bytes]) -> bytes:
    """The canonical update that makes this content of nothing: equal content, equal bytes."""
    return Writer().change({key: live[key] for key in sorted(live)})


def _size(key: str, value: bytes) -> int:
    return len(key.encode()) + len(value) + VALUE_OVERHEAD
