"""One author's document at one node: snapshot, log, head, and the content they make.

A document grows by parts that end in a signed head. Nothing is taken in before the whole chain up to the head
holds, and before every update was read, so that bytes that are none do not get into a log and further.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from mycel.dht.doc.content import Content, Writer, rebuilt
from mycel.dht.doc.message import Head, Part, Version, first_digest, next_digest
from mycel.protocol.errors import RemoteProtocolError


class Unfit(Exception):
    """A part that does not continue what is held here; the whole document would do."""


class Forged(RemoteProtocolError):
    """Content that is not what its author's head was signed for."""


class Document:
    """What this node holds of one author's document."""

    def __init__(self, head: Head, snapshot: bytes, log: Sequence[bytes] = (), chain: bytes = b"") -> None:
        """Take over what the store kept. Raises `RemoteProtocolError` for content that is none."""
        self.head = head
        self.snapshot = snapshot
        self.log = list(log)
        self.log_bytes = sum(len(update) for update in self.log)
        self.chain = chain
        self._content = Content((snapshot, *self.log))
        self._writer: Writer | None = None
        self._earlier: tuple[Head, list[bytes]] | None = None
        """Head and log of the edition before, for those who stand somewhere in it."""

    @classmethod
    def of(cls, part: Part) -> Document:
        """The document that a whole part is. Raises `Unfit` for half a one, `Forged` for other
        content than its head stands for, `RemoteProtocolError` for such as pycrdt refuses."""
        if part.snapshot is None or part.start:
            raise Unfit("half a document")
        digest = next_digest(first_digest(part.head.edition, part.snapshot), part.updates)
        if digest != part.head.digest or len(part.updates) != part.head.sequence:
            raise Forged("a document that is not the one its head was signed for")
        return cls(part.head, part.snapshot, part.updates, part.chain)

    @property
    def version(self) -> Version:
        """How far it is."""
        return self.head.version

    @property
    def live(self) -> Mapping[str, bytes]:
        """Keys and values, in no particular order. Do not change it."""
        return self._content.live

    @property
    def live_bytes(self) -> int:
        """What a snapshot of it would take, at most."""
        return self._content.live_bytes

    def take_changed(self) -> list[str]:
        """Keys that updates touched since this was asked last, in order."""
        return self._content.take_changed()

    @property
    def size(self) -> int:
        """Bytes of snapshot and log."""
        return len(self.snapshot) + self.log_bytes

    def continued(self, part: Part) -> Document:
        """The document with `part` taken in: this one, or that of a new edition.

        The head's signature was checked. Raises `Unfit`, and as `of`.
        """
        if part.snapshot is not None and part.start == 0:
            return Document.of(part)
        if part.head.edition == self.head.edition:
            self._extend(part)
            return self
        if part.start:
            raise Unfit("the middle of another edition")
        snapshot = rebuilt(self.live)
        digest = next_digest(first_digest(part.head.edition, snapshot), part.updates)
        if digest != part.head.digest or len(part.updates) != part.head.sequence:
            raise Unfit("the end of the edition before was missed")
        following = Document(part.head, snapshot, part.updates, part.chain or self.chain)
        following._earlier = (self.head, self.log)
        return following

    def compacted(self, edition: int, sign: Callable[[Version, bytes], Head], chain: bytes) -> Document:
        """The own document in a new edition: what is live, and no history."""
        snapshot = rebuilt(self.live)
        head = sign(Version(edition, 0), first_digest(edition, snapshot))
        following = Document(head, snapshot, (), chain)
        following._earlier = (self.head, self.log)
        return following

    def _extend(self, part: Part) -> None:
        ours = self.head.sequence - part.start
        if ours < 0:
            raise Unfit("updates in between are missing")
        fresh = part.updates[ours:]
        if next_digest(self.head.digest, fresh) != part.head.digest:
            raise Unfit("another history")
        if self.head.sequence + len(fresh) != part.head.sequence:
            raise Forged("a head that miscounts its updates")
        self.append(part.head, fresh)

    def append(self, head: Head, updates: Sequence[bytes]) -> None:
        """Continue by `updates`, which `head` stands for. Raises `RemoteProtocolError`, nothing appended."""
        self._writer = None  # where the own document comes back from others
        try:
            for update in updates:
                self._content.apply(update)
        except RemoteProtocolError:
            self.undo()
            raise
        self.settle(head, updates)

    def write(self, changes: Mapping[str, bytes | None]) -> bytes:
        """Change keys of the own document; the update, empty where nothing changed.

        `settle` or `undo` must follow.
        """
        if self._writer is None:
            self._writer = Writer((self.snapshot, *self.log))
        update = self._writer.change(changes)
        if update:
            self._content.apply(update)
        return update

    def settle(self, head: Head, updates: Sequence[bytes]) -> None:
        """The updates that the content took in are part of the document now, and `head` stands for them."""
        self.log += updates
        self.log_bytes += sum(len(update) for update in updates)
        self.head = head

    def undo(self) -> None:
        """Let go of what the content took in beyond the log."""
        self._content = Content((self.snapshot, *self.log))
        self._writer = None

    def since(self, version: Version) -> list[Part]:
        """What somebody lacks who is at `version`, in the order to take it."""
        if version.edition == self.head.edition and version.sequence <= self.head.sequence:
            return [Part(self.head, version.sequence, None, tuple(self.log[version.sequence :]))]
        if self._earlier is not None:
            head, log = self._earlier
            if version.edition == head.edition and version.sequence <= head.sequence:
                rest = Part(head, version.sequence, None, tuple(log[version.sequence :]))
                following = Part(self.head, 0, None, tuple(self.log), self.chain)
                return [rest, following] if rest.updates else [following]
        return [self.whole()]

    def whole(self) -> Part:
        """All of it."""
        return Part(self.head, 0, self.snapshot, tuple(self.log), self.chain)
