"""The two ends of a lane, as a `LaneThread` drives them: never waiting, a buffer each.

A sender takes the next parcel of its peer, seals it within the parcel's gate, and writes it to its socket. A
receiver reads a frame and hands it to the taker, who works it in and hands on what follows from it. Nothing
here touches trio but to say that a lane has died.

What a lane took and may not have delivered is sent again when it dies, over those that are left: a sender
keeps what it sent for as long as the parcels' gates are open.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections import deque
from collections.abc import Callable

from mycel.node.lane_threads import LaneThread
from mycel.node.lane_wire import BODY_BYTES_MAX, TAG_BYTES, Opener, Sealer
from mycel.protocol.errors import MycelError, RemoteProtocolError
from mycel.protocol.lane import Gate, Head, Parcel, Taker
from mycel.protocol.mesh import PeerId

log = logging.getLogger("mycel.lanes")

SENT_MAX = 4096
"""Parcels kept to be sent again before those of closed gates are looked for."""


class Cap:
    """The most bytes a second that a node sends in bulk, over lanes and streams together; 0 for no bound."""

    BURST_S = 0.05
    """How far ahead of its rate a node may send."""

    def __init__(self, bytes_per_s: float) -> None:
        self._rate = bytes_per_s
        self._turn = threading.Lock()
        self._free_at = 0.0

    def reserve(self, count: int) -> float:
        """When `count` bytes may go, on `time.monotonic`'s clock; their turn is taken."""
        if not self._rate:
            return 0.0
        with self._turn:
            begin = max(self._free_at, time.monotonic() - self.BURST_S)
            self._free_at = begin + count / self._rate
            return begin

    def hold_s(self, count: int) -> float:
        """The same as seconds from now."""
        return max(0.0, self.reserve(count) - time.monotonic())


class Waiting:
    """Parcels for one peer, which its senders take."""

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._answers: deque[Parcel] = deque()
        self._others: deque[Parcel] = deque()
        self._is_closed = False
        self.sent_bytes = 0
        self.busy_s = 0.0

    def put(self, parcels: list[Parcel]) -> bool:
        """Whether they were taken: not any more once `close` was called."""
        with self._turn:
            if self._is_closed:
                return False
            for parcel in parcels:
                (self._answers if parcel.is_answer else self._others).append(parcel)
            return True

    def get(self) -> Parcel | None:
        """The next one; None where there is none."""
        if not (self._answers or self._others):
            return None
        with self._turn:
            if self._answers:
                return self._answers.popleft()
            return self._others.popleft() if self._others else None

    def close(self) -> list[Parcel]:
        """Take no more; returns what is left."""
        with self._turn:
            self._is_closed = True
            left = [*self._answers, *self._others]
            self._answers.clear()
            self._others.clear()
            return left

    def count(self, sent: int, seconds: float) -> None:
        """So much went out in so long."""
        with self._turn:
            self.sent_bytes += sent
            self.busy_s += seconds


class LaneSender:
    """The near end of a lane to a peer: a `LaneEnd`."""

    def __init__(
        self,
        sock: socket.socket,
        sealer: Sealer,
        waiting: Waiting,
        cap: Cap,
        thread: LaneThread,
        on_end: Callable[[LaneSender], None],
    ) -> None:
        """`on_end` is called once, in the thread, when the lane is gone."""
        self.sock = sock
        self.is_over = False
        self.is_full = False
        self.has_news = False
        self._sealer = sealer
        self._waiting = waiting
        self._cap = cap
        self._thread = thread
        self._on_end = on_end
        self._sent: deque[Parcel] = deque()
        self._head = b""
        self._rest = memoryview(b"")
        self._gate: Gate | None = None
        self._frame_bytes = 0
        self._began = 0.0
        self._not_before = 0.0

    def wake(self) -> None:
        """There may be something to send."""
        self._thread.wake()

    def end(self) -> None:
        """End the lane; from any thread."""
        shut(self.sock)
        self._thread.wake()

    def undelivered(self) -> list[Parcel]:
        """What may not have arrived of operations that go on, after the end. Once."""
        left = [parcel for parcel in self._sent if not parcel.gate.is_closed]
        self._sent.clear()
        return left

    # LaneEnd

    def step(self) -> bool:
        """See `LaneEnd.step`."""
        try:
            if self.has_news:
                self._look_for_end()
            elif not self._frame_bytes and not self._take_next():
                return False
            if self.is_over or (self._not_before and time.monotonic() < self._not_before):
                return False
            return self._send_some()
        except OSError as error:
            log.debug("a lane out ended: %s", error)
        except MycelError as error:
            log.warning("a lane out was given up: %s", error)
        except Exception:  # boundary: a bug in what fills a body must not end the thread of all lanes
            log.exception("a lane out was given up")
        self.is_over = True
        return True

    def pause_s(self) -> float | None:
        """See `LaneEnd.pause_s`."""
        if not self._frame_bytes or not self._not_before or self.is_full:
            return None  # where its socket is full, that is what it waits for
        return max(0.0, self._not_before - time.monotonic())

    def leave(self) -> None:
        """See `LaneEnd.leave`."""
        self._on_end(self)

    def _look_for_end(self) -> None:
        """Nothing is said in the other direction of a lane: what can be read there is its end."""
        self.has_news = False
        with contextlib.suppress(BlockingIOError):
            if self.sock.recv(1):
                raise RemoteProtocolError("something came on a lane that goes the other way")
            self.is_over = True

    def _take_next(self) -> bool:
        """Seal what comes next; whether there was anything."""
        parcel = self._waiting.get()
        if parcel is None:
            return False
        self._sent.append(parcel)
        if len(self._sent) > SENT_MAX:
            self._sent = deque(sent for sent in self._sent if not sent.gate.is_closed)
        if not parcel.gate.enter():
            return True
        try:
            body = parcel.fill()
            if body is None:
                return True
            self._head, self._rest = self._sealer.seal(parcel.head, body)
        finally:
            parcel.gate.leave()
        self._gate = parcel.gate if self._sealer.is_plain else None
        self._frame_bytes = len(self._head) + len(self._rest)
        self._not_before = self._cap.reserve(self._frame_bytes)
        self._began = 0.0
        return True

    def _send_some(self) -> bool:
        if not self._frame_bytes:
            return True  # what was taken had nothing to send
        if not self._began:
            self._began = time.monotonic()
        if self._gate is not None and not self._gate.enter():
            self._gate = None  # nobody wants it any more; the frame is to end all the same
            self._rest = memoryview(bytes(len(self._rest)))
        try:
            sent = self.sock.sendmsg((self._head, self._rest)) if self._head else self.sock.send(self._rest)
        except BlockingIOError:
            self.is_full = True
            return False
        finally:
            if self._gate is not None:
                self._gate.leave()
        self.is_full = False
        of_head = min(sent, len(self._head))
        self._head = self._head[of_head:]
        self._rest = self._rest[sent - of_head :]
        if not self._rest and not self._head:
            self._waiting.count(self._frame_bytes, time.monotonic() - self._began)
            self._frame_bytes = 0
        return True


