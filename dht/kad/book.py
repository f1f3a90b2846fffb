"""What this node keeps for others: records, and who provides what. Bounded in every direction.

A record replaces an older one of its name and nothing else. One author has a quota of records and bytes at
this node, all together another; a new name over a quota is refused, a newer version of one that is held is
taken where its growth fits. Providers say it of themselves only, and expire. Nothing here is trusted to a
peer's clock: records come with an expiry that was checked, providers with this node's own.

Pure: the times come in, calendar seconds for records (`wall`), trio's for the rest (`now`).
"""

from __future__ import annotations

from dataclasses import dataclass

from mycel.dht.kad.record import Record
from mycel.dht.kad.table import Contact
from mycel.protocol.errors import Refused
from mycel.protocol.limits import KadLimits
from mycel.protocol.mesh import PeerId


@dataclass(slots=True)
class Kept:
    """A record that is held."""

    record: Record
    told_at: float
    """When somebody last told it (trio time): another replica did so for all then."""


@dataclass(slots=True)
class Usage:
    """What an author takes."""

    records: int = 0
    bytes: int = 0


class RecordBook:
    """Records of all authors."""

    def __init__(self, limits: KadLimits) -> None:
        self._limits = limits
        self._kept: dict[bytes, Kept] = {}
        self._usage: dict[PeerId, Usage] = {}
        self._total = Usage()

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def size(self) -> int:
        """Bytes of all records."""
        return self._total.bytes

    def get(self, name: bytes, wall: float) -> Record | None:
        """The record under `name` that has not expired."""
        kept = self._kept.get(name)
        if kept is None or kept.record.expires <= wall:
            return None
        return kept.record

    def take(self, record: Record, wall: float, now: float) -> Record:
        """Keep a checked record unless a newer one is held; returns the one that is held then.

        Raises `Refused` with reason "quota" (of its author) or "full".
        """
        before = self._kept.get(record.name)
        if before is not None and before.record.expires > wall and before.record.order >= record.order:
            if before.record.order == record.order:
                before.told_at = now
            return before.record
        if before is None and self._total.records >= self._limits.records:
            self.expire(wall)
        size, old_size = _size(record), 0 if before is None else _size(before.record)
        usage = self._usage.get(record.author, Usage())
        more = int(before is None)
        if (
            usage.records + more > self._limits.author_records
            or usage.bytes + size - old_size > self._limits.author_bytes
        ):
            raise Refused(f"{record.author} has its quota of records here", reason="quota")
        if (
            self._total.records + more > self._limits.records
            or self._total.bytes + size - old_size > self._limits.record_bytes
        ):
            raise Refused("this peer holds as many records as it will", reason="full")
        self._count(record.author, more, size - old_size)
        self._kept[record.name] = Kept(record, now)
        return record

    def expire(self, wall: float) -> None:
        """Drop what expired."""
        for name in [name for name, kept in self._kept.items() if kept.record.expires <= wall]:
            record = self._kept.pop(name).record
            self._count(record.author, -1, -_size(record))

    def due(self, before: float, count: int) -> list[Record]:
        """Up to `count` records that nobody has told since `before`, the longest untold first."""
        untold = [kept for kept in self._kept.values() if kept.told_at < before]
        untold.sort(key=lambda kept: kept.told_at)
        return [kept.record for kept in untold[:count]]

    def hand_over(self) -> None:
        """Every record is due to be told: this node keeps them no longer."""
        for kept in self._kept.values():
            kept.told_at = float("-inf")

    def told(self, name: bytes, now: float) -> None:
        """This node told the record to its replicas."""
        if name in self._kept:
            self._kept[name].told_at = now

    def _count(self, author: PeerId, records: int, size: int) -> None:
        usage = self._usage.setdefault(author, Usage())
        for one in (usage, self._total):
            one.records += records
            one.bytes += size
        if not usage.records:
            del self._usage[author]


def _size(record: Record) -> int:
    return len(record.name) + len(record.raw)


class ProviderBook:
    """Who provides what."""

    def __init__(self, limits: KadLimits) -> None:
        self._limits = limits
        self._keys: dict[bytes, dict[PeerId, tuple[Contact, float]]] = {}
        self._counts: dict[PeerId, int] = {}

    def __len__(self) -> int:
        return sum(self._counts.values())

    def add(self, name: bytes, contact: Contact, now: float) -> None:
        """`contact` says that it provides `name`; good for `provider_s` from now.

        Raises `Refused` with reason "name", "quota" (of that peer) or "full".
        """
        if not 0 < len(name) <= self._limits.name_bytes:
            raise Refused(f"what is provided is named by 1 to {self._limits.name_bytes} bytes", reason="name")
        known = self._keys.get(name, {})
        if contact.peer not in known:
            if self._counts.get(contact.peer, 0) >= self._limits.provider_keys:
                raise Refused(f"{contact.peer} has its quota of provided keys here", reason="quota")
            if len(known) >= self._limits.providers or (
                not known and len(self._keys) >= self._limits.provided_keys
            ):
                raise Refused("this peer holds as many providers as it will", reason="full")
            self._counts[contact.peer] = self._counts.get(contact.peer, 0) + 1
        self._keys.setdefault(name, known)[contact.peer] = (contact, now + self._limits.provider_s)

    def get(self, name: bytes, now: float) -> list[Contact]:
        """Who provides `name`, the freshest word first."""
        known = [one for one in self._keys.get(name, {}).values() if one[1] > now]
        return [contact for contact, _ in sorted(known, key=lambda one: -one[1])]

    def expire(self, now: float) -> None:
        """Drop what expired."""
        for name in list(self._keys):
            known = self._keys[name]
            for peer in [peer for peer, (_, until) in known.items() if until <= now]:
                del known[peer]
                self._counts[peer] -= 1
                if not self._counts[peer]:
                    del self._counts[peer]
            if not known:
                del self._keys[name]
