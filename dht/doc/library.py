"""All documents that a node holds: what it takes in, what it refuses, what others lack. No streams here.

Only an author can write its document, because every part ends in its signed head, and because the author has
to show that it may write here at all. Everything else about a part is checked too before it changes anything,
and what does not hold is counted by its reason:

- `forged`: not signed by the author, or not what was signed;
- `foreign`: the author shows nothing that lets it write in this swarm;
- `oversized`: more than a document may have;
- `malformed`: an impossible version, or bytes that are no update;
- `full`: no room for one more author;
- `skewed`: of an edition that begins in the future, further than calendars may differ;
- `forked`: the author signed two different documents for one version; the one that was here first stays,
  until a later version settles it.

A node that got an old disk back, or lost its disk, hears of its own document from others. It takes it over,
and writes on top what it has written since it started. That this can never come too late, editions begin with
the calendar's milliseconds only once others were compared with; before, they are numbered from where the disk
ends, and a node without a document begins with a **provisional** edition, which is older than any proper one
and is told to nobody.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from mycel.dht.doc.document import Document, Forged, Unfit
from mycel.dht.doc.message import (
    NOWHERE,
    Head,
    Missing,
    Part,
    Vector,
    Version,
    first_digest,
    head_bytes,
    next_digest,
)
from mycel.dht.doc.store import DocumentStore
from mycel.dht.doc.terms import MayWrite, Refusal, Signer, Taken
from mycel.dht.doc.vector import StateVector
from mycel.protocol.board import Fact
from mycel.protocol.errors import LimitExceeded, RemoteProtocolError
from mycel.protocol.limits_doc import DEFAULT_DOCUMENT_LIMITS, DocumentLimits
from mycel.protocol.mesh import PeerId

VERSION_MAX = 1 << 62
"""Editions are milliseconds of the author's calendar; SQLite keeps 63 bits."""

PROVISIONAL_MAX = 1 << 32
"""Editions up to this are the author's alone: it wrote them without knowing what others have of it."""


