"""When a round begins, whom it asks, what it counts, and when it ends: without a stream, a model or a clock.

A round asks more clients than it needs (over-sampling) and closes as soon as `wanted` updates are in. Where
clients fail it asks others that are idle. What ends it otherwise:

- nobody is left to wait for, or the time is up, and `quorum` updates are in: it closes with those; - fewer
than `quorum` can still come: it is short. It says so at once (`Short`), waits `patience_s` for clients
  to come back, and then fails aloud (`Fail`). It never closes with less.

The time is up by what was measured: once a quorum is in, others have `slack` times what that took, or `slack`
times the pace of the slowest of them, whichever is longer. Below quorum it is `round_s_max`.

An update that comes after its round closed is **late**. It counts in the round that is open then, discounted
by (1 + s) ** -power where s is how many rounds its model is behind (Xie et al. 2019, arXiv 1903.03934,
section 5.2), and does not count towards wanted and quorum; after `late_rounds_max` rounds it is refused. Late
clients are not asked again before they answered or failed.

Every update is known by (job, round, client): a second one is refused, and so is one for a round that was
never asked of that client, or by a coordinator of another epoch. All that must outlive the coordinator is
`Standing`; a round that was under way is begun again, and clients that had finished answer at once from what
they kept.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import msgspec

from mycel.protocol.errors import MycelError, Refused, UsageProblem
from mycel.protocol.mesh import PeerId


class UnderQuorum(MycelError):
    """A round did not come to its quorum. The text says how many updates came and why others did not."""


class RoundRules(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """When a round is good. Counts are updates, times seconds."""

    wanted: int = 0
    """So many updates close a round at once. 0: as many as there are clients when it begins."""
    quorum: int = 1
    """The fewest that a round closes with."""
    oversample: float = 0.0
    """How many more clients than wanted are asked, as a share: 0.3 asks 13 for 10."""
    round_s_max: float = 600.0
    """How long a round takes at the very most, and how long one does before anything was measured."""
    round_s_min: float = 1.0
    """How long a client always has, whatever its pace: what a hiccup takes."""
    slack: float = 3.0
    """How much longer than measured a client may take."""
    patience_s: float = 30.0
    """How long a round that is short waits for clients to come back."""
    late_rounds_max: int = 3
    late_power: float = 0.5

    def check(self) -> RoundRules:
        """Raise `UsageProblem` naming the first rule that cannot be kept; returns itself."""
        good = {
            "quorum": self.quorum >= 1,
            "wanted": self.wanted == 0 or self.wanted >= self.quorum,
            "oversample": 0 <= self.oversample <= 4,
            "round_s_max": self.round_s_max >= self.round_s_min > 0,
            "slack": self.slack >= 1,
            "patience_s": self.patience_s >= 0,
            "late_rounds_max": self.late_rounds_max >= 0,
            "late_power": self.late_power >= 0,
        }
        for name, is_good in good.items():
            if not is_good:
                raise UsageProblem(f"rounds: {name} = {getattr(self, name)} cannot be; see docs/federated.md")
        return self


class Standing(msgspec.Struct, frozen=True):
    """Where a federated job stands after a round: all that a coordinator must keep."""

    number: int = 0
    """Rounds that are done."""
    model: bytes = b""
    """Where the model after them is kept; made by the coordinator's `Keep`."""
    state: bytes = b""
    """The same for what the strategy keeps, empty where it keeps nothing."""
    history: tuple[dict[str, float], ...] = ()
    """Figures of the last rounds, oldest first."""


@dataclass(frozen=True, slots=True)
class Ask:
    """Order round `number` from a client."""

    client: PeerId
    number: int


@dataclass(frozen=True, slots=True)
class Short:
    """Fewer than the quorum can come; the text says why. The round waits for clients until `until`."""

    text: str
    until: float


@dataclass(frozen=True, slots=True)
class Close:
    """The round is done with what was counted."""

    number: int
    counted: tuple[PeerId, ...]
    late: tuple[PeerId, ...]


@dataclass(frozen=True, slots=True)
class Fail:
    """The round is given up, and these `Rounds` with it: `UnderQuorum`'s text."""

    text: str


Act = Ask | Short | Close | Fail


@dataclass(slots=True)
class _Open:
    """The round under way."""

    number: int
    wanted: int
    began: float
    counted: dict[PeerId, float] = field(default_factory=dict)  # when
    late: dict[PeerId, float] = field(default_factory=dict)
    failed: dict[PeerId, str] = field(default_factory=dict)
    quorum_s: float = math.inf  # from the begin to the quorum's last update
    short_until: float | None = None


