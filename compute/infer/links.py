"""Frames between peers: one long-lived stream to each peer that this node sends to.

A frame that fits the peer's window leaves in the very call that made it; otherwise it waits here in order.
When a stream breaks, what waits is dropped (send logs have it) and the receivers are told "link"; the next
frame opens a new stream, over a new connection if need be, and if that fails they are told "unreachable".
A frame for this node itself is delivered without being encoded.

Arriving bytes are cut into frames in the connection's reader. While a receiver says that it holds too much,
the senders' windows are not opened further: they wait, and their own receivers in turn.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import Protocol

import trio
from trio import TaskStatus

from mycel.compute.infer.frame import FrameReader, encode_frame
from mycel.compute.infer.messages import STAGE_PROTOCOL, Frame
from mycel.protocol.errors import (
    ConnectionLost,
    DialError,
    Refused,
    RemoteProtocolError,
    StreamClosed,
    StreamReset,
)
from mycel.protocol.mesh import Access, Mesh, PeerId, Stream

CONNECT_S = 2.0
"""How long a new connection for waiting frames may take; the session's owner decides meanwhile anyway."""

_BROKEN = (ConnectionLost, StreamReset, StreamClosed, RemoteProtocolError)


class Receiver(Protocol):
    """Who takes frames: the stage service, the owner service."""

    @property
    def congested(self) -> bool:
        """Whether it holds so much that senders should wait; it calls `Links.relieve` when it does not."""

    def on_frame(self, peer: PeerId, frame: Frame) -> None:
        """A frame from `peer`; must not block."""

    def on_link_ready(self, peer: PeerId) -> None:
        """What waited for the window of `peer` is sent."""

    def on_link_lost(self, peer: PeerId, kind: str, text: str) -> None:
        """The stream to `peer` broke ("link") or could not be made ("unreachable")."""


class Links:
    """All stage streams of this node. `run` must be running while frames are sent."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.addrs: dict[PeerId, Sequence[str]] = {}
        """Where to dial peers that this node might have no connection to."""
        self._receivers: list[Receiver] = []
        self._links: dict[PeerId, _Link] = {}
        self._inbound: dict[PeerId, _Inbound] = {}
        self._nursery: trio.Nursery | None = None
        mesh.serve_stream(STAGE_PROTOCOL, self._serve, access=Access.SUBMIT)

    def attach(self, receiver: Receiver) -> None:
        """From now on `receiver` gets every frame and every loss."""
        self._receivers.append(receiver)

    async def run(self, *, task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep streams until cancelled."""
        try:
            async with trio.open_nursery() as self._nursery:
                task_status.started()
                await trio.sleep_forever()
        finally:
            self._nursery = None

    def send(self, peer: PeerId, frame: Frame) -> None:
        """Send, queue, or deliver if `peer` is this node. Never blocks; losses are told to the receivers."""
        if peer == self.mesh.peer_id:
            self.deliver(peer, frame)
        else:
            self._send_bytes(peer, encode_frame(frame))

    def _send_bytes(self, peer: PeerId, data: bytes) -> None:
        link = self._links.get(peer)
        if link is None:
            if self._nursery is None:
                return
            link = self._links[peer] = _Link(self, peer)
            self._nursery.start_soon(link.run)
        link.send(data)

    def send_all(self, frames: Sequence[tuple[PeerId, Frame]]) -> None:
        """Send several at once, in order, those for one peer in one piece.

        So the sessions that shared a step arrive together, and share the next one too.
        """
        pieces: dict[PeerId, list[bytes]] = {}
        for peer, frame in frames:
            if peer == self.mesh.peer_id:
                self.deliver(peer, frame)
            else:
                pieces.setdefault(peer, []).append(encode_frame(frame))
        for peer, encoded in pieces.items():
            self._send_bytes(peer, b"".join(encoded))

    def waiting(self, peer: PeerId) -> int:
        """Bytes that wait for the window of `peer`."""
        link = self._links.get(peer)
        return 0 if link is None else link.nbytes

    def relieve(self) -> None:
        """Let held-back senders go on, unless a receiver is still congested."""
        if not any(receiver.congested for receiver in self._receivers):
            for inbound in list(self._inbound.values()):
                inbound.relieve()

    def deliver(self, peer: PeerId, frame: Frame) -> None:
        """Hand a frame to the receivers."""
        for receiver in self._receivers:
            receiver.on_frame(peer, frame)

    def ready(self, peer: PeerId) -> None:
        """A link has room again; called by itself."""
        for receiver in self._receivers:
            receiver.on_link_ready(peer)

    def lost(self, link: _Link, kind: str, text: str) -> None:
        """A link is over; called by itself."""
        if self._links.get(link.peer) is link:
            del self._links[link.peer]
            for receiver in self._receivers:
                receiver.on_link_lost(link.peer, kind, text)

    @property
    def congested(self) -> bool:
        """Whether arriving bytes should wait."""
        return any(receiver.congested for receiver in self._receivers)

    async def _serve(self, stream: Stream) -> None:
        """A peer's stream to here; a later one of the same peer takes its place."""
        inbound = _Inbound(self, stream)
        before = self._inbound.get(stream.peer)
        self._inbound[stream.peer] = inbound
        if before is not None:
            before.ended.set()
        try:
            stream.deliver_to(inbound.receive, credit=False)
            await inbound.ended.wait()
        finally:
            if self._inbound.get(stream.peer) is inbound:
                del self._inbound[stream.peer]
        if inbound.fault is not None:
            raise inbound.fault
        stream.reset()


