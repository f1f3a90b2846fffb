"""What stands in one author's document: keys (words) with values (bytes), kept by pycrdt.

An update is what one transaction of the writer changed. Overwritten and deleted values leave marks in a CRDT;
`rebuilt` leaves them behind: the live keys in order, written in one transaction into a fresh document. Two
replicas with the same content rebuild the same bytes, so an author may compact its document without sending
it again.
"""

from __future__ import annotations

from collections.abc import Mapping

from pycrdt import Doc, Map, TransactionEvent

from mycel.dht.doc.update import CLIENT_ID, ROOT, check_update
from mycel.protocol.errors import RemoteProtocolError


class Content:
    """The keys and values of one document."""

    def __init__(self) -> None:
        self._doc: Doc[Map[bytes]] = Doc(client_id=CLIENT_ID)
        self._map = self._doc.get(ROOT, type=Map)
        self._live: dict[str, bytes] | None = {}

    def apply(self, update: bytes) -> None:
        """Take in an update. Raises `RemoteProtocolError` for bytes that are none."""
        check_update(update)
        try:
            self._doc.apply_update(update)
        except (ValueError, RuntimeError) as error:
            raise RemoteProtocolError(f"an update that pycrdt refuses: {error}") from None
        finally:
            self._live = None

    def change(self, changes: Mapping[str, bytes | None]) -> bytes:
        """Set keys, or delete those whose value is None; the update that does the same elsewhere."""
        updates: list[bytes] = []

        def keep(event: TransactionEvent) -> None:
            updates.append(event.update)

        live = self.live
        subscription = self._doc.observe(keep)
        try:
            with self._doc.transaction():
                for key, value in changes.items():
                    if value is not None:
                        self._map[key] = value
                    elif key in live:
                        del self._map[key]
        finally:
            self._doc.unobserve(subscription)
        self._live = None
        return updates[0] if updates else b""

    @property
    def live(self) -> Mapping[str, bytes]:
        """Keys and values, ordered by key."""
        if self._live is None:
            found = self._map.to_py() or {}
            self._live = {
                key: bytes(found[key]) for key in sorted(found) if isinstance(found[key], bytes | bytearray)
            }
        return self._live


def rebuilt(live: Mapping[str, bytes]) -> bytes:
    """The canonical update that makes this content of nothing: equal content, equal bytes."""
    return Content().change({key: live[key] for key in sorted(live)})
