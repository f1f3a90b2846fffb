"""What an update may look like: the strict subset of Yjs' update encoding (v1) that documents are written in.

pycrdt decodes much more than Mycel writes, nested values among them, and by recursion: a 100 kB update of
arrays within arrays ends the process that applies it. So nothing from a peer reaches pycrdt unless it is

    clients (0 or 1), then structs, client 1, clock, and each struct an item with one buffer in it:
        info | left origin? | right origin? | root "doc" and key, without an origin | 1 | 't' | length | bytes
    deleted clients (0 or 1), then client 1, ranges, and each range: clock, length

with numbers as LEB128. Everything else is refused here.
"""

from __future__ import annotations

from mycel.protocol.errors import RemoteProtocolError

CLIENT_ID = 1
"""All updates of a document are its one author's, so every document has the same id: a byte, not eight."""
ROOT = "doc"

_CONTENT_MASK, _CONTENT_ANY = 0x1F, 8
_HAS_LEFT, _HAS_RIGHT, _HAS_KEY = 0x80, 0x40, 0x20
_BUFFER = ord("t")
_NUMBER_BITS = 53


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


def check_update(update: bytes) -> None:
    """Raise `RemoteProtocolError` for anything that a document is not written in."""
    reader = _Reader(update)
    try:
        if _client_follows(reader):
            count = reader.number()
            reader.expect(CLIENT_ID, "client")
            reader.number()  # clock
            for _ in range(count):
                _check_item(reader)
        if _client_follows(reader):
            reader.expect(CLIENT_ID, "client")
            for _ in range(reader.number()):
                reader.number()
                reader.number()
    except (IndexError, UnicodeDecodeError):
        raise RemoteProtocolError("an update that is cut short or whose key is no text") from None
    if reader.at != len(update):
        raise RemoteProtocolError("an update with something behind its end")


def _client_follows(reader: _Reader) -> bool:
    clients = reader.number()
    if clients > 1:
        raise RemoteProtocolError(f"an update of {clients} clients; a document has one")
    return clients == 1


def _check_item(reader: _Reader) -> None:
    info = reader.byte()
    if info & _CONTENT_MASK != _CONTENT_ANY:
        raise RemoteProtocolError("an update with other content than values")
    for origin in (_HAS_LEFT, _HAS_RIGHT):
        if info & origin:
            reader.expect(CLIENT_ID, "origin")
            reader.number()
    if not info & (_HAS_LEFT | _HAS_RIGHT):
        reader.expect(1, "parent")
        if reader.chunk() != ROOT.encode() or not info & _HAS_KEY:
            raise RemoteProtocolError("an update of something else than the document's keys")
        reader.chunk().decode()
    reader.expect(1, "count of values")
    if reader.byte() != _BUFFER:
        raise RemoteProtocolError("an update with a value that is not bytes")
    reader.chunk()