class Rounds:
    """The rounds of one job under one coordinator. Each call returns what to do now."""

    def __init__(self, job: str, epoch: int, rules: RoundRules, number: int = 0) -> None:
        """`number`: rounds that are done, from `Standing`."""
        self.job = job
        self.epoch = epoch
        self.number = number
        self._rules = rules.check()
        self._open: _Open | None = None
        self._pool: dict[PeerId, None] = {}
        self._asked: dict[PeerId, tuple[int, float]] = {}  # under way: which round, since when
        self._paces: dict[PeerId, float] = {}
        self._taken: dict[tuple[PeerId, int], None] = {}

    def begin(self, now: float) -> list[Act]:
        """Open the next round."""
        assert self._open is None, "a round is open"
        most = len([client for client in self._pool if client not in self._asked])
        wanted = self._rules.wanted or max(self._rules.quorum, most)
        self._open = _Open(self.number + 1, wanted, now)
        return self._decide(now)

    def on_pool(self, clients: Iterable[PeerId], now: float) -> list[Act]:
        """These can be asked from now on, and no others."""
        pool = dict.fromkeys(sorted(clients))
        if self._open is not None:  # who comes back is as good as new
            for client in [client for client in pool if client not in self._pool]:
                self._open.failed.pop(client, None)
        self._pool = pool
        return self._decide(now)

    def on_update(self, client: PeerId, number: int, epoch: int, now: float) -> tuple[float, list[Act]]:
        """A client's whole and good update of round `number`: (its discount, what to do).

        Raises `Refused`: "stale-epoch", "replayed" (counted before), "unasked" (of a stranger, or another
        round than it was asked for), "stale" (too late), "closed" (no round is open).
        """
        if epoch != self.epoch:
            raise Refused(f"an update for epoch {epoch}, this is {self.epoch}", reason="stale-epoch")
        if (client, number) in self._taken:
            raise Refused(f"round {number} of {client} is counted already", reason="replayed")
        asked = self._asked.get(client)
        if asked is None or asked[0] != number:
            raise Refused(f"{client} was not asked for round {number}", reason="unasked")
        del self._asked[client]
        took = now - asked[1]
        self._paces[client] = took if client not in self._paces else (self._paces[client] + took) / 2
        behind = self.number + 1 - number
        if behind > self._rules.late_rounds_max:
            raise Refused(f"an update {behind} rounds late", reason="stale")
        if self._open is None:
            raise Refused(f"an update of round {number}, which is closed", reason="closed")
        self._taken[client, number] = None
        if behind:
            self._open.late[client] = now
        else:
            self._open.counted[client] = now
            if len(self._open.counted) == self._rules.quorum:
                self._open.quorum_s = now - self._open.began
        return (1.0 + behind) ** -self._rules.late_power, self._decide(now)

    def on_failed(self, client: PeerId, number: int, why: str, now: float) -> list[Act]:
        """A client failed in a round that it was asked for: it died, refused, or sent what cannot be."""
        if self._asked.get(client, (None, 0.0))[0] == number:
            del self._asked[client]
        if self._open is not None and number == self._open.number and client not in self._open.counted:
            self._open.failed[client] = why
        return self._decide(now)

    def on_time(self, now: float) -> list[Act]:
        """`next_at` has come."""
        return self._decide(now)

    @property
    def next_at(self) -> float:
        """When `on_time` is due next; infinity where only news can change anything."""
        if self._open is None:
            return math.inf
        return self._deadline(self._open) if self._open.short_until is None else self._open.short_until

    def is_waited_for(self, client: PeerId, number: int) -> bool:
        """Whether an update of that round by that client would still be taken."""
        behind = self.number + 1 - number
        return self._asked.get(client, (None, 0.0))[0] == number and behind <= self._rules.late_rounds_max

    @property
    def expected_s(self) -> float:
        """How long clients may take, by the slowest that was measured."""
        if not self._paces:
            return self._rules.round_s_max
        return max(self._rules.round_s_min, self._rules.slack * max(self._paces.values()))

    def budget_s(self) -> float:
        """How long a client that is asked now has, late rounds included: what its order says."""
        return self._rules.round_s_max * (1 + self._rules.late_rounds_max)

    def _decide(self, now: float) -> list[Act]:
        current = self._open
        if current is None:
            return []
        under_way = [client for client, (number, _) in self._asked.items() if number == current.number]
        have = len(current.counted)
        if have >= current.wanted:
            return [self._close(current)]
        acts: list[Act] = []
        for client in self._choose(current, len(under_way)):
            self._asked[client] = (current.number, now)
            under_way.append(client)
            acts.append(Ask(client, current.number))
        time_is_up = now >= self._deadline(current)
        if have >= self._rules.quorum and (time_is_up or not under_way):
            return [*acts, self._close(current)]
        if have + len(under_way) >= self._rules.quorum and now < current.began + self._rules.round_s_max:
            current.short_until = None
            return acts
        return acts + self._short(current, now)

    def _choose(self, current: _Open, under_way: int) -> Sequence[PeerId]:
        """Idle clients to ask now: the same ones for the same job, round and pool."""
        lacking = current.wanted - len(current.counted)
        missing = math.ceil(lacking * (1.0 + self._rules.oversample) - 1e-9) - under_way
        if missing <= 0:
            return []
        idle = [
            client
            for client in self._pool
            if client not in self._asked and client not in current.counted and client not in current.failed
        ]
        random.Random(f"{self.job} {current.number}").shuffle(idle)
        return idle[:missing]

    def _deadline(self, current: _Open) -> float:
        rules = self._rules
        asked = [client for client, (number, _) in self._asked.items() if number == current.number]
        last = max((self._asked[client][1] for client in asked), default=current.began)
        longest = current.began + rules.round_s_max
        if len(current.counted) < rules.quorum:
            return longest
        pace = max([current.quorum_s, *(self._paces.get(client, 0.0) for client in asked)])
        return min(longest, last + max(rules.round_s_min, rules.slack * pace))

    def _short(self, current: _Open, now: float) -> list[Act]:
        why = (
            "; ".join(f"{client}: {text}" for client, text in sorted(current.failed.items())) or "none failed"
        )
        text = (
            f"round {current.number} has {len(current.counted)} of {self._rules.quorum} updates, "
            f"{len(self._pool)} clients are there ({why})"
        )
        if current.short_until is None:
            current.short_until = now + self._rules.patience_s
            if self._rules.patience_s:
                return [Short(text, current.short_until)]
        if now < current.short_until:
            return []
        self._open = None
        return [Fail(text)]

    def _close(self, current: _Open) -> Close:
        self._open = None
        self.number = current.number
        oldest = self.number - self._rules.late_rounds_max
        self._taken = {key: None for key in self._taken if key[1] >= oldest}
        return Close(current.number, tuple(sorted(current.counted)), tuple(sorted(current.late)))
