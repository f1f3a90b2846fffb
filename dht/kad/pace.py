"""How long a question may take: what this node has seen, of the peer asked and of peers in general.

Two times belong to a question. After `late` it no longer holds anything up: the lookup asks somebody else as
well and takes the answer when it comes. After `answer` it is given up. Both follow what was measured,
smoothed as in Jacobson's retransmission timer (RFC 6298, section 2), so a silent peer costs an estimate of a
round trip and not a fixed time-out. A peer that must be dialled first takes several round trips; that is its
own series.

Pure; the times come in.
"""

from __future__ import annotations

from dataclasses import dataclass

from mycel.protocol.limits import KadLimits
from mycel.protocol.mesh import PeerId

FIRST_ASK_S = 0.3
FIRST_DIAL_S = 0.5
"""Guesses before anything was measured: two continents apart."""

DEVIATIONS = 2.0
"""Late is the mean and so many mean deviations; RFC 6298 takes 4, but here little is lost by being early."""

PATIENCE = 4.0
"""A question is given up after so many times the time to be late."""

GAIN = 1 / 8
GAIN_DEVIATION = 1 / 4


@dataclass(slots=True)
class Series:
    """A smoothed time and its mean deviation, in seconds."""

    mean: float
    deviation: float
    is_guess: bool = False

    def add(self, seconds: float) -> None:
        """One more was measured. The first one replaces a guess."""
        if self.is_guess:
            self.mean, self.deviation, self.is_guess = seconds, seconds / 2, False
            return
        self.deviation += GAIN_DEVIATION * (abs(seconds - self.mean) - self.deviation)
        self.mean += GAIN * (seconds - self.mean)

    @property
    def late_s(self) -> float:
        """When the next one is late."""
        return self.mean + DEVIATIONS * self.deviation


class Pace:
    """Round trips of questions."""

    def __init__(self, limits: KadLimits) -> None:
        self._limits = limits
        self._peers: dict[PeerId, Series] = {}
        self._ask = Series(FIRST_ASK_S, FIRST_ASK_S / 2, is_guess=True)
        self._dial = Series(FIRST_DIAL_S, FIRST_DIAL_S / 2, is_guess=True)

    def answered(self, peer: PeerId, seconds: float, *, dialled: bool) -> None:
        """A question took so long; `dialled` where the peer had to be dialled for it."""
        (self._dial if dialled else self._ask).add(seconds)
        if dialled:
            return
        series = self._peers.pop(peer, None)
        if series is None:
            series = Series(seconds, seconds / 2)
        else:
            series.add(seconds)
        self._peers[peer] = series
        if len(self._peers) > self._limits.known_paces:
            del self._peers[next(iter(self._peers))]

    def late_s(self, peer: PeerId, *, rtt: float | None, dial: bool) -> float:
        """After how many seconds a question to `peer` is late. `rtt`: the connection's own measure."""
        if dial:
            estimate = self._dial.late_s
        elif peer in self._peers:
            estimate = self._peers[peer].late_s
        else:
            estimate = self._ask.late_s if rtt is None else 1.5 * rtt
        return min(max(estimate, self._limits.late_s_min), self._limits.late_s_max)

    def answer_s(self, peer: PeerId, *, rtt: float | None, dial: bool) -> float:
        """After how many seconds a question to `peer` is given up."""
        patient = PATIENCE * self.late_s(peer, rtt=rtt, dial=dial)
        return min(max(patient, self._limits.answer_s_min), self._limits.answer_s_max)
