"""What peers say about documents: heads, parts, and the calls that carry them.

A document's history is a hash chain. An edition begins with a snapshot, and each update continues it:

    digest(0)   = SHA-256("mycel doc snapshot" || edition, u64 || snapshot)
    digest(n)   = SHA-256(digest(n - 1) || update n)

The author's head signs (edition, sequence, digest), so it stands for the snapshot and every update after it,
and whoever passes them on can neither add nor leave out nor change anything. (edition, sequence) is the
document's version; a later one replaces an earlier one. Compaction is a new edition whose snapshot holds what
was live.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable
from typing import NamedTuple

import msgspec

from mycel.protocol.identity import in_domain
from mycel.protocol.mesh import PeerId
from mycel.protocol.method import Method

BUCKETS = 64
"""Authors are compared in so many groups: a few changes among thousands of authors cost the vectors of the
groups that differ, not all."""
BUCKET_BYTES = 8

_signed = msgspec.msgpack.Encoder()


class Version(NamedTuple):
    """How far a document is; later versions are greater."""

    edition: int
    sequence: int


NOWHERE = Version(0, 0)
"""Before every document."""


class Head(msgspec.Struct, frozen=True, array_like=True):
    """The author's word on its document at one version."""

    author: PeerId
    edition: int
    sequence: int
    digest: bytes
    signature: bytes

    @property
    def version(self) -> Version:
        """Where the document is."""
        return Version(self.edition, self.sequence)

    def signed_bytes(self) -> bytes:
        """What the signature is over."""
        return head_bytes(self.author, self.version, self.digest)


class Part(msgspec.Struct, frozen=True, array_like=True):
    """A head, and what leads to it from sequence `start` of its edition.

    `snapshot` None with `start` 0: whoever stands at the end of the edition before can rebuild it.
    """

    head: Head
    start: int
    snapshot: bytes | None
    updates: tuple[bytes, ...]
    chain: bytes = b""
    """What shows that the author may write here, as membership chains do; at an edition's beginning only."""

    @property
    def size(self) -> int:
        """Bytes of content."""
        return len(self.snapshot or b"") + sum(len(update) for update in self.updates)


class PushParts(msgspec.Struct, array_like=True):
    """News."""

    parts: list[Part]


class PushReply(msgspec.Struct, array_like=True):
    """The authors of whom nothing was news there."""

    knew: list[PeerId]


class Compare(msgspec.Struct, array_like=True):
    """A digest of everything that the asker holds, by bucket; empty: nothing at all."""

    buckets: bytes


class Differing(msgspec.Struct, array_like=True):
    """The buckets that differ."""

    buckets: list[int]


class Vector(msgspec.Struct, array_like=True):
    """Where the asker is with every author of some buckets."""

    buckets: list[int]
    versions: dict[PeerId, Version]


class Missing(msgspec.Struct, array_like=True):
    """What the asker lacks (`is_all` False: as much as fits), and what the answerer does: from where on."""

    parts: list[Part]
    is_all: bool
    wants: dict[PeerId, Version]


PUSH = Method("doc.push", PushParts, PushReply, idempotent=True)
COMPARE = Method("doc.compare", Compare, Differing, idempotent=True)
SYNC = Method("doc.sync", Vector, Missing, idempotent=True)


def head_bytes(author: PeerId, version: Version, digest: bytes) -> bytes:
    """The bytes that an author signs for its head."""
    return in_domain("document", _signed.encode([author, *version, digest]))


def first_digest(edition: int, snapshot: bytes) -> bytes:
    """The digest (32 bytes) at sequence 0 of an edition."""
    return hashlib.sha256(b"mycel doc snapshot" + struct.pack(">Q", edition) + snapshot).digest()


def next_digest(digest: bytes, updates: Iterable[bytes]) -> bytes:
    """The digest after further updates."""
    for update in updates:
        digest = hashlib.sha256(digest + update).digest()
    return digest


def bucket_of(author: PeerId) -> int:
    """The bucket of an author."""
    return hashlib.sha256(author.encode()).digest()[0] % BUCKETS
