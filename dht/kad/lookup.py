"""An iterative lookup along disjoint paths (Baumgart and Mies, S/Kademlia 2007, 4.4): deciding, not asking.

A lookup looks for the `width` peers nearest to a key. Each path has its own list of candidates and asks from
its front; a peer is asked once, by the path that comes first, and only that path takes the peers it names. So
a liar who names only friends leads one path astray, and the others still arrive. What all paths found counts
together at the end.

A path has one question out while it gets nearer, and several once it does not: then the rest of its front
must be asked anyway. A question that is late (its time comes with it, see `mycel.dht.kad.pace`) holds nothing
up: the path asks the next candidate as if the late one were not there, and takes the answer when it comes. A
path is done when everybody in its front who is neither late nor failed has answered. Only where most of all
candidates are late are they waited for: then this node is slow, and not they.

Pure: what happened and the time come in, whom to ask comes out.
"""

from __future__ import annotations

import bisect
import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from mycel.dht.kad.key import Key
from mycel.dht.kad.table import Contact
from mycel.protocol.limits import KadLimits
from mycel.protocol.mesh import PeerId


class State(enum.Enum):
    """What is known of a candidate in this lookup."""

    FRESH = "fresh"
    ASKED = "asked"
    LATE = "late"
    ANSWERED = "answered"
    FAILED = "failed"


PASSED_OVER = (State.LATE, State.FAILED)
"""States of those that the lookup goes on without."""


@dataclass(slots=True)
class Candidate:
    """A peer that may be near. One object for all paths that know it."""

    contact: Contact
    distance: int
    hops: int
    """Answers that led here: 0 for those this node knew."""
    state: State = State.FRESH
    path: int = -1
    """The path that asked it."""
    late_at: float = float("inf")


@dataclass(slots=True)
class Path:
    """One way to the key."""

    front: list[tuple[int, Candidate]] = field(default_factory=list)
    """Candidates behind their distances, nearest first."""
    known: dict[PeerId, None] = field(default_factory=dict)
    nearest: int = 1 << 256
    """The smallest distance that an answer on this path named."""
    is_nearing: bool = True
    """Whether the last answer named somebody nearer."""


class Lookup:
    """One lookup. `own` is this node, who is never a candidate."""

    def __init__(
        self, target: Key, own: PeerId, seeds: Sequence[Contact], limits: KadLimits, width: int
    ) -> None:
        self.target = target
        self._own = own
        self._limits = limits
        self._width = width
        self._candidates: dict[PeerId, Candidate] = {}
        self._paths = [Path() for _ in range(limits.paths)]
        self._out: dict[PeerId, Candidate] = {}
        """Whose questions are under way, late ones included."""
        self._late = self._failed = self._answered = 0
        self._stopped = False
        self._asked = 0
        for number, seed in enumerate(sorted(seeds, key=lambda seed: seed.key ^ target)):
            self._learn(self._paths[number % limits.paths], seed, 0)

    def widen(self, width: int) -> None:
        """Look for more peers than so far."""
        self._width = max(width, self._width)
        self._stopped = False

    def stop(self) -> None:
        """Enough was found."""
        self._stopped = True

    def plan(self, now: float) -> list[Contact]:
        """Whom to ask now, each with `asked` to follow at once. Notes who is late."""
        for candidate in self._out.values():
            if candidate.state is State.ASKED and candidate.late_at <= now:
                candidate.state = State.LATE
                self._late += 1
        if self._stopped:
            return []
        asks: list[Contact] = []
        free = self._limits.questions - len(self._out)
        free = min(free, self._limits.lookup_questions - self._asked)
        for number, path in enumerate(self._paths):
            if len(asks) >= free:
                break
            front = self._front(path)
            out = sum(one.state is State.ASKED and one.path == number for one in front)
            most = 1 if path.is_nearing else self._at_once()
            for candidate in front:
                if out >= most or len(asks) >= free:
                    break
                if candidate.state is State.FRESH:
                    candidate.state, candidate.path = State.ASKED, number
                    self._out[candidate.contact.peer] = candidate
                    asks.append(candidate.contact)
                    out += 1
        self._asked += len(asks)
        return asks

    def _at_once(self) -> int:
        """Questions that a path has out where it must ask its whole front: its share, and more where many of
        the asked do not answer, for of the next ones as many will not."""
        share = self._width / len(self._paths)
        return math.ceil(share * (1 + (self._failed + self._late) / (1 + self._answered)))

    def asked(self, peer: PeerId, late_at: float) -> None:
        """The question to `peer` is out; after `late_at` it holds nothing up."""
        self._candidates[peer].late_at = late_at

    def answered(self, peer: PeerId, closer: Sequence[Contact]) -> None:
        """`peer` answered, late or not, and named these peers."""
        candidate = self._over(peer)
        candidate.state = State.ANSWERED
        self._answered += 1
        path = self._paths[candidate.path]
        path.is_nearing = False
        for contact in closer[: self._limits.bucket]:
            learned = self._learn(path, contact, candidate.hops + 1)
            if learned is not None and learned.distance < path.nearest:
                path.nearest = learned.distance
                path.is_nearing = True

    def failed(self, peer: PeerId) -> None:
        """`peer` did not answer, or not as it should."""
        self._over(peer).state = State.FAILED
        self._failed += 1

    def _over(self, peer: PeerId) -> Candidate:
        """The question to `peer` is under way no more."""
        candidate = self._out.pop(peer)
        self._late -= candidate.state is State.LATE
        return candidate

    def _learn(self, path: Path, contact: Contact, hops: int) -> Candidate | None:
        if contact.peer == self._own:
            return None
        candidate = self._candidates.get(contact.peer)
        if candidate is None:
            candidate = Candidate(contact, contact.key ^ self.target, hops)
            self._candidates[contact.peer] = candidate
        elif not candidate.contact.addrs and candidate.state is State.FRESH:
            candidate.contact = contact
        if contact.peer not in path.known:
            path.known[contact.peer] = None
            bisect.insort(path.front, (candidate.distance, candidate))
        return candidate

    def _front(self, path: Path) -> list[Candidate]:
        """The nearest candidates that count on a path."""
        counting = [one for _, one in path.front[: self._width] if one.state not in PASSED_OVER]
        place = self._width
        while len(counting) < self._width and place < len(path.front):
            one = path.front[place][1]
            place += 1
            if one.state not in PASSED_OVER:
                counting.append(one)
        return counting

    @property
    def is_done(self) -> bool:
        """Whether there is nothing left to ask or to wait for."""
        if self._stopped:
            return True
        if self._asked >= self._limits.lookup_questions:
            return self._late == len(self._out)
        if any(one.state is not State.ANSWERED for path in self._paths for one in self._front(path)):
            return False
        return self._late == 0 or 2 * self._answered >= min(self._width, self._late + self._answered)

    @property
    def late_next(self) -> float:
        """When the next question gets late, infinity when none is out."""
        return min(
            (one.late_at for one in self._out.values() if one.state is State.ASKED),
            default=float("inf"),
        )

    def nearest(self) -> list[Contact]:
        """Those of the `width` nearest who answered, nearest first."""
        answered = [one for one in self._candidates.values() if one.state is State.ANSWERED]
        answered.sort(key=lambda one: one.distance)
        return [one.contact for one in answered[: self._width]]

    def hops_of(self, peer: PeerId) -> int:
        """Questions one after the other that led to an answer from `peer`."""
        return self._candidates[peer].hops + 1

    @property
    def questions(self) -> int:
        """How many peers were asked."""
        return self._asked
