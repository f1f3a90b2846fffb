"""yamux frames (hashicorp/yamux spec.md and libp2p specs/yamux): twelve bytes of header, then data.

Here are the codec and the receive window; `mycel.protocol.channel` is one stream, `mycel.protocol.session`
the multiplexer of them all.

The receive window starts at 256 KiB, as the spec says, and is enforced: a peer that sends more is dropped.
It grows by four while the reader drains half of it within a few round trips, up to a limit; by sixteen where
half of it came in one burst, in an eighth of a round trip, for then the peer stood idle most of the time. So
it reaches the bandwidth-delay product in two to four round trips. What it grew to is remembered per peer, and
the next stream that shows the same hunger jumps there at once.
"""

from __future__ import annotations

import struct

PROTOCOL = "/yamux/1.0.0"
HEADER = struct.Struct(">BBHII")
HEADER_BYTES = HEADER.size

DATA = 0
WINDOW = 1
PING = 2
GO_AWAY = 3

SYN = 1
ACK = 2
FIN = 4
RST = 8

NORMAL = 0
PROTOCOL_ERROR = 1
INTERNAL_ERROR = 2

INITIAL_WINDOW = 256 * 1024
SEND_WINDOW_MAX = 0xFFFFFFFF

GROWTH = 4
"""Factor by which a window grows..."""

BURST_GROWTH = 16
"""The factor where half of the window came within a `BURST`th of a round trip."""

BURST = 8

FEW_RTTS = 4.0
"""...when half of it drained within this many round trips..."""

SOON_S = 0.002
"""...or within this many seconds, where round trips are shorter than a scheduler's mood."""

RTT_GUESS_S = 0.1
"""Stands in before the first ping came back."""


class Pool:
    """Bytes that several windows together may grow by."""

    __slots__ = ("left",)

    def __init__(self, size: int) -> None:
        self.left = size


class ReceiveWindow:
    """What a peer may send on one stream, and when to let it send more."""

    __slots__ = ("_consumed", "_first", "_since", "left", "size")

    def __init__(self, now: float) -> None:
        self.size = INITIAL_WINDOW
        self.left = INITIAL_WINDOW
        self._consumed = 0
        self._since = now
        self._first: float | None = None

    def arrived(self, count: int, now: float) -> bool:
        """Account for `count` bytes; False when the peer had no right to send them."""
        self.left -= count
        if self._first is None:
            self._first = now
        return self.left >= 0

    def consumed(self, count: int) -> bool:
        """Account for `count` bytes that the reader took; True when it is time to call `grant`."""
        self._consumed += count
        return self._consumed * 2 >= self.size

    def grant(self, now: float, rtt: float | None, learned: int, spare: int) -> int:
        """How many bytes more to let the peer send.

        `learned` is what windows to this peer grew to before, `spare` bytes are left of what all its windows
        together may add.
        """
        delta = self._consumed
        guess = RTT_GUESS_S if rtt is None else rtt
        if now - self._since <= max(FEW_RTTS * guess, SOON_S):
            burst = self._first is not None and (now - self._first) * BURST <= guess
            factor = BURST_GROWTH if burst else GROWTH
            growth = min(max(self.size * factor, learned) - self.size, spare)
            if growth > 0:
                self.size += growth
                delta += growth
        self._consumed = 0
        self._since = now
        self._first = None
        self.left += delta
        return delta
