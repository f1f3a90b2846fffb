"""The routing table: k peers in each bucket, those that proved alive the longest (Maymounkov 2002, 2.2 and
4.1).

Bucket i holds peers that share exactly i leading bits with this node. Who answers is alive. A full bucket
keeps whom it has, for who stayed long stays longer; newcomers wait in a second row and take the place of one
who fails. Who fails is passed over at once when others ask for peers, so that the dead do not spread, and
loses its place when somebody waits for it or at the third failure.

A public network (/24, /48) has few places in a bucket, so that renting one does not buy a bucket. Private and
loopback addresses are not counted: whoever is in this house is not many by accident.

Pure: what happened and the time come in.
"""

from __future__ import annotations

import functools
import ipaddress
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from mycel.dht.kad.key import BITS, Key, key_of_peer, shared_bits
from mycel.protocol.limits import KadLimits
from mycel.protocol.mesh import PeerId

BITS_MAX = 14
"""Deeper buckets are never looked through by a name that falls into them: such names are dear to find."""


@dataclass(frozen=True, slots=True)
class Contact:
    """A peer and where it can be dialled: multiaddrs in their binary form, which nobody reads until then."""

    peer: PeerId
    addrs: tuple[bytes, ...] = ()

    @property
    def key(self) -> Key:
        """Where it stands."""
        return key_of_peer(self.peer)


@dataclass(slots=True)
class Entry:
    """A contact in the table."""

    contact: Contact
    key: Key
    host: str
    """Its IP address as this node sees it, "" where it is not known."""
    seen_at: float
    """When it last answered (trio time)."""
    failures: int = 0


class Bucket:
    """Peers at one distance."""

    def __init__(self) -> None:
        self.entries: dict[PeerId, Entry] = {}
        self.waiting: dict[PeerId, Entry] = {}
        self.looked_at = float("-inf")
        """When a lookup last went through it."""


