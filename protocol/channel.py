"""One yamux stream, without a task in it: what is queued to go out, and what the peer may send in.

Sending never waits here. `try_send` writes a frame straight into the connection's output where it fits, or
keeps a copy within the bound; `enqueue` borrows the caller's memory and calls `on_drained` once the last
byte was copied out, so a sender parks meanwhile and may be cancelled at any frame boundary (`withdraw`)
without hurting the connection. Arriving data goes to `sink` at once, which says whether the peer may send as
much again, or gives `credit` once it may.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from mycel.protocol import yamux
from mycel.protocol.egress import FRAGMENT_MIN
from mycel.protocol.errors import MycelError, StreamClosed

if TYPE_CHECKING:
    from mycel.protocol.session import Session

Sink = Callable[[memoryview | None, MycelError | None], bool | None]
"""Gets (data, None), (None, None) at the end of the stream, (None, error) at its loss. True says that the
data was dealt with; else whoever owns the sink gives `credit` later."""


OFFER_BYTES = 64 * 1024
"""What `offer` copies of data for which there is no room yet."""


def _discard(data: memoryview | None, error: MycelError | None) -> None:
    """Stands in for a sink until there is one."""


class Channel:
    """A stream of one `Session`. Its owner sets `sink` and `on_drained`."""

    __slots__ = (
        "_egress",
        "_outbox",
        "_session",
        "acknowledged",
        "copied",
        "error",
        "fin_received",
        "fin_sent",
        "fin_wanted",
        "flags",
        "forgotten",
        "id",
        "inbound",
        "on_drained",
        "prefix",
        "queued",
        "ready",
        "send_window",
        "sink",
        "uncredited",
        "window",
        "window_max",
        "window_pool",
    )

    def __init__(self, session: Session, number: int, *, inbound: bool, now: float) -> None:
        self._session = session
        self._egress = session.egress
        self._outbox: deque[memoryview] = deque()
        self.id = number
        self.inbound = inbound
        self.sink: Sink = _discard
        self.on_drained: Callable[[], None] | None = None
        self.prefix = b""
        """Bytes that go ahead of the first data: a lazy negotiation."""
        self.flags = yamux.ACK if inbound else yamux.SYN
        """Flags that the next frame carries."""
        self.send_window = yamux.INITIAL_WINDOW
        self.window = yamux.ReceiveWindow(now)
        self.window_max = yamux.SEND_WINDOW_MAX
        """What the receive window may grow to, within the limits of the connection..."""
        self.window_pool: yamux.Pool | None = None
        """...and what it takes its growth from, until the stream ends."""
        self.uncredited = 0
        """Bytes that arrived and were not dealt with yet."""
        self.queued = 0
        self.copied = 0
        """Of the queued bytes, those copied for a sender that did not wait."""
        self.ready = False
        self.acknowledged = inbound
        self.fin_wanted = False
        self.fin_sent = False
        self.fin_received = False
        self.forgotten = False
        self.error: MycelError | None = None

    @property
    def fin_due(self) -> bool:
        """Whether nothing but the end of the stream is left to send."""
        return self.fin_wanted and not self.fin_sent and not self.queued

    def check_writable(self) -> None:
        """Raises what ended this stream, or `StreamClosed` after `finish`."""
        if self.error is not None:
            raise self.error
        if self.fin_wanted:
            raise StreamClosed("this side ended the stream; open another one to send more")

    def try_send(self, data: bytes | bytearray | memoryview, *, end: bool = False) -> bool:
        """Take all of `data` (a copy is made) if window and output have room for it; False if not.

        `end` finishes the stream with it.
        """
        self.check_writable()
        if self.prefix:
            data = self.prefix + data
        egress = self._egress
        size = len(data)
        if size > self.send_window - self.queued:
            return False
        if self._outbox or not egress.put(self, data, size, end=end):
            if not egress.admit(self, size):
                return False
            self.fin_wanted = end
            self._push(memoryview(bytes(data)), size)
        self.prefix = b""
        return True

    def offer(self, data: memoryview, *, keep: bool = True) -> int:
        """Take as many leading bytes of `data` as there is room for, and a copy of `OFFER_BYTES` more.

        While such a copy waits nothing is taken (0); `on_drained` is called when it went out. Without `keep`
        none is made.
        """
        self.check_writable()
        if self.queued:
            return 0
        self.flush_prefix()
        taken, size = 0, len(data)
        while taken < size:
            least = min(size - taken, FRAGMENT_MIN)
            count = 0 if self.queued else min(size - taken, self.send_window, self._egress.room(least))
            if count < least:
                if not keep:
                    break
                piece = bytes(data[taken : taken + OFFER_BYTES])
                self._push(memoryview(piece), len(piece))
                return taken + len(piece)
            self._egress.put(self, data[taken : taken + count], count, end=False)
            taken += count
        return taken

    def enqueue(self, data: memoryview, *, end: bool = False) -> None:
        """Send all of `data`, borrowed until `on_drained` is called. `end` finishes the stream with it."""
        self.check_writable()
        self.flush_prefix()
        self.fin_wanted = end
        self._push(data, len(data))

    def flush_prefix(self) -> None:
        """Send the negotiation by itself, where somebody waits for it."""
        if self.prefix and self.error is None:
            prefix, self.prefix = self.prefix, b""
            self._push(memoryview(prefix), len(prefix))

    def withdraw(self) -> None:
        """Forget what is left of the memory borrowed last."""
        if self._outbox:
            self.queued -= len(self._outbox.pop())
            self.fin_wanted = self.fin_sent

    def finish(self) -> None:
        """Send no more after what is queued (FIN). Nothing happens the second time."""
        if self.fin_wanted or self.error is not None:
            return
        self.flush_prefix()
        self.fin_wanted = True
        self._egress.schedule(self)

    def reset(self, error: MycelError) -> None:
        """End both directions now; `error` is what this side's users see from here on."""
        self._session.reset(self, error)

    def forget(self) -> None:
        """Send what is queued, then the end; whatever still arrives is answered with a reset."""
        if self.error is None:
            self.forgotten = True
            self.sink = _discard
            self.finish()
            self._session.linger(self)

    def linger(self) -> None:
        """Let the peer finish too, within `session.LINGER_S`; then the stream is reset."""
        self._session.linger(self)

    def credit(self, count: int) -> bool:
        """The reader dealt with `count` bytes: the peer may send as many more. True where it is to be told
        now, so that a flush is due."""
        return self._session.credit(self, count)

    def emit(self, view: memoryview, offset: int, count: int) -> None:
        """Copy `count` queued bytes into `view` at `offset`: the body of one frame."""
        outbox = self._outbox
        self.queued -= count
        while count:
            piece = outbox[0]
            size = len(piece)
            if size > count:
                view[offset : offset + count] = piece[:count]
                outbox[0] = piece[count:]
                break
            view[offset : offset + size] = piece
            offset += size
            count -= size
            outbox.popleft()

    def let_go(self) -> None:
        """Nothing will happen on this stream any more: forget its user, so that both are freed at once."""
        self.sink = _discard
        self.on_drained = None

    @property
    def is_over(self) -> bool:
        """Whether both ends finished."""
        return self.fin_sent and self.fin_received

    def drop_queue(self) -> None:
        """Forget all that is queued."""
        self.queued = 0
        self._outbox.clear()
        self._egress.release(self)

    def _push(self, data: memoryview, size: int) -> None:
        if size:
            self._outbox.append(data)
            self.queued += size
        self._egress.schedule(self)
