"""The yamux multiplexer without I/O: plaintext in, calls on channels out; frames written into an `Outlet`.

Frames arrive in `feed`, in any cut; they leave through `mycel.protocol.egress`. What a peer can make this
side hold is bounded: streams by `Limits.streams`, unread bytes by windows and `connection_window_max`,
answers owed to it by `egress.CONTROL_BYTES_MAX`.

A stream leaves the table when both ends finished or one reset it. A stream that this side closed while the
peer never does is reset after `LINGER_S`, or as soon as more data arrives for it.
"""

from __future__ import annotations

from typing import Protocol

from mycel.protocol import yamux
from mycel.protocol.channel import Channel
from mycel.protocol.egress import Egress
from mycel.protocol.errors import ConnectionLost, LimitExceeded, MycelError, RemoteProtocolError, StreamReset
from mycel.protocol.limits import Limits
from mycel.protocol.sealed import Outlet
from mycel.protocol.yamux import HEADER, HEADER_BYTES

ACK_BACKLOG = 256
"""Streams this side may open ahead of the peer's acknowledgement (libp2p specs/yamux)."""

LINGER_S = 10.0
"""How long a peer may leave a stream half open that this side is done with."""

ID_MAX = 0xFFFFFFFF
"""A stream's id has 32 bits."""

UNANSWERED_MAX = 32
"""Accepted streams whose acknowledgement waits for the first answer to ride on."""


class Observer(Protocol):
    """Who is told what happens in a session."""

    def on_channel(self, channel: Channel) -> None:
        """The peer opened a stream. Set its sink now: data may follow at once."""

    def on_slot(self) -> None:
        """One more stream may be opened than before."""

    def on_go_away(self, code: int) -> None:
        """The peer will close: no new streams."""


