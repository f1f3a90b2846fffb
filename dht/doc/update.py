"""Reading updates: the strict subset of Yjs' update encoding (v1) that documents are written in.

pycrdt writes updates and would apply them too, but it must not see what a peer sent: version 0.14.13 ends the
process on 100 kB of arrays within arrays (it recurses), and panics on five bytes (a client without structs).
What Mycel writes is little, so it is read here, and nothing but what its writer produces is accepted:

    clients (0 or 1), then structs, client 1, clock, and each struct an item with one buffer in it:
        info | origin, or root "doc" and key | 1 | 't' | length | bytes
    deleted clients (0 or 1), then client 1, ranges, and each range: clock, length

with numbers as LEB128. Items are numbered by the clock without a gap. An item whose origin is the latest item
of a key replaces its value; one without an origin begins a key. Deleted is what was replaced in the same
update, or the latest item of a key, each once.
"""

from __future__ import annotations

from dataclasses import dataclass

from mycel.protocol.errors import RemoteProtocolError

CLIENT_ID = 1
"""All updates of a document are its one author's, so every document has the same id: a byte, not eight."""
ROOT = "doc"

_CONTENT_MASK, _CONTENT_ANY = 0x1F, 8
_HAS_LEFT, _HAS_RIGHT, _HAS_KEY = 0x80, 0x40, 0x20
_BUFFER = ord("t")
_NUMBER_BITS = 53


@dataclass(frozen=True, slots=True)
class Item:
    """One value. It stands for a new `key`, or, where that is None, for the key of the item `origin`."""

    key: str | None
    origin: int
    value: bytes


@dataclass(frozen=True, slots=True)
class Update:
    """Items from `clock` on, and ranges (clock, length) of deleted ones."""

    clock: int
    items: list[Item]
    deleted: list[tuple[int, int]]


def read_update(data: bytes) -> Update:
    """Raise `RemoteProtocolError` for anything that a document is not written in."""
    reader = _Reader(data)
    update = Update(0, [], [])
    try:
        if reader.client_follows():
            count = reader.number()
            reader.expect(CLIENT_ID, "client")
            update = Update(reader.number(), [], [])
            if not count:
                raise RemoteProtocolError("an update that names a client and says nothing of it")
            for _ in range(count):
                update.items.append(_read_item(reader))
        if reader.client_follows():
            reader.expect(CLIENT_ID, "client")
            for _ in range(reader.number()):
                update.deleted.append((reader.number(), reader.number()))
    except (IndexError, UnicodeDecodeError):
        raise RemoteProtocolError("an update that is cut short or whose key is no text") from None
    if reader.at != len(data):
        raise RemoteProtocolError("an update with something behind its end")
    return update


def _read_item(reader: _Reader) -> Item:
    info = reader.byte()
    if info & _CONTENT_MASK != _CONTENT_ANY or info & _HAS_RIGHT:
        raise RemoteProtocolError("an update with something else than values of keys")
    key, origin = None, 0
    if info & _HAS_LEFT:
        reader.expect(CLIENT_ID, "origin")
        origin = reader.number()
    else:
        reader.expect(1, "parent")
        if reader.chunk() != ROOT.encode() or not info & _HAS_KEY:
            raise RemoteProtocolError("an update of something else than the document's keys")
        key = reader.chunk().decode()
    reader.expect(1, "count of values")
    if reader.byte() != _BUFFER:
        raise RemoteProtocolError("an update with a value that is not bytes")
    return Item(key, origin, reader.chunk())


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1]

    def number(self) -> int:
        value = shift = 0
        while shift <= _NUMBER_BITS:
            byte = self.byte()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7
        raise RemoteProtocolError("a number in an update is too large")

    def chunk(self) -> bytes:
        size = self.number()
        self.at += size
        if self.at > len(self.data):
            raise IndexError
        return self.data[self.at - size : self.at]

    def expect(self, value: int, what: str) -> None:
        if (found := self.number()) != value:
            raise RemoteProtocolError(f"an update whose {what} is {found}, not {value}")

    def client_follows(self) -> bool:
        clients = self.number()
        if clients > 1:
            raise RemoteProtocolError(f"an update of {clients} clients; a document has one")
        return clients == 1
