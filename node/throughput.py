"""How fast the line to a neighbour is, each way: a few megabytes over a stream of its own, timed.

    up, down = await throughput.measure(peer)      # bytes per second

One who wants to know opens `/mycel/rate/1` and says a direction (`u`: from me to you, `d`: the other way)
and how many bytes (4, big-endian). The bytes follow, with the end of the stream behind them; whoever gets
them times the last three quarters, so that neither the round trip nor a line that has yet to get going
counts, and for `u` answers with the microseconds (4, big-endian). Tries grow from a few kilobytes to what the
line carries in a quarter of a second, and never beyond `BYTES_MAX`.

Only neighbours are asked, no hosts outside the swarm; and a peer's bytes here are bounded, so that nobody
uses this to fill another's line.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

from mycel.protocol.errors import LimitExceeded, MycelError, RemoteProtocolError
from mycel.protocol.mesh import Mesh, PeerId, Stream

PROTOCOL = "/mycel/rate/1"
FIRST_BYTES = 32 << 10
"""A second of a line of 256 kbit/s: what fills a line for longer keeps the pings of its connection from
arriving."""
BYTES_MAX = 4 << 20
"""Of one try: a tenth of a second at 300 Mbit/s."""
WORTH_S = 0.25
"""A line is known by a try that took so long; four times as many bytes are tried where it did not, which is a
second at most."""
TRY_S = 10.0
"""After which a try is given up: the first 32 KiB at 26 kbit/s."""
ALLOWED_BYTES = 24 << 20
"""What one peer may have sent from here, and send here, for this purpose within `ALLOWED_S`: three times what
it takes."""
ALLOWED_S = 600.0
AT_ONCE = 2
"""Measurements served at once: more would measure each other."""
PIECE_BYTES = 64 << 10
PIECE_BYTES_MIN = 512
_ZEROS = bytes(PIECE_BYTES)


class Clocked:
    """Times what arrives: the last three quarters of `total` bytes."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._came = 0
        self._began: tuple[int, float] | None = None
        self.rate = 0.0
        """Bytes per second, once all came."""

    def came(self, count: int, now: float) -> bool:
        """`count` bytes more came; whether these are all. Raises `RemoteProtocolError` for more than said."""
        self._came += count
        if self._came > self._total:
            raise RemoteProtocolError(f"more than the {self._total} bytes that were to come")
        if self._began is None and 4 * self._came >= self._total:
            self._began = (self._came, now)
        if self._came < self._total:
            return False
        assert self._began is not None
        counted, since = self._began
        # What came in a few large pieces was faster than can be told by so little.
        rest = self._total - counted
        timed = rest if 8 * rest >= self._total else 0.75 * self._total
        self.rate = timed / max(now - since, 1e-3)
        return True


class Throughput:
    """Serves others' measurements and makes own ones."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._used: dict[PeerId, tuple[float, int]] = {}
        self._serving = 0
        self.refused = 0
        """Measurements that were not served."""
        mesh.serve_stream(PROTOCOL, self._serve)

    async def measure(self, peer: PeerId) -> tuple[float, float]:
        """Bytes per second to `peer` and from it. Raises what streams raise, `LimitExceeded` for a line on
        which not even the first bytes came in time."""
        return await self._climb(peer, self._send_there), await self._climb(peer, self._have_sent)

    async def _climb(self, peer: PeerId, attempt: Callable[[PeerId, int], Awaitable[float]]) -> float:
        count, rate = FIRST_BYTES, 0.0
        while True:
            with trio.move_on_after(TRY_S) as patience:
                rate = await attempt(peer, count)
            if patience.cancelled_caught:
                if not rate:
                    raise LimitExceeded(f"{count} bytes to or from {peer} took more than {TRY_S:g} s")
                return rate
            if count == BYTES_MAX or count >= WORTH_S * rate:
                return rate
            count = min(BYTES_MAX, 4 * count)

    async def _send_there(self, peer: PeerId, count: int) -> float:
        stream = await self._mesh.open_stream(peer, PROTOCOL)
        try:
            await stream.send(b"u" + count.to_bytes(4, "big"))
            await _send(stream, count)
            micros = int.from_bytes(await stream.receive_exactly(4), "big")
        except BaseException:  # why: a cancelled try ends at the other side too; raised again
            stream.reset()
            raise
        await stream.aclose()
        return 0.75 * count / max(micros / 1e6, 1e-3)

    async def _have_sent(self, peer: PeerId, count: int) -> float:
        stream = await self._mesh.open_stream(peer, PROTOCOL)
        try:
            await stream.send(b"d" + count.to_bytes(4, "big"), end=True)
            rate = await _receive(stream, count)
        except BaseException:  # why: a cancelled try ends at the other side too; raised again
            stream.reset()
            raise
        await stream.aclose()
        return rate

    async def _serve(self, stream: Stream) -> None:
        asked = await stream.receive_exactly(5)
        way, count = asked[:1], int.from_bytes(asked[1:], "big")
        if way not in (b"u", b"d") or not 0 < count <= BYTES_MAX:
            raise RemoteProtocolError(f"a measurement of {count} bytes, way {way!r}")
        if self._serving >= AT_ONCE or not self._allow(stream.peer, count):
            self.refused += 1
            stream.reset()
            return
        self._serving += 1
        try:
            with trio.move_on_after(TRY_S) as patience:
                if way == b"d":
                    await _send(stream, count)
                else:
                    rate = await _receive(stream, count)
                    micros = min(int(0.75 * count / rate * 1e6), (1 << 32) - 1)
                    await stream.send(micros.to_bytes(4, "big"), end=True)
            if patience.cancelled_caught:
                stream.reset()
        except MycelError:
            stream.reset()
        finally:
            self._serving -= 1

    def _allow(self, peer: PeerId, count: int) -> bool:
        now = trio.current_time()
        self._used = {one: used for one, used in self._used.items() if used[0] > now - ALLOWED_S}
        since, used = self._used.get(peer, (now, 0))
        if used + count > ALLOWED_BYTES:
            return False
        self._used[peer] = (since, used + count)
        return True


async def _send(stream: Stream, count: int) -> None:
    """In pieces of a sixteenth: each is sealed by itself, so that arrival tells time also of few bytes."""
    piece = min(PIECE_BYTES, max(count // 16, PIECE_BYTES_MIN))
    while count > piece:
        await stream.send(_ZEROS[:piece])
        count -= piece
    await stream.send(_ZEROS[:count], end=True)


async def _receive(stream: Stream, count: int) -> float:
    clocked = Clocked(count)
    while True:
        piece = await stream.receive_some()
        if not piece:
            raise RemoteProtocolError(f"the stream ended before its {count} bytes")
        if clocked.came(len(piece), trio.current_time()):
            return clocked.rate
