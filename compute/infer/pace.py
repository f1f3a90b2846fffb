"""How long a session waits before it asks what is wrong.

The time a step may take follows the session's own pace: a multiple of the smoothed time between tokens,
within a floor (schedulers hiccup) and a cap (one second where round trips are short, so that a silent peer
is found soon even by a slow session). Running out of it is no verdict: it only makes the owner ask all stages
what they are doing, and a stage that answers and is computing is left to it.
"""

from __future__ import annotations

import math

import msgspec


class Timing(msgspec.Struct, frozen=True, kw_only=True):
    """Times and bounds of sessions at their owner (seconds, counts)."""

    step_floor_s: float = 0.25
    """A step is never asked about sooner."""
    step_cap_s: float = 1.0
    """...and always asked about after this, plus `round_trips` times the ring's round trip."""
    pace_factor: float = 4.0
    """Steps may take this many times the usual."""
    round_trips: float = 4.0
    """Round trips that any deadline allows on top of its own seconds."""
    probe_s: float = 0.4
    """What a stage has to answer a question in, plus the round trips; silent ones are replaced."""
    open_s: float = 5.0
    """What a stage has to open a session in, plus the round trips, at the start of a generation."""
    reopen_s: float = 1.0
    """...and during a recovery, when somebody waits for the next token."""
    settle_s: float = 0.1
    """Between two looks at stages that all seem idle: rows may have been on the way."""
    stuck_s: float = 120.0
    """A stage that computes one step for this long is replaced."""
    holders_s: float = 10.0
    """How long to wait for somebody to serve layers that nobody holds or is about to."""
    loading_s: float = 120.0
    """...and in all, while peers load them."""
    recoveries: int = 12
    """Recoveries in a row without a new token before giving up."""
    replay_exact_steps: int = 512
    """Longest replay in the original steps; beyond, chunks."""
    window: int = 64
    """Tokens that may wait for the client before the ring pauses."""
    prefill_rows: int = 512
    """Prompt rows per step."""


DEFAULT_TIMING = Timing()

_GAIN = 0.2


class Pace:
    """The session's own speed and what follows from it. `now` is trio time in seconds."""

    def __init__(self, timing: Timing, now: float) -> None:
        self._timing = timing
        self._gap_s: float | None = None
        self._since = now
        self._fresh = True  # the next gap is not one between two tokens of an undisturbed ring

    def on_token(self, now: float) -> None:
        """A token came."""
        if not self._fresh:
            gap = now - self._since
            self._gap_s = gap if self._gap_s is None else self._gap_s + _GAIN * (gap - self._gap_s)
        self._fresh = False
        self._since = now

    def restart(self, now: float) -> None:
        """The ring was started, paused, or found at work: count from here, and not the gap until now."""
        self._since = now
        self._fresh = True

    def deadline(self, ring_rtt_s: float) -> float:
        """When to ask, given the round trips around the ring."""
        timing = self._timing
        cap = timing.step_cap_s + timing.round_trips * ring_rtt_s
        wanted = math.inf if self._gap_s is None else timing.pace_factor * self._gap_s
        return self._since + min(cap, max(timing.step_floor_s, wanted))
