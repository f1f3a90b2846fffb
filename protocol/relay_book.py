"""A relay's book: who holds a reservation, which circuits stand, and who may have one more.

Pure: requests and the time come in, a grant or a `Status` comes out. Members of the swarm share all there is;
strangers together get a `STRANGERS`th of everything, and their circuits are bounded in time and bytes
whatever the owner allows members. A circuit counts for both of its ends, and so do the bytes on it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from mycel.protocol.limits_reach import RelayLimits
from mycel.protocol.mesh import Access, PeerId
from mycel.protocol.rate import Bucket
from mycel.protocol.relay import Limit, Status

STRANGERS = 4
"""Strangers together get one part in so many."""


@dataclass(frozen=True, slots=True)
class Place:
    """A reservation."""

    peer: PeerId
    access: Access
    until: float
    """Trio time."""


@dataclass(frozen=True, slots=True, eq=False)
class Booked:
    """A circuit that may be made."""

    source: PeerId
    target: PeerId
    strange: bool
    """Whether it counts as strangers'."""
    limit: Limit
    buckets: tuple[Bucket, ...]
    """What each byte on it is taken from."""


class Book:
    """The state of one relay."""

    def __init__(self, limits: RelayLimits, now: float) -> None:
        self._limits = limits
        self._places: dict[PeerId, Place] = {}
        self._circuits: list[Booked] = []
        self._ends: Counter[PeerId] = Counter()
        self._total = Bucket(limits.bytes_per_s, now)
        self._buckets: dict[PeerId, Bucket] = {}

    @property
    def places(self) -> int:
        """Reservations held."""
        return len(self._places)

    @property
    def circuits(self) -> int:
        """Circuits standing."""
        return len(self._circuits)

    def limit(self, access: Access) -> Limit:
        """What a circuit of peers of at least `access` may do."""
        limits = self._limits
        if access > Access.STRANGER:
            return Limit(int(limits.circuit_s), limits.circuit_bytes)
        return Limit(
            int(min(limits.circuit_s or limits.stranger_circuit_s, limits.stranger_circuit_s)),
            min(limits.circuit_bytes or limits.stranger_circuit_bytes, limits.stranger_circuit_bytes),
        )

    def reserve(self, peer: PeerId, access: Access, now: float) -> Place | Status:
        """A reservation, new or renewed."""
        self.expire(now)
        known = self._places.get(peer)
        if known is None:
            most = self._limits.reservations
            strange = access == Access.STRANGER
            taken = sum(place.access == Access.STRANGER for place in self._places.values()) if strange else 0
            if len(self._places) >= most or (strange and taken >= most // STRANGERS):
                return Status.RESERVATION_REFUSED
        place = self._places[peer] = Place(peer, access, now + self._limits.reservation_s)
        return place

    def release(self, peer: PeerId) -> bool:
        """`peer` is gone: its reservation ends. Returns whether it had one."""
        return self._places.pop(peer, None) is not None

    def expire(self, now: float) -> None:
        """Reservations that were not renewed end; their circuits go on."""
        for peer in [place.peer for place in self._places.values() if place.until <= now]:
            del self._places[peer]

    def connect(self, source: PeerId, access: Access, target: PeerId, now: float) -> Booked | Status:
        """Book a circuit from `source` to `target`; `end` it when it is over."""
        self.expire(now)
        place = self._places.get(target)
        if place is None:
            return Status.NO_RESERVATION
        least = min(access, place.access)
        strange = least == Access.STRANGER
        limits = self._limits
        full = len(self._circuits) >= limits.circuits or (
            strange and sum(one.strange for one in self._circuits) >= limits.circuits // STRANGERS
        )
        if full or self._is_full(source, access) or self._is_full(target, place.access):
            return Status.RESOURCE_LIMIT_EXCEEDED
        buckets = (self._total, self._bucket(source, now), self._bucket(target, now))
        booked = Booked(source, target, strange, self.limit(least), buckets if self._is_paced else ())
        self._circuits.append(booked)
        self._ends[source] += 1
        self._ends[target] += 1
        return booked

    def end(self, booked: Booked) -> None:
        """The circuit is over; nothing happens the second time."""
        if booked not in self._circuits:
            return
        self._circuits.remove(booked)
        for peer in (booked.source, booked.target):
            self._ends[peer] -= 1
            if not self._ends[peer]:
                del self._ends[peer]
                self._buckets.pop(peer, None)

    def _is_full(self, peer: PeerId, access: Access) -> bool:
        share = STRANGERS if access == Access.STRANGER else 1
        return self._ends[peer] >= max(1, self._limits.circuits_per_peer // share)

    @property
    def _is_paced(self) -> bool:
        return bool(self._limits.bytes_per_s or self._limits.bytes_per_s_per_peer)

    def _bucket(self, peer: PeerId, now: float) -> Bucket:
        bucket = self._buckets.get(peer)
        if bucket is None:
            bucket = self._buckets[peer] = Bucket(self._limits.bytes_per_s_per_peer, now)
        return bucket
