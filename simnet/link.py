"""A machine's line to the internet: how long, how wide, how reliable.

Bytes travel as chunks, not packets: one chunk is what a line carries in about a millisecond, so that a large
transfer costs a few events per 100 kB while flows still share a line fairly (round robin, chunk by chunk, as
fair queueing does). A chunk that crosses two lines is cut through, not stored and forwarded: its first byte
enters the second line while its last is still on the first. So one flow of B bytes over lines of capacity C
arrives exactly latency + B / C after it was sent.

Loss is what TCP makes of it: a chunk that is lost comes a retransmission later, and what follows waits.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Protocol

import trio

from mycel.simnet.clock import Timeline

CHUNK_S = 0.001
"""A line is given to one flow for this long at a time."""

CHUNK_BYTES_MIN = 4 << 10
CHUNK_BYTES_MAX = 1 << 20

GIGABIT = 125_000_000.0
"""Bytes per second."""


@dataclass(frozen=True, slots=True)
class LinkOptions:
    """One machine's line. The latency between two machines is the sum of their lines' latencies."""

    latency_s: float = 0.010
    jitter_s: float = 0.0
    """Up to this much is added to the latency of each chunk; order is kept."""
    up_bytes_per_s: float = math.inf
    down_bytes_per_s: float = math.inf
    loss: float = 0.0
    """Probability that a chunk needs a retransmission."""


class Sender(Protocol):
    """A flow, as its line sees it."""

    def take(self, count: int) -> tuple[list[bytes], int]:
        """Up to `count` bytes that may travel now."""

    def depart(self, pieces: list[bytes], size: int, seconds: float) -> None:
        """These bytes begin to leave now and their last leaves `seconds` later."""


def chunk_bytes(bytes_per_s: float) -> int:
    """How much a line of this capacity carries at a time."""
    return int(min(max(bytes_per_s * CHUNK_S, CHUNK_BYTES_MIN), CHUNK_BYTES_MAX))


class Uplink:
    """The way out of a machine: flows that have something to send take turns."""

    def __init__(self, timeline: Timeline, bytes_per_s: float) -> None:
        self._timeline = timeline
        self._turns: dict[Sender, None] = {}
        self._busy = False
        self._stalled_until = 0.0
        self.bytes_per_s = bytes_per_s

    def offer(self, flow: Sender) -> None:
        """`flow` has something to send. A flow that is in line already is not added twice."""
        self._turns[flow] = None
        if not self._busy:
            self._next()

    def stall(self, seconds: float) -> None:
        """Let nothing leave for that long (a mobile link in a tunnel): it is late, not lost."""
        self._stalled_until = max(self._stalled_until, trio.current_time() + seconds)

    def _next(self) -> None:
        self._busy = True
        now = trio.current_time()
        if now < self._stalled_until:
            self._timeline.at(self._stalled_until, self._next)
            return
        while self._turns:
            flow = next(iter(self._turns))
            del self._turns[flow]
            pieces, size = flow.take(chunk_bytes(self.bytes_per_s))
            if not size:
                continue
            self._turns[flow] = None
            seconds = size / self.bytes_per_s
            flow.depart(pieces, size, seconds)
            if seconds:
                self._timeline.at(now + seconds, self._next)
                return
        self._busy = False


class Downlink:
    """The way into a machine: chunks queue in order of their arrival."""

    def __init__(self, bytes_per_s: float) -> None:
        self._free_at = 0.0
        self.bytes_per_s = bytes_per_s

    def admit(self, size: int, last_at: float) -> float:
        """When a chunk is through whose first byte is here now and whose last comes at `last_at`."""
        through = max(self._free_at, trio.current_time()) + size / self.bytes_per_s
        self._free_at = max(through, last_at)
        return self._free_at


def extra_delay(options: LinkOptions, rtt: float, rng: random.Random) -> float:
    """Jitter and retransmission of one chunk, in seconds."""
    extra = rng.random() * options.jitter_s if options.jitter_s else 0.0
    if options.loss and rng.random() < options.loss:
        extra += max(rtt, 0.2)  # Linux's smallest retransmission timeout
    return extra