class LaneReceiver:
    """The far end of a lane: frames of `peer` for the taker. A `LaneEnd`."""

    def __init__(
        self,
        sock: socket.socket,
        opener: Opener,
        peer: PeerId,
        taker: Taker,
        on_end: Callable[[LaneReceiver], None],
    ) -> None:
        """`on_end` is called once, in the thread, when the lane is gone."""
        self.sock = sock
        self.is_over = False
        self.is_full = False
        self.has_news = False
        self._opener = opener
        self._peer = peer
        self._taker = taker
        self._on_end = on_end
        self._head_place = memoryview(bytearray(opener.head_bytes))
        self._body_place = memoryview(bytearray(0))
        self._head: Head | None = None
        self._place = self._head_place
        self._at = 0
        self.moved = 0
        """Bytes that came so far."""

    def end(self) -> None:
        """End the lane; from any thread."""
        shut(self.sock)

    # LaneEnd

    def step(self) -> bool:
        """See `LaneEnd.step`."""
        try:
            return self._receive_some()
        except OSError as error:
            log.debug("a lane of %s was lost: %s", self._peer, error)
        except MycelError as error:
            log.warning("a lane of %s was given up: %s", self._peer, error)
        except Exception:  # boundary: a bug in working a piece in must not end the thread of all lanes
            log.exception("a lane of %s was given up", self._peer)
        self.is_over = True
        return True

    def pause_s(self) -> float | None:
        """See `LaneEnd.pause_s`."""
        return None

    def leave(self) -> None:
        """See `LaneEnd.leave`."""
        self._on_end(self)

    def _receive_some(self) -> bool:
        """Read what is there of the frame. Raises `OSError`, `RemoteProtocolError`."""
        try:
            got = self.sock.recv_into(self._place[self._at :])
        except BlockingIOError:
            return False
        if not got:
            if self._at or self._head is not None:
                raise ConnectionResetError("it ended within a frame")  # as when a machine dies
            self.is_over = True
            return True
        self._at += got
        self.moved += got
        if self._at == len(self._place):
            self._at = 0
            if self._head is None:
                self._take_head(self._opener.open_head(self._place))
            else:
                self._take_body(self._head)
        return True

    def _take_head(self, head: Head) -> None:
        count = self._opener.body_bytes(head)
        if count > BODY_BYTES_MAX + TAG_BYTES:
            raise RemoteProtocolError(f"a body of {count} bytes")
        if len(self._body_place) < count:
            self._body_place = memoryview(bytearray(count))
        self._place = self._body_place[:count]
        self._head = head
        if not count:
            self._take_body(head)

    def _take_body(self, head: Head) -> None:
        body = self._opener.body(head, self._place)
        self._head, self._place = None, self._head_place
        self._taker.take(self._peer, head, body)


def shut(sock: socket.socket) -> None:
    """End a socket so that whoever waits for it wakes and the other end hears of it."""
    with contextlib.suppress(OSError):  # the other end may have been faster
        sock.shutdown(socket.SHUT_RDWR)
