"""Whether a peer is still there: when to ask, and when to call it dead.

An idle connection is pinged every `keepalive_s`. When nothing at all arrived for `silence_s` since the first
ping that nobody answered, the peer is dead. Time in which this process itself did not run (a stopped
laptop, a debugger) proves nothing about the peer and is forgiven.
"""

from __future__ import annotations

import enum

from mycel.protocol.limits import Limits

TICK_S = 0.1
"""How often every connection is looked at."""

LATE_S = 0.5
"""A tick that comes this late says that this process stood still."""


class Verdict(enum.Enum):
    """What to do about a connection now."""

    WAIT = "wait"
    PING = "ping"
    DEAD = "dead"


class Keepalive:
    """The state of one connection."""

    __slots__ = ("_asked", "_heard", "_keepalive_s", "_pinged", "_silence_s")

    def __init__(self, limits: Limits, now: float) -> None:
        self._keepalive_s = limits.keepalive_s
        self._silence_s = limits.silence_s
        self._heard = now
        self._pinged = now
        self._asked: float | None = None

    def on_heard(self, now: float) -> None:
        """Something arrived."""
        self._heard = now
        self._asked = None

    def forgive(self, seconds: float) -> None:
        """This process did not run for so long."""
        self._heard += seconds
        self._pinged += seconds
        if self._asked is not None:
            self._asked += seconds

    def judge(self, now: float) -> Verdict:
        """What to do now; to be asked every `TICK_S`."""
        if self._asked is not None and now - self._asked >= self._silence_s:
            return Verdict.DEAD
        if now - max(self._heard, self._pinged) < self._keepalive_s:
            return Verdict.WAIT
        self._pinged = now
        if self._asked is None:
            self._asked = now
        return Verdict.PING
