"""Where a node is with every author, and a short way to find out where two nodes differ.

Authors fall into buckets by a hash of their ids. Two nodes compare one short digest per bucket, and exchange
versions only for the buckets that differ.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

from mycel.dht.doc.message import BUCKET_BYTES, BUCKETS, Version, bucket_of
from mycel.protocol.mesh import PeerId


class StateVector:
    """Versions by author."""

    def __init__(self) -> None:
        self._buckets: list[dict[PeerId, Version]] = [{} for _ in range(BUCKETS)]
        self._digests: list[bytes | None] = [None] * BUCKETS

    def put(self, author: PeerId, version: Version) -> None:
        """`author`'s document is there now."""
        bucket = bucket_of(author)
        self._buckets[bucket][author] = version
        self._digests[bucket] = None

    def remove(self, author: PeerId) -> None:
        """`author`'s document is not here any more."""
        bucket = bucket_of(author)
        if self._buckets[bucket].pop(author, None) is not None:
            self._digests[bucket] = None

    @property
    def digests(self) -> bytes:
        """One digest per bucket, `BUCKET_BYTES` each."""
        return b"".join(self._digest(bucket) for bucket in range(BUCKETS))

    def _digest(self, bucket: int) -> bytes:
        known = self._digests[bucket]
        if known is None:
            lines = sorted(
                f"{author} {at.edition} {at.sequence}" for author, at in self._buckets[bucket].items()
            )
            known = hashlib.sha256("\n".join(lines).encode()).digest()[:BUCKET_BYTES]
            self._digests[bucket] = known
        return known

    def differing(self, digests: bytes) -> list[int]:
        """The buckets whose digest is another one there; all of them for digests of a wrong length."""
        return [
            bucket
            for bucket in range(BUCKETS)
            if digests[bucket * BUCKET_BYTES : (bucket + 1) * BUCKET_BYTES] != self._digest(bucket)
        ]

    def of(self, buckets: Iterable[int]) -> Mapping[PeerId, Version]:
        """Versions in some buckets; numbers that are no bucket's count for nothing."""
        wanted = sorted({bucket for bucket in buckets if 0 <= bucket < BUCKETS})
        return {author: at for bucket in wanted for author, at in self._buckets[bucket].items()}