class Table:
    """Whom this node knows."""

    def __init__(self, own: PeerId, limits: KadLimits) -> None:
        self._own = own
        self._key = key_of_peer(own)
        self._limits = limits
        self._buckets: dict[int, Bucket] = {}

    def __len__(self) -> int:
        return sum(len(bucket.entries) for bucket in self._buckets.values())

    def __contains__(self, peer: object) -> bool:
        return any(peer in bucket.entries for bucket in self._buckets.values())

    def on_alive(self, contact: Contact, host: str, now: float) -> bool:
        """A peer that answers questions proved alive. Whether it is in the table now."""
        if contact.peer == self._own:
            return False
        bucket = self._bucket_of(contact.key)
        known = bucket.entries.get(contact.peer)
        if known is not None:
            known.contact = contact if contact.addrs else known.contact
            known.seen_at, known.failures = now, 0
            known.host = host or known.host
            return True
        entry = Entry(contact, contact.key, host, now)
        bucket.waiting.pop(contact.peer, None)
        if self._admit(bucket, entry):
            return True
        bucket.waiting[contact.peer] = entry
        if len(bucket.waiting) > self._limits.bucket:
            del bucket.waiting[next(iter(bucket.waiting))]
        return False

    def _admit(self, bucket: Bucket, entry: Entry) -> bool:
        """Put `entry` into a free place, or into that of one who failed."""
        group = group_of(entry.host)
        if group:
            same = sum(group_of(one.host) == group for one in bucket.entries.values())
            if same >= self._limits.group:
                return False
        if len(bucket.entries) >= self._limits.bucket:
            failed = [one for one in bucket.entries.values() if one.failures]
            if not failed:
                return False
            worst = max(failed, key=lambda one: (one.failures, -one.seen_at))
            del bucket.entries[worst.contact.peer]
        bucket.entries[entry.contact.peer] = entry
        return True

    def on_failure(self, peer: PeerId) -> None:
        """A question to `peer` was not answered."""
        bucket = self._bucket_of(key_of_peer(peer))
        bucket.waiting.pop(peer, None)
        entry = bucket.entries.get(peer)
        if entry is None:
            return
        entry.failures += 1
        for other in reversed(list(bucket.waiting.values())):
            if self._admit(bucket, other):
                del bucket.waiting[other.contact.peer]
                break
        if entry.failures >= self._limits.failures:
            bucket.entries.pop(peer, None)

    def forget(self, peer: PeerId) -> None:
        """`peer` said itself that it answers no questions."""
        bucket = self._bucket_of(key_of_peer(peer))
        bucket.waiting.pop(peer, None)
        bucket.entries.pop(peer, None)

    def closest(self, key: Key, count: int) -> list[Contact]:
        """Up to `count` contacts nearest to `key`, nearest first; those whose last question failed only where
        there is nobody else."""
        good: list[Contact] = []
        for entries in self._outwards(key):
            near = {entry.key ^ key: entry.contact for entry in entries if not entry.failures}
            good += [near[distance] for distance in sorted(near)]
            if len(good) >= count:
                return good[:count]
        if good:
            return good
        failed = [entry for entries in self._outwards(key) for entry in entries]
        return [entry.contact for entry in sorted(failed, key=lambda entry: entry.key ^ key)[:count]]

    def _outwards(self, key: Key) -> Iterator[Collection[Entry]]:
        """All entries in groups, each nearer to `key` than the next.

        Nearest is the bucket that `key` falls into. Then come all deeper ones, which part from it at the same
        bit, and then the shallower ones, each parting from it a bit earlier.
        """
        home = shared_bits(self._key, key)
        yield self._entries(home)
        yield [entry for index in self._buckets if index > home for entry in self._entries(index)]
        for index in range(min(home, BITS) - 1, -1, -1):
            yield self._entries(index)

    def _entries(self, index: int) -> Collection[Entry]:
        bucket = self._buckets.get(index)
        return () if bucket is None else bucket.entries.values()

    def find(self, peer: PeerId) -> Contact | None:
        """The contact of `peer`, None where it is not in the table."""
        entry = self._bucket_of(key_of_peer(peer)).entries.get(peer)
        return None if entry is None else entry.contact

    def all(self) -> Sequence[Contact]:
        """Every contact, nearest bucket first."""
        return [
            entry.contact
            for index in sorted(self._buckets, reverse=True)
            for entry in self._buckets[index].entries.values()
        ]

    def unheard(self, since: float) -> list[Contact]:
        """Who was not heard of since then, longest silent first."""
        entries = [entry for bucket in self._buckets.values() for entry in bucket.entries.values()]
        stale = [entry for entry in entries if entry.seen_at < since or entry.failures]
        return [entry.contact for entry in sorted(stale, key=lambda entry: entry.seen_at)]

    def looked(self, key: Key, now: float) -> None:
        """A lookup went for `key`."""
        self._bucket_of(key).looked_at = now

    def looked_around(self, now: float) -> None:
        """A lookup went for this node itself, and so through its whole neighbourhood."""
        for index in range(self.neighbourhood, self._deepest + 1):
            bucket = self._buckets.get(index)
            if bucket is None:
                bucket = self._buckets[index] = Bucket()
            bucket.looked_at = now

    @property
    def neighbourhood(self) -> int:
        """The first bucket of those that hold this node's nearest: together no more than one bucket's fill.

        Buckets too deep for names of their own (`BITS_MAX`) count among them in any case.
        """
        index, held = self._deepest + 1, 0
        while index > 0:
            held += len(self._entries(index - 1))
            if held > self._limits.bucket:
                break
            index -= 1
        return min(index, BITS_MAX + 1)

    @property
    def _deepest(self) -> int:
        """The deepest bucket that has anybody, -1 where none has."""
        held = [index for index, bucket in self._buckets.items() if bucket.entries and index < BITS]
        return max(held, default=-1)

    def stale_buckets(self, since: float) -> list[int]:
        """Buckets that no lookup went through since then: each down to the deepest that has anybody."""
        found = []
        for index in range(self._deepest + 1):
            bucket = self._buckets.get(index)
            if bucket is None or bucket.looked_at < since:
                found.append(index)
        return found

    def _bucket_of(self, key: Key) -> Bucket:
        index = shared_bits(self._key, key)
        bucket = self._buckets.get(index)
        if bucket is None:
            bucket = self._buckets[index] = Bucket()
        return bucket


@functools.lru_cache(maxsize=16384)
def group_of(host: str) -> str:
    """The network a public address belongs to (/24, /48); "" for one that is not public, or none."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return ""
    if not address.is_global:
        return ""
    prefix = 24 if address.version == 4 else 48
    return str(ipaddress.ip_network((address, prefix), strict=False))
