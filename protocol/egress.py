"""What leaves a yamux session: frames written into an `Outlet`, in a fair and frugal order.

First the short ones (window updates, pings, resets), then one frame of each stream that has something to send
and the window for it, in turn. A long frame is cut to what is left of the Noise message it goes into, so that
a bulk transfer is made of full messages and nothing else; a small one never waits behind a bulk transfer's
queue, only behind what the pipe has not taken yet.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from mycel.protocol import yamux
from mycel.protocol.sealed import PLAINTEXT_MAX, Outlet
from mycel.protocol.yamux import HEADER, HEADER_BYTES

if TYPE_CHECKING:
    from mycel.protocol.channel import Channel

CONTROL_BYTES_MAX = 256 * 1024
"""Short frames owed to a peer that does not read; beyond this it is dropped."""

FRAGMENT_MIN = 2048
"""A frame is cut to fill up a Noise message only where at least this much of it fits."""


class Egress:
    """The outgoing half of a session."""

    __slots__ = ("_control", "_copied", "_copies_max", "_on_finished", "_outlet", "_ready", "swamped")

    def __init__(self, outlet: Outlet, copies_max: int, on_finished: Callable[[Channel], None]) -> None:
        """`copies_max` bounds the bytes copied for senders that do not wait; `on_finished` hears of a stream
        whose second end was just written."""
        self._outlet = outlet
        self._copies_max = copies_max
        self._on_finished = on_finished
        self._ready: deque[Channel] = deque()
        self._control = bytearray()
        self._copied = 0
        self.swamped = False
        """The peer made this side owe it more short frames than the bound; it must be dropped."""

    def room(self, least: int) -> int:
        """Data bytes of one frame that can be written now, behind nobody; less than `least`: none."""
        if self._ready:
            return 0
        room = self._outlet.room() - HEADER_BYTES
        if room < least:
            self._outlet.seal()
            room = self._outlet.room() - HEADER_BYTES
        return room if room >= least else 0

    @property
    def waiting(self) -> bool:
        """Whether `fill` may have anything to write."""
        return bool(self._control or self._ready)

    def put(self, channel: Channel, data: bytes | bytearray | memoryview, size: int, *, end: bool) -> bool:
        """Write `data` as one frame right away; False where it does not fit into the output now."""
        outlet = self._outlet
        need = HEADER_BYTES + size
        if need > PLAINTEXT_MAX or not outlet.make_room(need):
            return False
        view, at = outlet.reserve(need)
        flags = channel.flags
        channel.flags = 0
        if end:
            flags |= yamux.FIN
            channel.fin_wanted = channel.fin_sent = True
        HEADER.pack_into(view, at, 0, yamux.DATA, flags, channel.id, size)
        view[at + HEADER_BYTES : at + need] = data
        channel.send_window -= size
        if end and channel.fin_received:
            self._on_finished(channel)
        return True

    def admit(self, channel: Channel, size: int) -> bool:
        """Whether a copy of `size` bytes may wait here for the output; counts it if so."""
        if self._copied + size > self._copies_max:
            return False
        self._copied += size
        channel.copied += size
        return True

    def release(self, channel: Channel) -> None:
        """The copies that `channel` kept here are gone."""
        self._copied -= channel.copied
        channel.copied = 0

    def schedule(self, channel: Channel) -> None:
        """`channel` has something to send."""
        if not channel.ready and channel.error is None:
            channel.ready = True
            self._ready.append(channel)

    def short(self, kind: int, flags: int, number: int, value: int) -> None:
        """Owe the peer a frame without data."""
        if len(self._control) >= CONTROL_BYTES_MAX:
            self.swamped = True
            return
        self._control += HEADER.pack(0, kind, flags, number, value)

    def fill(self) -> None:
        """Write as many waiting frames as the outlet has room for."""
        if self._control and not self._fill_control():
            return
        outlet = self._outlet
        ready = self._ready
        while ready:
            channel = ready[0]
            count = min(channel.queued, channel.send_window)
            if channel.error is not None or not (count or channel.fin_due):
                ready.popleft()
                channel.ready = False
                continue
            least = min(count, FRAGMENT_MIN)
            room = outlet.room() - HEADER_BYTES
            if room < least:
                outlet.seal()
                room = outlet.room() - HEADER_BYTES
                if room < least:
                    return
            ready.popleft()
            channel.ready = False
            self._emit(channel, min(count, room))
            if channel.queued or channel.fin_due:
                self.schedule(channel)

    def _emit(self, channel: Channel, count: int) -> None:
        flags = channel.flags
        channel.flags = 0
        if channel.fin_wanted and count == channel.queued:
            flags |= yamux.FIN
            channel.fin_sent = True
        view, at = self._outlet.reserve(HEADER_BYTES + count)
        HEADER.pack_into(view, at, 0, yamux.DATA, flags, channel.id, count)
        channel.emit(view, at + HEADER_BYTES, count)
        channel.send_window -= count
        if not channel.queued:
            self.release(channel)
            if channel.on_drained is not None:
                channel.on_drained()
        if channel.fin_sent and channel.fin_received:
            self._on_finished(channel)

    def _fill_control(self) -> bool:
        outlet = self._outlet
        control = self._control
        while control:
            room = outlet.room()
            if room < HEADER_BYTES:
                outlet.seal()
                room = outlet.room()
                if room < HEADER_BYTES:
                    return False
            count = min(len(control), room - room % HEADER_BYTES)
            view, at = outlet.reserve(count)
            view[at : at + count] = control[:count]
            del control[:count]
        return True