class _Link:
    """The stream to one peer, from its first frame to its loss."""

    def __init__(self, links: Links, peer: PeerId) -> None:
        self.peer = peer
        self.nbytes = 0
        self._links = links
        self._stream: Stream | None = None
        self._queue: deque[bytes] = deque()
        self._wake = trio.Event()
        self._over = False

    def send(self, data: bytes) -> None:
        """Send now if there is room and nothing waits, else queue."""
        if self._over:
            return
        if self._stream is not None and not self._queue:
            try:
                if self._stream.try_send(data):
                    return
            except _BROKEN as error:
                self._end("link", str(error))
                return
        self._queue.append(data)
        self.nbytes += len(data)
        self._wake.set()

    async def run(self) -> None:
        """Open the stream and send what had to wait, until the stream breaks."""
        try:
            self._stream = await self._open()
        except (*_BROKEN, DialError, Refused, trio.TooSlowError) as error:
            self._end("unreachable", f"no stream to {self.peer}: {error}")
            return
        try:
            self._stream.deliver_to(self._on_returned)
            while not self._over:
                while self._queue:
                    data = self._queue[0]
                    await self._stream.send(data)
                    if self._over:
                        break
                    self._queue.popleft()
                    self.nbytes -= len(data)
                self._links.ready(self.peer)
                self._wake = trio.Event()
                await self._wake.wait()
        except _BROKEN as error:
            self._end("link", str(error))
        finally:
            self._over = True
            self._stream.reset()

    async def _open(self) -> Stream:
        mesh = self._links.mesh
        with trio.fail_after(CONNECT_S):
            if self.peer not in mesh.peers:
                addrs = self._links.addrs.get(self.peer, ())
                if not addrs:
                    raise ConnectionLost(f"{self.peer} is not connected and no address of it is known")
                await mesh.connect(addrs)
            return await mesh.open_stream(self.peer, STAGE_PROTOCOL)

    def _on_returned(self, data: memoryview | None, error: Exception | None) -> None:
        """Nothing comes back on a link but its end."""
        if data is None:
            self._end("link", "closed by the peer" if error is None else str(error))

    def _end(self, kind: str, text: str) -> None:
        if not self._over:
            self._over = True
            self._queue.clear()
            self.nbytes = 0
            self._wake.set()
            self._links.lost(self, kind, text)


class _Inbound:
    """One arriving stream."""

    def __init__(self, links: Links, stream: Stream) -> None:
        self.ended = trio.Event()
        self.fault: Exception | None = None
        self._stream = stream
        self._links = links
        self._reader = FrameReader()
        self._deliver = partial(links.deliver, stream.peer)
        self._held = 0

    def receive(self, data: memoryview | None, error: Exception | None) -> None:
        """Bytes, the end, or the loss."""
        if data is None or self.ended.is_set():
            self.ended.set()
            return
        self._held += len(data)
        try:
            for frame in self._reader.feed(data):
                self._deliver(frame)
        except RemoteProtocolError as fault:
            self.fault = fault
            self.ended.set()
            return
        if not self._links.congested:
            self.relieve()

    def relieve(self) -> None:
        """Open the sender's window for what was taken in."""
        held, self._held = self._held, 0
        if held:
            self._stream.credit(held)