class Session:
    """All streams of one connection."""

    def __init__(
        self, outlet: Outlet, observer: Observer, limits: Limits, *, client: bool, now: float
    ) -> None:
        """`client` is the side that dialed: its stream ids are odd."""
        self.egress = Egress(outlet, limits.output_bytes, lambda channel: self._end(channel, None))
        self._observer = observer
        self._limits = limits
        self._next_id = 1 if client else 2
        self._inbound_parity = 0 if client else 1
        self._channels: dict[int, Channel] = {}
        self._unanswered: list[Channel] = []
        self._lingering: dict[int, float] = {}
        self._partial = b""
        self._body = 0
        self._body_channel: Channel | None = None
        self._body_fin = False
        self._grown = 0
        self._pings: dict[int, float] = {}
        self._ping_id = 0
        self._now = now
        self.rtt: float | None = None
        self.learned = yamux.INITIAL_WINDOW
        """The largest receive window that this peer filled; set it where an earlier connection knew more."""
        self.unread = 0
        self.unacked = 0
        self.inbound = 0
        self.outbound = 0
        self.refused = 0
        self.overflowed = 0
        self.go_away_sent = False
        self.go_away_received = False

    # Opening and closing

    @property
    def can_open(self) -> bool:
        """Whether `open` would succeed now."""
        return (
            self.outbound < self._limits.streams
            and self.unacked < ACK_BACKLOG
            and not self.go_away_sent
            and not self.go_away_received
        )

    def open(self) -> Channel:
        """A new stream; its SYN rides on its first frame. Raises `LimitExceeded` unless `can_open`."""
        channel = self.try_open()
        if channel is None:
            raise LimitExceeded("no further stream fits this connection; wait for one to end")
        return channel

    def try_open(self) -> Channel | None:
        """As `open`; None instead of raising."""
        if not self.can_open or self._next_id > ID_MAX:
            return None
        channel = Channel(self, self._next_id, inbound=False, now=self._now)
        self._next_id += 2
        self._channels[channel.id] = channel
        self.outbound += 1
        self.unacked += 1
        return channel

    @property
    def channels(self) -> int:
        """Open streams, half-open ones included."""
        return len(self._channels)

    def reset(self, channel: Channel, error: MycelError) -> None:
        """End `channel` in both directions and tell the peer, if it knows of it."""
        if channel.error is not None:
            return
        known = channel.inbound or not channel.flags
        if known and channel.id in self._channels:
            self.egress.short(yamux.WINDOW, yamux.RST, channel.id, 0)
        self._end(channel, error)

    def linger(self, channel: Channel) -> None:
        """`channel`'s user is done with it; see to it that it does not stay half open."""
        if channel.id in self._channels:
            self._lingering.setdefault(channel.id, self._now + LINGER_S)

    def lose(self, error: ConnectionLost) -> None:
        """The connection is gone: every stream ends with `error`."""
        for channel in list(self._channels.values()):
            self._end(channel, error)

    def go_away(self, code: int) -> None:
        """Tell the peer that this side opens no more streams (code 0) or closes for cause."""
        if not self.go_away_sent:
            self.go_away_sent = True
            self.egress.short(yamux.GO_AWAY, 0, 0, code)

    def ping(self, now: float) -> None:
        """Ask for a sign of life; the answer updates `rtt`."""
        self._now = now
        self._ping_id = self._ping_id + 1 & 0xFFFFFFFF
        self._pings[self._ping_id] = now
        if len(self._pings) > 16:
            del self._pings[next(iter(self._pings))]
        self.egress.short(yamux.PING, yamux.SYN, 0, self._ping_id)

    def on_tick(self, now: float) -> None:
        """Time passed: send withheld acknowledgements, reset streams left half open for too long."""
        self._now = now
        self._acknowledge()
        for number, until in list(self._lingering.items()):
            if now < until:
                break
            del self._lingering[number]
            channel = self._channels.get(number)
            if channel is not None:
                self.reset(channel, StreamReset("the peer left the stream half open for too long"))

    def _end(self, channel: Channel, error: MycelError | None) -> None:
        """Take `channel` out of the table; `error` None means both sides finished."""
        if self._channels.pop(channel.id, None) is None:
            return
        self._lingering.pop(channel.id, None)
        if channel.inbound:
            self.inbound -= 1
        else:
            self.outbound -= 1
            if not channel.acknowledged:
                self.unacked -= 1
        self.unread -= channel.uncredited
        channel.uncredited = 0
        grown = channel.window.size - yamux.INITIAL_WINDOW
        self._grown -= grown
        if channel.window_pool is not None:
            channel.window_pool.left += grown
        if error is not None:
            channel.error = error
            channel.drop_queue()
            if channel.on_drained is not None:
                channel.on_drained()
            channel.sink(None, error)
        channel.let_go()
        if not channel.inbound:
            self._observer.on_slot()

    # Crediting and acknowledging

    def credit(self, channel: Channel, count: int) -> bool:
        """The user of `channel` dealt with `count` bytes; returns whether the peer is to be told now."""
        if channel.error is not None or channel.id not in self._channels:
            return False
        self.unread -= count
        channel.uncredited -= count
        return self._make_room(channel, count)

    def _make_room(self, channel: Channel, count: int) -> bool:
        window = channel.window
        if not window.consumed(count) or channel.fin_received or channel.id not in self._channels:
            return False
        before = window.size
        most = min(self._limits.stream_window_max, channel.window_max)
        spare = min(self._limits.connection_window_max - self._grown, most - before)
        pool = channel.window_pool
        if pool is not None:
            spare = min(spare, pool.left)
        delta = window.grant(self._now, self.rtt, self.learned, max(spare, 0))
        self._grown += window.size - before
        if pool is not None:
            pool.left -= window.size - before
        self.learned = max(self.learned, window.size)
        flags, channel.flags = channel.flags, 0
        self.egress.short(yamux.WINDOW, flags, channel.id, delta)
        return True

    def _acknowledge(self) -> None:
        for channel in self._unanswered:
            if channel.error is None:
                if channel.flags:
                    channel.flags = 0
                    self.egress.short(yamux.WINDOW, yamux.ACK, channel.id, 0)
                channel.flush_prefix()
        self._unanswered.clear()

    # In: frames in any cut

    def feed(self, data: memoryview, now: float) -> None:
        """Take decrypted bytes. Raises `RemoteProtocolError` for whatever the spec forbids."""
        self._now = now
        offset = 0
        size = len(data)
        while offset < size:
            if not self._body:
                lacking = HEADER_BYTES - len(self._partial)
                if lacking > size - offset:
                    self._partial += bytes(data[offset:])
                    break
                if lacking == HEADER_BYTES:
                    self._on_header(*HEADER.unpack_from(data, offset))
                else:
                    header, self._partial = self._partial + bytes(data[offset : offset + lacking]), b""
                    self._on_header(*HEADER.unpack(header))
                offset += lacking
            count = min(self._body, size - offset)
            if count:
                self._body -= count
                self._on_data(data[offset : offset + count], count)
                offset += count
        if len(self._unanswered) > UNANSWERED_MAX:
            self._acknowledge()
        if self.egress.swamped:
            raise RemoteProtocolError("the peer makes this side answer faster than it reads")

    def _on_header(self, version: int, kind: int, flags: int, number: int, value: int) -> None:
        if version != 0 or kind > yamux.GO_AWAY or flags > 15:
            raise RemoteProtocolError(f"not a yamux frame: version {version}, type {kind}, flags {flags}")
        if kind > yamux.WINDOW:
            self._on_connection_frame(kind, flags, number, value)
            return
        if number == 0:
            raise RemoteProtocolError("a yamux frame with data for stream 0")
        channel = self._accept(number) if flags & yamux.SYN else self._channels.get(number)
        if kind == yamux.DATA:
            if value > self._limits.stream_window_max:
                raise RemoteProtocolError(f"a yamux frame of {value} bytes, more than any window")
            self._body = value
            self._body_fin = False
            self._body_channel = channel
            if channel is not None and not channel.window.arrived(value, self._now):
                raise RemoteProtocolError("the peer sent more than the stream's window allows")
        elif channel is not None:
            channel.send_window += value
            if channel.send_window > yamux.SEND_WINDOW_MAX:
                raise RemoteProtocolError("a yamux send window grew beyond 32 bits")
            if channel.queued:
                self.egress.schedule(channel)
        if flags and channel is not None:
            self._on_flags(channel, flags)

    def _on_flags(self, channel: Channel, flags: int) -> None:
        if flags & yamux.ACK and not channel.acknowledged:
            channel.acknowledged = True
            self.unacked -= 1
            self._observer.on_slot()
        if flags & yamux.RST:
            self._end(channel, StreamReset("the peer reset the stream"))
        elif flags & yamux.FIN:
            if self._body:
                self._body_fin = True
            else:
                self._on_fin(channel)

    def _on_connection_frame(self, kind: int, flags: int, number: int, value: int) -> None:
        if number != 0:
            raise RemoteProtocolError("a yamux ping or go-away names a stream")
        if kind == yamux.PING:
            self._on_ping(flags, value)
        else:
            self.go_away_received = True
            self._observer.on_go_away(value)

    def _on_ping(self, flags: int, value: int) -> None:
        if flags == yamux.SYN:
            self.egress.short(yamux.PING, yamux.ACK, 0, value)
            return
        if flags != yamux.ACK:
            raise RemoteProtocolError(f"a yamux ping with flags {flags}")
        asked = self._pings.pop(value, None)
        if asked is not None:
            sample = self._now - asked
            self.rtt = sample if self.rtt is None else 0.75 * self.rtt + 0.25 * sample

    def _accept(self, number: int) -> Channel | None:
        if number % 2 != self._inbound_parity or number in self._channels:
            raise RemoteProtocolError(f"the peer opened stream {number}, an id that it may not use")
        if self.inbound >= self._limits.streams:
            self.refused += 1
            self.egress.short(yamux.WINDOW, yamux.RST, number, 0)
            return None
        channel = Channel(self, number, inbound=True, now=self._now)
        self._channels[number] = channel
        self.inbound += 1
        self._unanswered.append(channel)
        self._observer.on_channel(channel)
        return channel

    def _on_data(self, data: memoryview, count: int) -> None:
        channel = self._body_channel
        if channel is None or channel.error is not None:
            return
        if channel.fin_received:
            raise RemoteProtocolError("data after the end of a stream")
        if channel.forgotten:
            self.reset(channel, StreamReset("data for a stream that this side is done with"))
        elif self.unread + count > self._limits.connection_window_max:
            self.overflowed += 1
            self.reset(channel, LimitExceeded("the peer's streams hold more unread data than their bound"))
        elif channel.sink(data, None):
            self._make_room(channel, count)
        elif channel.id in self._channels:
            channel.uncredited += count
            self.unread += count
        if self._body_fin and not self._body:
            self._body_fin = False
            self._on_fin(channel)

    def _on_fin(self, channel: Channel) -> None:
        if channel.error is not None or channel.fin_received:
            return
        channel.fin_received = True
        channel.sink(None, None)
        if channel.fin_sent:
            self._end(channel, None)
