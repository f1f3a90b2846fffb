"""One direction of a simulated TCP connection.

What the sender hands over lies in its kernel's send buffer until it is acknowledged; what arrives lies in the
receiver's until it is read. Both are bounded, so a reader who pauses stops the writer. The bounds follow the
path as the kernel's autotuning does: twice its bandwidth-delay product, within the options' limits.

Acknowledgements and window updates travel back in the path's latency. They cost no events of their own: they
are noted with the time of their arrival and looked up when somebody wants to send; only a sender that waits
is woken by an event. Bytes that meet a cut come again at TCP's doubling retransmission times and pass at the
first one after it healed.
"""

from __future__ import annotations

import math
import zlib
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

import trio

from mycel.simnet.link import extra_delay

if TYPE_CHECKING:
    from mycel.simnet.machine import Machine
    from mycel.simnet.wire import Path

RETRANSMIT_S = 0.2
"""First retransmission timeout; each next one is double (RFC 6298)."""

RETRANSMIT_S_MAX = 120.0

PIECE_BYTES = 64 << 10
"""What a write is cut into, so that chunks of any size are made without copying again."""


def retransmission_after(first_lost: float, now: float) -> float:
    """The first moment after `now` at which a sender whose bytes got lost at `first_lost` tries again."""
    at, timeout = first_lost, RETRANSMIT_S
    while at <= now:
        at += timeout
        timeout = min(2 * timeout, RETRANSMIT_S_MAX)
    return at


