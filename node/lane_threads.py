"""The threads of lanes: one for each socket and end, blocking, with a buffer of its own.

A sender takes the next parcel of its peer, seals it within the parcel's gate, and writes it to its socket. A
receiver reads a frame and hands it to the taker, who works it in and hands on what follows from it, in this
thread. Nothing here touches trio but to say that a lane has died.

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

from mycel.node.lane_wire import BODY_BYTES_MAX, TAG_BYTES, Opener, Sealer
from mycel.protocol.errors import MycelError, RemoteProtocolError
from mycel.protocol.lane import Head, Parcel, Taker
from mycel.protocol.mesh import PeerId

log = logging.getLogger("mycel.lanes")

SLICE_BYTES = 256 * 1024
"""Bytes read at once from afar: how finely it shows that a lane moves. From nearby a whole chunk is."""
NEAR_BUFFER_BYTES = 256 * 1024
"""The kernel's buffers of a lane to nearby, where a round trip needs no more: what is written there is still
in a cache when it is read. Afar the kernel sizes them itself."""
SENT_MAX = 4096
"""Parcels kept to be sent again before those of closed gates are looked for."""
BURST_S = 0.05
"""How far ahead of its rate a capped node may send."""


class Cap:
    """The most bytes a second that a node sends over its lanes, all together; 0 for no bound."""

    def __init__(self, bytes_per_s: float) -> None:
        self._rate = bytes_per_s
        self._turn = threading.Lock()
        self._free_at = 0.0

    def wait(self, count: int) -> None:
        """Sleep until `count` bytes may go."""
        if not self._rate:
            return
        with self._turn:
            now = time.monotonic()
            begin = max(self._free_at, now - BURST_S)
            self._free_at = begin + count / self._rate
            pause = begin - now
        if pause > 0:
            time.sleep(pause)


class Waiting:
    """Parcels for one peer, which its senders take."""

    def __init__(self) -> None:
        self._turn = threading.Condition(threading.Lock())
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
            self._turn.notify(len(parcels))
            return True

    def get(self, is_over: Callable[[], bool]) -> Parcel | None:
        """The next one; None at the end, and once `is_over` says so."""
        with self._turn:
            while not is_over():
                if self._answers:
                    return self._answers.popleft()
                if self._others:
                    return self._others.popleft()
                if self._is_closed:
                    break
                self._turn.wait()
            return None

    def wake(self) -> None:
        """Have everybody look again whether it is over."""
        with self._turn:
            self._turn.notify_all()

    def close(self) -> list[Parcel]:
        """Take no more; returns what is left."""
        with self._turn:
            self._is_closed = True
            left = [*self._answers, *self._others]
            self._answers.clear()
            self._others.clear()
            self._turn.notify_all()
            return left

    def count(self, sent: int, seconds: float) -> None:
        """So much went out in so long."""
        with self._turn:
            self.sent_bytes += sent
            self.busy_s += seconds


class LaneSender:
    """The near end of a lane to a peer."""

    def __init__(
        self,
        sock: socket.socket,
        sealer: Sealer,
        waiting: Waiting,
        cap: Cap,
        on_end: Callable[[LaneSender], None],
    ) -> None:
        """`on_end` is called once, in the thread, when the lane is gone; it closes `sock`."""
        self.sock = sock
        self._sealer = sealer
        self._waiting = waiting
        self._cap = cap
        self._on_end = on_end
        self._sent: deque[Parcel] = deque()
        self.is_over = False
        self._thread = threading.Thread(target=self._run, name="lane out", daemon=True)

    def start(self) -> None:
        """Begin to send."""
        self._thread.start()

    def end(self) -> None:
        """End the lane; from any thread."""
        self.is_over = True
        shut(self.sock)
        self._waiting.wake()

    def join(self) -> None:
        """Wait for its thread, after `end`."""
        self._thread.join()

    def undelivered(self) -> list[Parcel]:
        """What may not have arrived of operations that go on, after the end. Once."""
        left = [parcel for parcel in self._sent if not parcel.gate.is_closed]
        self._sent.clear()
        return left

    def _run(self) -> None:
        try:
            while (parcel := self._waiting.get(lambda: self.is_over)) is not None:
                self._sent.append(parcel)
                if len(self._sent) > SENT_MAX:
                    self._sent = deque(sent for sent in self._sent if not sent.gate.is_closed)
                if not parcel.gate.enter():
                    continue
                try:
                    body = parcel.fill()
                    frame = None if body is None else self._sealer.seal(parcel.head, body)
                finally:
                    parcel.gate.leave()
                if frame is None:
                    continue
                self._cap.wait(len(frame))
                began = time.monotonic()
                self.sock.sendall(frame)
                self._waiting.count(len(frame), time.monotonic() - began)
        except OSError as error:
            log.debug("a lane out ended: %s", error)
        except MycelError as error:
            log.warning("a lane out was given up: %s", error)
        except Exception:  # boundary: a bug in what fills a body must not end quietly with its thread
            log.exception("a lane out was given up")
        self.is_over = True
        self._on_end(self)


class LaneReceiver:
    """The far end of a lane: frames of `peer` for the taker."""

    def __init__(
        self,
        sock: socket.socket,
        opener: Opener,
        peer: PeerId,
        taker: Taker,
        on_end: Callable[[LaneReceiver], None],
        *,
        is_near: bool,
    ) -> None:
        """`on_end` is called once, in the thread, when the lane is gone; it closes `sock`."""
        self.sock = sock
        self._opener = opener
        self._peer = peer
        self._taker = taker
        self._on_end = on_end
        self._slice = BODY_BYTES_MAX + TAG_BYTES if is_near else SLICE_BYTES
        self._buffer = bytearray(SLICE_BYTES)
        self.moved = 0
        """Bytes that came so far."""
        self.why = ""
        """What ended it, empty where its sender did."""
        self._thread = threading.Thread(target=self._run, name="lane in", daemon=True)

    def start(self) -> None:
        """Begin to receive."""
        self._thread.start()

    def end(self) -> None:
        """End the lane; from any thread."""
        shut(self.sock)

    def join(self) -> None:
        """Wait for its thread, after `end`."""
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._receive_frame():
                pass
        except OSError as error:
            self.why = f"was lost: {error.strerror or error}"
        except MycelError as error:
            self.why = str(error)
            log.warning("a lane of %s was given up: %s", self._peer, error)
        except Exception:  # boundary: a bug in working a piece in must not end quietly with its thread
            self.why = "was given up for an error of this node"
            log.exception("a lane of %s was given up", self._peer)
        shut(self.sock)
        self._on_end(self)

    def _receive_frame(self) -> bool:
        """Take one frame; False at the end. Raises `OSError`, `RemoteProtocolError`."""
        head_bytes = self._opener.head_bytes
        view = memoryview(self._buffer)
        got = self.sock.recv_into(view[:head_bytes], head_bytes, socket.MSG_WAITALL)
        if not got:
            return False
        if got < head_bytes:
            raise RemoteProtocolError("the lane ended within a head")
        head = self._opener.open_head(view[:head_bytes])
        count = self._opener.body_bytes(head)
        self._take_body(head, count)
        self.moved += head_bytes
        return True

    def _take_body(self, head: Head, count: int) -> None:
        if count > BODY_BYTES_MAX + TAG_BYTES:
            raise RemoteProtocolError(f"a body of {count} bytes")
        if len(self._buffer) < count:
            self._buffer = bytearray(count)
        view = memoryview(self._buffer)[:count]
        at = 0
        while at < count:
            most = min(self._slice, count - at)
            got = self.sock.recv_into(view[at : at + most], most, socket.MSG_WAITALL)
            if not got:
                raise RemoteProtocolError("the lane ended within a body")
            at += got
            self.moved += got
        self._taker.take(self._peer, head, self._opener.body(head, view))


def shut(sock: socket.socket) -> None:
    """End a socket so that whoever waits for it wakes and the other end hears of it; trio closes it."""
    with contextlib.suppress(OSError):  # the other end may have been faster
        sock.shutdown(socket.SHUT_RDWR)
