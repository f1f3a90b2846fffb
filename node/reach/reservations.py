"""A node's own reservations: which relays to ask, when to renew, and what to do when one dies.

Pure: events and the time come in, relays to ask come out. As many reservations as wanted are kept, each at
another relay, and where there is a choice each at another address, for a machine that dies takes all its
peers along. A relay that dies is replaced at once; one that refuses is left alone for a while, which doubles.
A reservation is renewed when half of its life is gone, and while renewing fails it still counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from multiaddr import Multiaddr

from mycel.protocol.limits_reach import RelayLimits
from mycel.protocol.mesh import PeerId

RENEWAL_MIN_S = 5.0
"""A reservation is not renewed more often than this, however short its life."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A relay that might be asked."""

    peer: PeerId
    place: str
    """Where it is: its IP address. Reservations at different places are better than at one."""


@dataclass(slots=True)
class Held:
    """A reservation that this node has."""

    relay: Candidate
    addrs: tuple[Multiaddr, ...]
    until: float
    renew_at: float


class Reservations:
    """The reservations of one node. Times are trio's."""

    def __init__(self, limits: RelayLimits) -> None:
        self._limits = limits
        self._held: dict[PeerId, Held] = {}
        self._asking: dict[PeerId, Candidate] = {}
        self._failures: dict[PeerId, int] = {}
        self._not_before: dict[PeerId, float] = {}
        self.wanted = 0

    @property
    def relays(self) -> Sequence[PeerId]:
        """Where this node holds a reservation, oldest first."""
        return list(self._held)

    @property
    def addrs(self) -> Sequence[Multiaddr]:
        """Where the reservations make this node callable, without its id."""
        return [addr for held in self._held.values() for addr in held.addrs]

    def knows(self, peer: PeerId) -> bool:
        """Whether `peer` is a relay that this node asked, and which did not refuse."""
        return peer in self._held or peer in self._asking

    def plan(self, candidates: Sequence[Candidate], now: float) -> list[Candidate]:
        """Relays to ask now, for a first time or again; each stays marked until granted, failed or lost."""
        for peer in [peer for peer, held in self._held.items() if held.until <= now]:
            del self._held[peer]
        self._forget({one.peer: one for one in candidates})
        due = [
            held.relay
            for held in self._held.values()
            if self.wanted and held.renew_at <= now and self._may(held.relay, now)
        ]
        lacking = self.wanted - len(self._held) - sum(peer not in self._held for peer in self._asking)
        for _ in range(max(0, lacking)):
            taken = [held.relay for held in self._held.values()] + [*self._asking.values(), *due]
            fresh = [one for one in candidates if self._may(one, now) and one not in taken]
            fresh = [one for one in fresh if one.peer not in self._held]
            if not fresh:
                break
            places = [one.place for one in taken]
            due.append(min(fresh, key=lambda one: places.count(one.place)))
        for one in due:
            self._asking[one.peer] = one
        return due

    def next_at(self, candidates: Sequence[Candidate]) -> float:
        """When `plan` may have something, unless something happens before; infinity where it must."""
        if not self.wanted:
            return math.inf
        times = [held.until for held in self._held.values()]
        times += [
            max(held.renew_at, self._not_before.get(peer, 0.0))
            for peer, held in self._held.items()
            if peer not in self._asking
        ]
        if len(self._held) < self.wanted:
            times += [self._not_before[one.peer] for one in candidates if one.peer in self._not_before]
        return min(times, default=math.inf)

    def on_granted(self, peer: PeerId, addrs: Sequence[Multiaddr], seconds: float, now: float) -> None:
        """`peer` gave or renewed a reservation for `seconds`."""
        relay = self._asking.pop(peer, None)
        if relay is None:
            return
        self._failures.pop(peer, None)
        self._not_before.pop(peer, None)
        renew_at = now + max(seconds / 2, RENEWAL_MIN_S)
        self._held[peer] = Held(relay, tuple(addrs), now + seconds, renew_at)

    def on_failed(self, peer: PeerId, now: float) -> None:
        """`peer` gave none; it is asked again after a while."""
        if self._asking.pop(peer, None) is None:
            return
        failures = self._failures[peer] = min(self._failures.get(peer, 0) + 1, 32)
        wait = min(self._limits.retry_s * 2.0 ** (failures - 1), self._limits.retry_max_s)
        self._not_before[peer] = now + wait

    def on_lost(self, peer: PeerId) -> bool:
        """`peer` is not connected any more; returns whether there was a reservation."""
        self._asking.pop(peer, None)
        return self._held.pop(peer, None) is not None

    def drop(self) -> None:
        """No reservation is wanted any more; relays forget theirs when their time is over."""
        self._held.clear()

    def _forget(self, candidates: Mapping[PeerId, Candidate]) -> None:
        """Waits of relays that are none any more."""
        for peer in [peer for peer in self._not_before if peer not in candidates and peer not in self._held]:
            del self._not_before[peer]
            self._failures.pop(peer, None)

    def _may(self, one: Candidate, now: float) -> bool:
        return one.peer not in self._asking and self._not_before.get(one.peer, 0.0) <= now