class Flow:
    """Bytes from `source` to `target`, in order.

    `on_room` is called when a waiting writer should go on, `on_news` when something can be read, `on_reset`
    with the reason when the sender reset, `on_stray` when data came that nobody will read.
    """

    def __init__(self, name: str, source: Machine, target: Machine, path: Path) -> None:
        self.name = name
        self.source = source
        self.target = target
        self.on_room: Callable[[], None] = lambda: None
        self.on_news: Callable[[], None] = lambda: None
        self.on_reset: Callable[[str], None] = lambda why: None
        self.on_stray: Callable[[], None] = lambda: None
        self._internet = source.internet
        self._path = path
        self._latency = path.latency_s
        self._uplink = path.uplink
        self._downlink = path.downlink
        capacity = min(self._uplink.bytes_per_s, self._downlink.bytes_per_s)
        product = 2 * capacity * 2 * self._latency if capacity < math.inf else math.inf
        buffers = self._internet.options.buffers
        self.send_bound = int(min(max(product, buffers.send_min), buffers.send_max))
        self.receive_bound = int(min(max(product, buffers.receive_min), buffers.receive_max))
        # The sender's kernel.
        self._outbox: deque[bytes] = deque()
        self.taken = self.sent = self.arrived = self.read = 0
        self._unacked = 0
        self._acks: deque[tuple[float, int]] = deque()
        self._edge = self.receive_bound
        self._edges: deque[tuple[float, int]] = deque()
        self._wake_at = math.inf
        self._writer_waits = self._window_shut = False
        self._finishing = self._reset = False
        # On the way.
        self._last_first = self._last_arrival = 0.0
        self._held: deque[tuple[str, list[bytes], int]] = deque()
        self._held_since = 0.0
        # The receiver's kernel.
        self._inbox: deque[memoryview] = deque()
        self._told_edge = self.receive_bound
        self.ended = False
        self.has_reader = True

    def __repr__(self) -> str:
        return (
            f"<Flow {self.name} taken={self.taken} sent={self.sent} arrived={self.arrived} read={self.read}>"
        )

    @property
    def unsent(self) -> int:
        """Bytes that have not left the sender's machine."""
        return self.taken - self.sent

    @property
    def unread(self) -> int:
        """Bytes that have arrived and wait for the reader."""
        return self.arrived - self.read

    @property
    def room(self) -> int:
        """Bytes that the send buffer would take now."""
        now = trio.current_time()
        while self._acks and self._acks[0][0] <= now:
            self._unacked -= self._acks.popleft()[1]
        return max(0, self.send_bound - self._unacked)

    @property
    def is_writable(self) -> bool:
        """Whether a waiting writer may go on: a quarter of the buffer is free (kernels take a third)."""
        return self.room * 4 >= self.send_bound

    @property
    def is_settled(self) -> bool:
        """Whether all that was taken has been acknowledged."""
        return self.room == self.send_bound

    # -- the sender's kernel -----------------------------------------------------------------------------

    def put(self, data: memoryview) -> int:
        """Take as much of `data` as the send buffer has room for."""
        count = min(self.room, data.nbytes)
        if count:
            for start in range(0, count, PIECE_BYTES):
                self._outbox.append(bytes(data[start : min(start + PIECE_BYTES, count)]))
            self.taken += count
            self._unacked += count
            self.offer()
        return count

    def offer(self) -> None:
        """Get in line for the uplink."""
        self._uplink.offer(self)

    def finish(self) -> None:
        """No more will be put; the end travels behind what was taken."""
        if not self._finishing:
            self._finishing = True
            if not self.unsent and not self._reset:
                self._set_out("fin", [], 0, 0.0)

    def cut_off(self, why: str) -> None:
        """The sender resets: what was not sent is forgotten, the reset travels behind what was."""
        if not self._reset:
            self._reset = True
            self.forget()
            self._set_out("rst " + why, [], 0, 0.0)

    def forget(self) -> None:
        """Drop what was not sent: nobody will want it."""
        self._outbox.clear()
        self.taken = self.sent

    def watch_room(self) -> None:
        """A writer waits: call `on_room` once there is room again."""
        self._writer_waits = True
        missing = self.send_bound // 4 - self.room
        for when, count in self._acks:
            missing -= count
            if missing <= 0:
                self._wake_later(when)
                return

    def _wake_later(self, when: float) -> None:
        if when < self._wake_at:
            self._wake_at = when
            self._internet.timeline.at(when, self._wake)

    def _wake(self) -> None:
        self._wake_at = math.inf
        if self._window_shut:
            self._window_shut = False
            self.offer()
        if self._writer_waits:
            if self.is_writable:
                self._writer_waits = False
                self.on_room()
            else:
                self.watch_room()

    def take(self, count: int) -> tuple[list[bytes], int]:
        """See `mycel.simnet.link.Sender.take`: as much as the receiver's window allows."""
        now = trio.current_time()
        while self._edges and self._edges[0][0] <= now:
            self._edge = self._edges.popleft()[1]
        count = min(count, self.unsent, self._edge - self.sent)
        if count <= 0 or not self.source.is_on:
            self._window_shut = self.unsent > 0
            if self._window_shut and self._edges:
                self._wake_later(self._edges[0][0])
            return [], 0
        pieces: list[bytes] = []
        size = 0
        while size < count:
            piece = self._outbox.popleft()
            if size + len(piece) > count:
                self._outbox.appendleft(piece[count - size :])
                piece = piece[: count - size]
            pieces.append(piece)
            size += len(piece)
        self.sent += size
        return pieces, size

    def depart(self, pieces: list[bytes], size: int, seconds: float) -> None:
        """See `mycel.simnet.link.Sender.depart`."""
        self._set_out("data", pieces, size, seconds)
        if self._finishing and not self.unsent:
            self._set_out("fin", [], 0, 0.0)

    # -- on the way --------------------------------------------------------------------------------------

    def _set_out(self, kind: str, pieces: list[bytes], size: int, seconds: float) -> None:
        late = 0.0
        for link in self._path.links:
            late += extra_delay(link, 2 * self._latency, self._internet.rng)
        first = max(trio.current_time() + self._latency + late, self._last_first)
        self._last_first = first
        if self._downlink.bytes_per_s == math.inf:
            self._last_arrival = max(first + seconds, self._last_arrival)
            self._internet.timeline.at(self._last_arrival, self._arrive, kind, pieces, size)
        else:
            self._internet.timeline.at(first, self._enter, kind, pieces, size, first + seconds)

    def _enter(self, kind: str, pieces: list[bytes], size: int, last: float) -> None:
        through = self._downlink.admit(size, last) if size else last
        self._last_arrival = max(through, self._last_arrival)
        self._internet.timeline.at(self._last_arrival, self._arrive, kind, pieces, size)

    def _arrive(self, kind: str, pieces: list[bytes], size: int) -> None:
        if self._held or not self._passes(kind):
            if not self._held:
                self._held_since = trio.current_time()
                self._internet.hold(self)
            self._held.append((kind, pieces, size))
        else:
            self._land(kind, pieces, size)

    def _passes(self, kind: str) -> bool:
        """Whether what arrives now gets through; a box on the way may have forgotten the connection."""
        if self._internet.is_cut(self.source, self.target):
            return False
        crossing = self._path.crossing
        return crossing is None or crossing.passes(kind.partition(" ")[0])

    def retry(self) -> None:
        """Something healed: the sender's next retransmission will tell."""
        when = retransmission_after(self._held_since, trio.current_time())
        self._internet.timeline.at(when, self._retransmit)

    def _retransmit(self) -> None:
        while self._held and self._passes(self._held[0][0]):
            self._land(*self._held.popleft())
        if not self._held:
            self._internet.let_go(self)

    # -- the receiver's kernel ---------------------------------------------------------------------------

    def _land(self, kind: str, pieces: list[bytes], size: int) -> None:
        crc = 0
        for piece in pieces:
            crc = zlib.crc32(piece, crc)
        self._internet.trace.note(kind, self.name, self.target.name, size, crc)
        if kind == "data":
            self._acks.append((trio.current_time() + self._latency, size))
            if self._writer_waits:
                self.watch_room()
            self.arrived += size
            if not self.has_reader:
                self.read = self.arrived
                self._open_window()
                self.on_stray()
                return
            self._inbox.extend(map(memoryview, pieces))
        elif kind == "fin":
            self.ended = True
        else:
            self.on_reset(kind[4:])
        self._internet.checks.on_flow(self)
        if self.target.is_running:
            self.on_news()

    def get(self, buffer: memoryview) -> int:
        """Move what has arrived into `buffer`; returns how many bytes."""
        size = buffer.nbytes
        filled = 0
        while self._inbox and filled < size:
            piece = self._inbox[0]
            count = min(piece.nbytes, size - filled)
            buffer[filled : filled + count] = piece[:count]
            filled += count
            if count == piece.nbytes:
                self._inbox.popleft()
            else:
                self._inbox[0] = piece[count:]
        if filled:
            self.read += filled
            self._open_window()
        return filled

    def _open_window(self) -> None:
        edge = self.read + self.receive_bound
        if (edge - self._told_edge) * 4 >= self.receive_bound:
            self._told_edge = edge
            self._edges.append((trio.current_time() + self._latency, edge))
            if self._window_shut:
                self._wake_later(self._edges[0][0])

    def close_reader(self) -> None:
        """Nobody reads any more: forget what waits, and let what comes be acknowledged and forgotten."""
        self.has_reader = False
        self._inbox.clear()
        self.read = self.arrived
        self._open_window()