class Library:
    """The documents of all authors, at one node."""

    def __init__(
        self,
        signer: Signer,
        store: DocumentStore,
        may_write: MayWrite,
        *,
        chain: bytes = b"",
        limits: DocumentLimits = DEFAULT_DOCUMENT_LIMITS,
    ) -> None:
        """Read what the store kept. `chain` shows others that this node may write."""
        self._signer = signer
        self._store = store
        self._may_write = may_write
        self._chain = chain
        self._limits = limits
        self._documents: dict[PeerId, Document] = {}
        self._saved: dict[PeerId, Version] = {}
        self._sizes: dict[PeerId, int] = {}
        self._bytes = 0
        self._written: dict[str, None] = {}
        self.vector = StateVector()
        """Where this library is with every author."""
        self.on_changes: Callable[[Sequence[Fact]], None] | None = None
        """Called with the changes of each part or write while it is set; each part then costs a look at all
        of its author's keys."""
        self.refused: dict[str, int] = {}
        """Parts that were not taken, by reason."""
        self._has_compared = False
        for whole in store.load():
            try:
                self._put(Document.of(whole))
                self._saved[whole.head.author] = whole.head.version
            except (RemoteProtocolError, Unfit):
                self._count("damaged")
                store.forget(whole.head.author)
        own = self._documents.get(signer.peer_id)
        if own is not None and own.version.edition <= PROVISIONAL_MAX:
            self._remember(own.live)

    # --- reading

    def version(self, author: PeerId) -> Version:
        """How far `author`'s document is here."""
        document = self._documents.get(author)
        return NOWHERE if document is None else document.version

    @property
    def size(self) -> int:
        """Bytes of all snapshots and logs."""
        return self._bytes

    def document(self, author: PeerId) -> Document | None:
        """What is held of `author`. Do not change it."""
        return self._documents.get(author)

    @property
    def authors(self) -> list[PeerId]:
        """Whose documents are here, in order."""
        return sorted(self._documents)

    def read(self, prefix: str) -> list[Fact]:
        """The merged view: what all authors say under keys that start so, ordered by (key, author)."""
        found = [
            Fact(author, key, value)
            for author, document in self._documents.items()
            for key, value in document.live.items()
            if key.startswith(prefix)
        ]
        return sorted(found, key=lambda fact: (fact.key, fact.author))

    # --- writing

    def write(self, changes: Mapping[str, bytes | None]) -> Version | None:
        """Set keys of the own document (None deletes); kept when this returns. The version before, for
        telling others; None where nothing changed.

        Raises `LimitExceeded` where the document would outgrow its bounds, or what the store raises: then
        nothing was written.
        """
        self._check(changes)
        own = self._documents.get(self._signer.peer_id) or self._begun()
        before = self.version(self._signer.peer_id)
        old = {key: own.live.get(key) for key in changes}
        update = own.write(changes)
        if not update:
            return None
        try:
            self._check_size(own)
            at = Version(own.head.edition, own.head.sequence + 1)
            head = self._sign(at, next_digest(own.head.digest, [update]))
            self._save(Part(head, 0, own.snapshot, (*own.log, update), own.chain), durable=True)
        except BaseException:  # why: what was not kept was not written, also when cancelled; raised again
            own.undo()
            raise
        own.settle(head, [update])
        self._put(own)
        self._remember(changes)
        own.take_changed()
        self._tell(own, old)
        longest = max(self._limits.log_bytes, len(own.snapshot))
        if own.log_bytes > longest or len(own.log) >= self._limits.log_updates:
            self.compact()
        return before

    def compact(self) -> None:
        """Let the own document forget its history. Others who have all of it need not be sent anything."""
        own = self._documents.get(self._signer.peer_id)
        if own is None:
            return
        is_proper = own.version.edition > PROVISIONAL_MAX or not self._has_compared
        if is_proper and not own.log and own.chain == self._chain:
            return
        compacted = own.compacted(self._next_edition(own.version.edition), self._sign, self._chain)
        self._save(compacted.whole(), durable=True)
        self._put(compacted)

    @property
    def has_compared(self) -> bool:
        """Whether others were asked for this node's own document since it started."""
        return self._has_compared

    def on_compared(self) -> None:
        """What others have of the own document is here now. Raises what the store raises."""
        self._has_compared = True
        own = self._documents.get(self._signer.peer_id)
        if own is not None and (own.version.edition <= PROVISIONAL_MAX or own.chain != self._chain):
            self.compact()

    def renew(self, chain: bytes) -> None:
        """Show another chain from now on: in a new edition, once it may begin one."""
        self._chain = chain
        if self._has_compared:
            self.on_compared()

    def _begun(self) -> Document:
        edition = self._next_edition(0)
        return Document(self._sign(Version(edition, 0), first_digest(edition, b"")), b"", (), self._chain)

    def _next_edition(self, last: int) -> int:
        if not self._has_compared:
            return last + 1
        now = int(self._signer.wall() * 1000)
        return now if self._is_skewed(last) else max(last + 1, now)

    def _is_skewed(self, edition: int) -> bool:
        return edition > (self._signer.wall() + self._limits.skew_s) * 1000

    def _remember(self, changes: Mapping[str, bytes | None]) -> None:
        """Which keys were written since the start, the latest ones."""
        for key in changes:
            self._written.pop(key, None)
            self._written[key] = None
        while len(self._written) > self._limits.log_updates:
            del self._written[next(iter(self._written))]

    def _sign(self, version: Version, digest: bytes) -> Head:
        author = self._signer.peer_id
        return Head(author, *version, digest, self._signer.sign(head_bytes(author, version, digest)))

    def _check(self, changes: Mapping[str, bytes | None]) -> None:
        for key, value in changes.items():
            if not 0 < len(key) <= self._limits.key_chars:
                raise LimitExceeded(
                    f"a key has 1 to {self._limits.key_chars} characters (documents.key_chars)"
                )
            if value is not None and len(value) > self._limits.value_bytes:
                raise LimitExceeded(
                    f"{key}: {len(value)} bytes, more than documents.value_bytes ="
                    f" {self._limits.value_bytes}; keep large things as blocks"
                )

    def _check_size(self, own: Document) -> None:
        if own.live_bytes > self._limits.content_bytes:
            raise LimitExceeded(
                f"this node's document would hold {own.live_bytes} bytes, more than documents.content_bytes ="
                f" {self._limits.content_bytes}; delete keys first"
            )

    # --- taking in

    def take(self, part: Part) -> Taken:
        """Take in what a peer passed on. Raises what the store raises; the part is here all the same."""
        author = part.head.author
        document = self._documents.get(author)
        if document is not None and part.head.version <= document.version:
            if part.head.version == document.version and part.head.digest != document.head.digest:
                return self._judge_fork(part.head)
            return Taken.KNOWN
        if document is None and part.snapshot is None:
            return Taken.GAP
        is_watched = self.on_changes is not None or author == self._signer.peer_id
        old = dict(document.live) if document is not None and is_watched else {}
        try:
            self._admit(part, document)
            now = Document.of(part) if document is None else document.continued(part)
        except Unfit:
            return Taken.GAP
        except Refusal as refusal:
            self._count(refusal.reason)
            return Taken.UNWANTED if refusal.reason in ("foreign", "full", "skewed") else Taken.REFUSED
        except RemoteProtocolError as error:
            self._count("forged" if isinstance(error, Forged) else "malformed")
            return Taken.REFUSED
        touched = now.take_changed() if now is document else [*now.take_changed(), *old]
        if now is not document:
            self._saved.pop(author, None)  # what is kept may be another history of the same edition
        self._put(now)
        self._save(now.whole(), durable=False)  # where this fails, the next one keeps this part too
        if author == self._signer.peer_id:
            self._recover(now, old)
        self._tell(now, {key: old.get(key) for key in touched})
        return Taken.NEWS

    def _judge_fork(self, head: Head) -> Taken:
        """Another document for the version that is here: whose doing it is, the signature tells."""
        is_signed = self._signer.verify(head.author, head.signed_bytes(), head.signature)
        self._count("forked" if is_signed else "forged")
        return Taken.KNOWN if is_signed else Taken.REFUSED

    def _recover(self, own: Document, old: Mapping[str, bytes]) -> None:
        """The own document came back from others: what was written since the start stands on top of it."""
        self._count("recovered")
        again = {key: old.get(key) for key in self._written if old.get(key) != own.live.get(key)}
        if again:
            self.write(again)

    def _admit(self, part: Part, document: Document | None) -> None:
        """Raise `Refusal` for a part that must not be looked into."""
        head, limits = part.head, self._limits
        if not (
            PROVISIONAL_MAX < head.edition < VERSION_MAX and 0 <= part.start <= head.sequence < VERSION_MAX
        ):
            raise Refusal("malformed")
        if not all(part.updates):
            raise Refusal("malformed")
        held = 0 if document is None or part.snapshot is not None else document.size
        if held + part.size > limits.document_bytes or len(part.chain) > limits.chain_bytes:
            raise Refusal("oversized")
        if document is None and len(self._documents) >= limits.authors:
            raise Refusal("full")
        replaced = self._sizes.get(head.author, 0) if part.snapshot is not None else 0
        if self._bytes - replaced + part.size > limits.total_bytes:
            raise Refusal("full")
        if self._is_skewed(head.edition):
            raise Refusal("skewed")
        chain = part.chain if part.chain or document is None else document.chain
        if not self._may_write(head.author, chain):
            raise Refusal("foreign")
        if not self._signer.verify(head.author, head.signed_bytes(), head.signature):
            raise Refusal("forged")

    def forget(self, author: PeerId) -> None:
        """Let go of an author who may not write here any more. Raises what the store raises."""
        document = self._documents.pop(author, None)
        if document is None:
            return
        self._bytes -= self._sizes.pop(author)
        self._saved.pop(author, None)
        self.vector.remove(author)
        self._store.forget(author)
        if self.on_changes is not None:
            self.on_changes([Fact(author, key, None) for key in sorted(document.live)])

    async def synced(self) -> None:
        """Until what this node wrote is safe from a loss of power. Raises what the store raises."""
        await self._store.synced()

    def _save(self, whole: Part, *, durable: bool) -> None:
        author = whole.head.author
        self._store.save(whole, self._saved.get(author), durable=durable)
        self._saved[author] = whole.head.version

    def _put(self, document: Document) -> None:
        author = document.head.author
        self._documents[author] = document
        self._bytes += document.size - self._sizes.get(author, 0)
        self._sizes[author] = document.size
        if document.version.edition > PROVISIONAL_MAX:
            self.vector.put(author, document.version)

    def _tell(self, document: Document, old: Mapping[str, bytes | None]) -> None:
        """Tell what became of the keys of `old`."""
        if self.on_changes is None:
            return
        author, live = document.head.author, document.live
        changes = [Fact(author, key, live.get(key)) for key in sorted(old) if old[key] != live.get(key)]
        if changes:
            self.on_changes(changes)

    def _count(self, reason: str) -> None:
        self.refused[reason] = self.refused.get(reason, 0) + 1

    # --- giving out

    def since(self, author: PeerId, version: Version) -> list[Part]:
        """What somebody lacks of `author` who is at `version`, in the order to take it."""
        document = self._documents.get(author)
        if document is None or document.version <= max(version, Version(PROVISIONAL_MAX, VERSION_MAX)):
            return []
        return document.since(version)

    def missing(self, vector: Vector) -> Missing:
        """What a peer lacks that is where `vector` says, as much as fits; and what this node lacks of it."""
        here = self.vector.of(vector.buckets)
        parts: list[Part] = []
        size, is_all = 0, True
        for author in sorted(here):
            found = self.since(author, Version(*vector.versions.get(author, NOWHERE)))
            if parts and size + sum(part.size for part in found) > self._limits.reply_bytes:
                is_all = False
                break
            size += sum(part.size for part in found)
            parts += found
        wants = {
            author: here.get(author, NOWHERE)
            for author, version in sorted(vector.versions.items())
            if Version(*version) > here.get(author, NOWHERE)
        }
        return Missing(parts, is_all, wants)
