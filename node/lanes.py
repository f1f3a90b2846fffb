"""Lanes over sockets of their own: `mycel.protocol.lane.Lanes` for real machines.

Bulk towards a peer goes over `LaneLimits.lanes` sockets, dialled at the first `reach`. They are an
acceleration and nothing more: a lane that dies costs that lane, and what was under way on it goes over the
others; when none is left, over the mesh's streams, as everything does where no direct path to the peer exists
(`mycel.compute.collective.streams`). So a peer is lost exactly when its connection is. Control frames and
small parts take the streams anyhow.

`encryption="none"` is for machines that trust their network; both ends must be set so.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import math
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Literal

import trio

from mycel.compute.collective.streams import StreamLanes
from mycel.node.lane_desk import LaneDesk
from mycel.node.lane_ends import Cap, LaneReceiver, LaneSender, Waiting
from mycel.node.lane_setup import LANES_MAX
from mycel.node.lane_threads import LaneThread
from mycel.node.lane_wire import Opener, Sealer
from mycel.protocol.errors import MycelError
from mycel.protocol.lane import Head, Parcel, Taker
from mycel.protocol.limits import DEFAULT_LANE_LIMITS, LaneLimits
from mycel.protocol.mesh import Mesh, PeerDown, PeerId
from mycel.protocol.rpc import Rpc

if TYPE_CHECKING:
    from trio._core._run import TaskStatus

log = logging.getLogger("mycel.lanes")

Encryption = Literal["aes-128-gcm", "none"]


@dataclass(frozen=True, slots=True)
class LaneOptions:
    """How a node has its lanes."""

    host: str = "0.0.0.0"
    """Where lanes are taken: an IP address of this machine, or all."""
    port: int = 0
    """0 for any free one; others are told over the authenticated connection."""
    encryption: Encryption = "aes-128-gcm"
    """"none" proves who is at the other end when a lane is set up, and protects nothing after that."""
    bytes_per_s: float = 0.0
    """The most that this node sends, over lanes and streams together; 0 for no bound."""
    limits: LaneLimits = DEFAULT_LANE_LIMITS


@dataclass(eq=False, slots=True)
class _Pair:
    """Lanes towards one peer. They come one by one and go one by one."""

    waiting: Waiting = field(default_factory=Waiting)
    senders: list[LaneSender] = field(default_factory=list)
    try_at: float = -math.inf
    """When it may be tried again to set lanes up."""
    setting_up: trio.Lock = field(default_factory=trio.Lock)

    def wake(self) -> None:
        """Something waits to be sent."""
        for sender in self.senders:
            sender.wake()


class SocketLanes:
    """See above. `run` must be running while it is used."""

    def __init__(self, mesh: Mesh, rpc: Rpc, options: LaneOptions = LaneOptions()) -> None:
        self._mesh = mesh
        self._options = options
        self._limits = options.limits
        self._cap = Cap(options.bytes_per_s)
        self._streams = StreamLanes(mesh, options.limits, self._cap.hold_s)
        is_plain = options.encryption == "none"
        self._desk = LaneDesk(
            mesh, rpc, self._limits, is_plain=is_plain, on_out=self._add_sender, on_in=self._add_receiver
        )
        self._taker: Taker | None = None
        self._pairs: dict[PeerId, _Pair] = {}
        self._receivers: dict[PeerId, list[LaneReceiver]] = {}
        self._moved: dict[PeerId, int] = {}
        self._threads: list[LaneThread] = []
        self._token: trio.lowlevel.TrioToken | None = None
        self._nursery: trio.Nursery | None = None

    @property
    def port(self) -> int:
        """Where lanes are taken, 0 before `run`."""
        return self._desk.port

    def lanes_to(self, peer: PeerId) -> int:
        """Sockets that carry bulk to `peer` now."""
        pair = self._pairs.get(peer)
        return len(pair.senders) if pair is not None else 0

    async def run(self, *, task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Take and keep lanes until cancelled. Raises `AddressError` where the port is taken."""
        self._token = trio.lowlevel.current_trio_token()
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                await nursery.start(self._streams.run)
                await nursery.start(self._desk.run, self._options.host, self._options.port)
                await nursery.start(self._watch_peers)
                task_status.started()
        finally:
            self._nursery = None
            for thread in self._threads:
                thread.stop()  # as soon as it has worked in what it holds
            self._threads.clear()

    def attach(self, taker: Taker) -> None:
        """See `Lanes.attach`."""
        self._taker = taker
        self._streams.attach(taker)

    async def reach(self, peer: PeerId) -> None:
        """See `Lanes.reach`. Where no socket can be had, bulk takes the streams."""
        await self._streams.reach(peer)
        pair = self._pairs.setdefault(peer, _Pair())
        if pair.senders:
            return
        async with pair.setting_up:
            host = self._desk.host_of(peer)
            if pair.senders or host is None or trio.current_time() < pair.try_at:
                return
            pair.try_at = trio.current_time() + self._limits.retry_s
            try:
                with trio.fail_after(self._limits.setup_s):
                    is_here = ipaddress.ip_address(host).is_loopback
                    count = self._limits.lanes_here if is_here else self._limits.lanes
                    await self._desk.ask(peer, host, count)
            except (MycelError, OSError, trio.TooSlowError) as error:
                log.info(
                    "bulk to %s takes the connection's streams: no lanes (%s)", peer, error or "too slow"
                )

    def send(self, parcel: Parcel) -> None:
        """See `Lanes.send`."""
        pair = self._pairs.get(parcel.peer)
        is_bulk = parcel.head.length > self._limits.small_bytes
        if is_bulk and pair is not None and pair.senders and pair.waiting.put([parcel]):
            pair.wake()
        else:
            self._in_trio(partial(self._streams.send, parcel))

    def tell(self, peer: PeerId, head: Head, body: bytes) -> None:
        """See `Lanes.tell`."""
        self._streams.tell(peer, head, body)

    def moved(self, peer: PeerId) -> int:
        """See `Lanes.moved`."""
        on_lanes = sum(receiver.moved for receiver in self._receivers.get(peer, ()))
        return on_lanes + self._moved.get(peer, 0) + self._streams.moved(peer)

    def rate(self, peer: PeerId) -> float | None:
        """See `Lanes.rate`."""
        pair = self._pairs.get(peer)
        if pair is None or not pair.waiting.busy_s:
            return self._streams.rate(peer)
        return pair.waiting.sent_bytes / pair.waiting.busy_s * max(1, len(pair.senders))

    # Lanes come and go

    def _add_sender(self, peer: PeerId, sock: socket.socket, key: bytes | None) -> None:
        pair = self._pairs.get(peer)
        if pair is None or self._nursery is None:
            sock.close()
            return
        thread = self._thread(len(pair.senders))
        on_end = partial(self._in_trio_ended, self._sender_ended, peer, pair)
        sender = LaneSender(sock, Sealer(key), pair.waiting, self._cap, thread, on_end)
        pair.senders.append(sender)
        thread.add(sender)

    def _thread(self, lane: int) -> LaneThread:
        """What drives so many-th lane with a peer, in both directions."""
        if len(self._threads) < self._limits.lanes and len(self._threads) <= lane:
            self._threads.append(LaneThread())
        return self._threads[lane % len(self._threads)]

    def _sender_ended(self, peer: PeerId, pair: _Pair, sender: LaneSender) -> None:
        if sender not in pair.senders:
            return
        pair.senders.remove(sender)
        again = sender.undelivered()
        if pair.senders and pair.waiting.put(again):
            pair.wake()
            log.info("a lane to %s is gone; %d are left", peer, len(pair.senders))
            return
        for parcel in [*again, *pair.waiting.close()]:
            self._streams.send(parcel)
        if self._pairs.get(peer) is pair:
            self._pairs[peer] = _Pair(try_at=pair.try_at)

    def _add_receiver(self, peer: PeerId, sock: socket.socket, key: bytes | None) -> None:
        lanes = self._receivers.setdefault(peer, [])
        if self._taker is None or self._nursery is None or len(lanes) >= LANES_MAX:
            sock.close()
            return
        on_end = partial(self._in_trio_ended, self._receiver_ended, peer)
        receiver = LaneReceiver(sock, Opener(key), peer, self._taker, on_end)
        thread = self._thread(len(lanes))
        lanes.append(receiver)
        thread.add(receiver)

    def _receiver_ended(self, peer: PeerId, receiver: LaneReceiver) -> None:
        lanes = self._receivers.get(peer, [])
        if receiver in lanes:
            lanes.remove(receiver)
            self._moved[peer] = self._moved.get(peer, 0) + receiver.moved

    def _in_trio_ended(self, ended: Callable[..., None], *what: object) -> None:
        self._in_trio(partial(ended, *what))

    def _in_trio(self, action: Callable[[], None]) -> None:
        """Soon in trio's thread; never where trio is gone."""
        if self._token is not None:
            with contextlib.suppress(trio.RunFinishedError):
                self._token.run_sync_soon(action)

    async def _watch_peers(self, *, task_status: TaskStatus[None]) -> None:
        async with self._mesh.events() as events:
            task_status.started()
            async for event in events:
                if isinstance(event, PeerDown):
                    self._close(event.peer)

    def _close(self, peer: PeerId) -> None:
        """End all lanes with a peer: keys are no longer than the connection they came over."""
        pair = self._pairs.pop(peer, None)
        if pair is not None:
            pair.waiting.close()
            for sender in pair.senders:
                sender.end()
        for receiver in self._receivers.pop(peer, []):
            receiver.end()
