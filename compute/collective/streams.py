"""Bulk over the mesh's own streams: the twin of the sockets, and the way to peers that no socket reaches.

One stream towards each peer, opened with the first frame and left open; frames as `mycel.protocol.lane` says,
sealed and authenticated by the connection below. Control frames overtake parts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

import trio

from mycel.protocol.errors import ConnectionLost, MycelError, RemoteProtocolError
from mycel.protocol.lane import HEAD_BYTES, PART, Head, Parcel, Taker
from mycel.protocol.limits import DEFAULT_LANE_LIMITS, LaneLimits
from mycel.protocol.mesh import Access, Mesh, PeerId, Stream

if TYPE_CHECKING:
    from trio._core._run import TaskStatus

BULK = "/mycel/bulk/1"
BODY_BYTES_MAX = 4 << 20
"""The longest part; `LaneLimits.chunk_bytes` of all members stay below."""
SAMPLE_S = 0.02
"""Sends that took less say nothing of a line's speed: they went into a buffer."""


class OpenBody:
    """A body that came over an authenticated stream: nothing is left to open."""

    __slots__ = ("_data",)

    def __init__(self, data: bytes) -> None:
        self._data = memoryview(data)

    def open(self) -> memoryview:
        """See `Body.open`."""
        return self._data

    def open_into(self, place: memoryview) -> None:
        """See `Body.open_into`."""
        place[:] = self._data


class _Outgoing:
    """What waits to be sent to one peer."""

    def __init__(self) -> None:
        self.urgent: deque[tuple[Head, bytes]] = deque()
        self.answers: deque[Parcel] = deque()
        self.others: deque[Parcel] = deque()
        self.more = trio.Event()


class StreamLanes:
    """`mycel.protocol.lane.Lanes` over any mesh, in trio's thread. `run` must be running while it is used."""

    def __init__(
        self,
        mesh: Mesh,
        limits: LaneLimits = DEFAULT_LANE_LIMITS,
        hold_s: Callable[[int], float] = lambda count: 0.0,
    ) -> None:
        """`hold_s`: how long from now so many bytes must wait, for the sake of an owner's bound."""
        self._mesh = mesh
        self._limits = limits
        self._hold_s = hold_s
        self._taker: Taker | None = None
        self._nursery: trio.Nursery | None = None
        self._outgoing: dict[PeerId, _Outgoing] = {}
        self._moved: dict[PeerId, int] = {}
        self._rates: dict[PeerId, float] = {}
        mesh.serve_stream(BULK, self._receive, access=Access.MEMBER)

    async def run(self, *, task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Send until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                task_status.started()
                await trio.sleep_forever()
            finally:
                self._nursery = None

    def attach(self, taker: Taker) -> None:
        """See `Lanes.attach`."""
        self._taker = taker

    async def reach(self, peer: PeerId) -> None:
        """See `Lanes.reach`: a stream is there as soon as the connection is."""
        if peer not in self._mesh.peers:
            raise ConnectionLost(f"{peer} is not connected", reason="closed")

    def send(self, parcel: Parcel) -> None:
        """See `Lanes.send`."""
        outgoing = self._towards(parcel.peer)
        if outgoing is None:
            return
        (outgoing.answers if parcel.is_answer else outgoing.others).append(parcel)
        outgoing.more.set()

    def tell(self, peer: PeerId, head: Head, body: bytes) -> None:
        """See `Lanes.tell`."""
        outgoing = self._towards(peer)
        if outgoing is None:
            return
        outgoing.urgent.append((head, body))
        outgoing.more.set()

    def moved(self, peer: PeerId) -> int:
        """See `Lanes.moved`."""
        return self._moved.get(peer, 0)

    def rate(self, peer: PeerId) -> float | None:
        """See `Lanes.rate`."""
        return self._rates.get(peer)

    def _towards(self, peer: PeerId) -> _Outgoing | None:
        """What waits for a peer; None where nothing runs any more, so that nothing goes anywhere."""
        outgoing = self._outgoing.get(peer)
        if outgoing is None and self._nursery is not None:
            outgoing = self._outgoing[peer] = _Outgoing()
            self._nursery.start_soon(self._carry, peer, outgoing)
        return outgoing

    async def _carry(self, peer: PeerId, outgoing: _Outgoing) -> None:
        """Send what waits, until the stream is lost."""
        try:
            stream = await self._mesh.open_stream(peer, BULK)
            try:
                while True:
                    await self._send_waiting(peer, stream, outgoing)
                    outgoing.more = trio.Event()
                    await outgoing.more.wait()
            finally:
                stream.reset()
        except MycelError as error:
            self._lose(peer, str(error))
        finally:
            del self._outgoing[peer]

    async def _send_waiting(self, peer: PeerId, stream: Stream, outgoing: _Outgoing) -> None:
        while outgoing.urgent or outgoing.answers or outgoing.others:
            if outgoing.urgent:
                head, body = outgoing.urgent.popleft()
                await stream.send(head.pack() + body)
                continue
            parcel = (outgoing.answers or outgoing.others).popleft()
            if not parcel.gate.enter():
                continue
            try:
                filled = parcel.fill()
                frame = b"" if filled is None else b"".join((parcel.head.pack(), filled))
            finally:
                parcel.gate.leave()
            if not frame:
                continue
            await self._hold(stream, outgoing, len(frame))
            began = trio.current_time()
            await stream.send(frame)
            took = trio.current_time() - began
            if took >= SAMPLE_S:
                fresh = len(frame) / took
                self._rates[peer] = 0.8 * self._rates.get(peer, fresh) + 0.2 * fresh

    async def _hold(self, stream: Stream, outgoing: _Outgoing, count: int) -> None:
        """Wait until `count` bytes may go; control frames go meanwhile."""
        pause = self._hold_s(count)
        until = trio.current_time() + pause
        while pause and (outgoing.urgent or trio.current_time() < until):
            if outgoing.urgent:
                head, body = outgoing.urgent.popleft()
                await stream.send(head.pack() + body)
                continue
            outgoing.more = trio.Event()
            with trio.move_on_at(until):
                await outgoing.more.wait()

    def _lose(self, peer: PeerId, why: str) -> None:
        if self._taker is not None:
            self._taker.lost(peer, why)

    async def _receive(self, stream: Stream) -> None:
        """Take frames of a peer until its stream ends; what the taker finds wrong with one ends it too."""
        peer = stream.peer
        while True:
            first = await stream.receive_some(HEAD_BYTES)
            if not first:
                return
            rest = b""
            if len(first) < HEAD_BYTES:
                rest = await stream.receive_exactly(HEAD_BYTES - len(first))
            head = Head.unpack(first + rest, BODY_BYTES_MAX)
            if head.kind != PART and head.length > self._limits.text_bytes:
                raise RemoteProtocolError(f"a control frame of {head.length} bytes")
            body = bytearray()
            while len(body) < head.length:
                data = await stream.receive_some(head.length - len(body))
                if not data:
                    raise RemoteProtocolError("a bulk stream ended within a frame")
                body += data
                self._moved[peer] = self._moved.get(peer, 0) + len(data)
            if self._taker is not None:
                self._taker.take(peer, head, OpenBody(bytes(body)))
