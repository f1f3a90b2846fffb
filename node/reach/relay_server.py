"""Relaying for others: the relay's side of circuit relay v2 (libp2p specs/relay/circuit-v2).

A peer that cannot be called keeps a connection to this node and a reservation here; who wants to reach it
asks this node to connect them. `mycel.protocol.relay_book` decides who may, `mycel.node.reach.splice`
copies. A reservation ends with the connection to its peer. Strangers may ask too, for a smaller share.

A request that is not granted is answered with its status; one that cannot be read with MALFORMED_MESSAGE, and
its stream is reset. Every step has a deadline.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence

import trio
from multiaddr import Multiaddr

from mycel.node.host import Host
from mycel.node.reach.splice import Splice, Splicer
from mycel.node.stream import HostStream
from mycel.protocol import relay
from mycel.protocol.delimited import receive_prefixed
from mycel.protocol.errors import MycelError, RemoteProtocolError
from mycel.protocol.keys import key_of
from mycel.protocol.limits_reach import DEFAULT_RELAY_LIMITS, RelayLimits
from mycel.protocol.mesh import Access, PathKind, PeerDown, PeerId, Stream
from mycel.protocol.relay import HOP, MESSAGE_BYTES_MAX, STOP, Kind, Limit, Message, Reservation, Status
from mycel.protocol.relay_book import Book, Booked

_log = logging.getLogger(__name__)

PENDING_SHARE = 8
"""One peer may have one part in so many of the requests under way."""


class RelayServer:
    """The relay of one host: `run` in a nursery, and `serve(True)` where others can call this node."""

    def __init__(self, host: Host, limits: RelayLimits = DEFAULT_RELAY_LIMITS) -> None:
        self._host = host
        self._limits = limits
        self._book: Book | None = None
        self._splicer = Splicer(limits.window, limits.window_pool)
        self._nursery: trio.Nursery | None = None
        self._pending: Counter[PeerId] = Counter()
        self._settled = trio.lowlevel.ParkingLot()
        self._splices: dict[Booked, Splice] = {}
        self.counters: Counter[str] = Counter()
        """Circuits made and requests refused, by status name."""

    @property
    def reservations(self) -> int:
        """Peers that can be reached through this node."""
        return self._book.places if self._book is not None else 0

    @property
    def circuits(self) -> int:
        """Circuits now."""
        return self._book.circuits if self._book is not None else 0

    @property
    def forwarded(self) -> int:
        """Bytes copied so far."""
        return self._splicer.forwarded

    @property
    def is_serving(self) -> bool:
        """Whether requests are taken; others see it in identify."""
        return HOP in self._host.services

    def serve(self, wanted: bool) -> None:
        """Take requests from now on, or no more. Circuits that stand go on."""
        if wanted and not self.is_serving:
            self._host.take_streams(HOP, self._take, access=Access.STRANGER)
        elif not wanted:
            self._host.stop_serving(HOP)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Relay until cancelled; then every circuit and reservation ends."""
        self._book = Book(self._limits, trio.current_time())
        try:
            async with self._host.events() as events, trio.open_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(self._splicer.run)
                task_status.started()
                async for event in events:
                    if isinstance(event, PeerDown) and self._book.release(event.peer):
                        _log.debug("%s is gone, and its reservation", event.peer)
                    self._settled.unpark_all()
        finally:
            self.serve(False)
            self._nursery = None
            for splice in list(self._splices.values()):
                splice.cut("the relay shut down")
            self._book = None

    # Requests

    def _take(self, stream: Stream) -> None:
        """A HOP stream arrived; called in the connection's reader."""
        assert isinstance(stream, HostStream)
        most = self._limits.pending
        busy = self._pending.total() >= most or self._pending[stream.peer] >= max(1, most // PENDING_SHARE)
        if self._nursery is None or busy:
            self.counters["BUSY"] += 1
            stream.reset()
            return
        self._pending[stream.peer] += 1
        self._nursery.start_soon(self._answer, stream)

    async def _answer(self, stream: HostStream) -> None:
        try:
            with trio.fail_after(2 * self._limits.request_s):
                await self._serve(stream)
        except trio.TooSlowError:
            self.counters["TOO_SLOW"] += 1
            stream.reset()
        except MycelError as error:
            _log.debug("%s asked for a relay and was lost: %s", stream.peer, error)
            stream.reset()
        finally:
            self._pending[stream.peer] -= 1
            if not self._pending[stream.peer]:
                del self._pending[stream.peer]

    async def _serve(self, stream: HostStream) -> None:
        while stream.peer not in self._host.peers:
            await self._settled.park()  # until it is known what the peer is
        try:
            request = relay.read_hop(await receive_prefixed(stream, MESSAGE_BYTES_MAX))
        except RemoteProtocolError as error:
            _log.debug("%s: %s", stream.peer, error)
            await self._refuse(stream, Status.MALFORMED_MESSAGE)
            return
        if request.kind is Kind.STATUS:
            await self._refuse(stream, Status.UNEXPECTED_MESSAGE)
        elif stream.is_relayed:
            await self._refuse(stream, Status.PERMISSION_DENIED)
        elif request.kind is Kind.RESERVE:
            await self._reserve(stream)
        else:
            assert request.peer is not None
            await self._connect(stream, request.peer)

    async def _refuse(self, stream: HostStream, status: Status) -> None:
        self.counters[status.name] += 1
        await stream.send(relay.write_hop(Message(Kind.STATUS, status=status)), end=True)
        await stream.aclose()

    async def _reserve(self, stream: HostStream) -> None:
        assert self._book is not None
        now = trio.current_time()
        access = self._host.peers[stream.peer].access
        place = self._book.reserve(stream.peer, access, now)
        if isinstance(place, Status):
            await self._refuse(stream, place)
            return
        own = key_of(self._host.peer_id)
        assert own is not None
        expire = int(self._host.wall() + place.until - now)
        reservation = Reservation(
            expire, tuple(self._addrs()), relay.seal_voucher(own, self._host.sign, stream.peer, expire)
        )
        granted = Message(Kind.STATUS, None, Status.OK, reservation, self._book.limit(access))
        await stream.send(relay.write_hop(granted), end=True)
        await stream.aclose()

    async def _connect(self, stream: HostStream, target: PeerId) -> None:
        assert self._book is not None
        if target in (stream.peer, self._host.peer_id):
            await self._refuse(stream, Status.PERMISSION_DENIED)
            return
        access = self._host.peers[stream.peer].access
        booked = self._book.connect(stream.peer, access, target, trio.current_time())
        if isinstance(booked, Status):
            await self._refuse(stream, booked)
            return
        try:
            onward = await self._ask(stream.peer, target, booked.limit)
            if onward is None:
                await self._refuse(stream, Status.CONNECTION_FAILED)
                return
            try:
                granted = Message(Kind.STATUS, status=Status.OK, limit=booked.limit)
                await stream.send(relay.write_hop(granted))
            except BaseException:  # why: whatever ends the request ends its other half; raised again
                onward.reset()
                raise
            self._join(stream, onward, booked)
        finally:
            if booked not in self._splices and self._book is not None:
                self._book.end(booked)

    async def _ask(self, source: PeerId, target: PeerId, limit: Limit) -> HostStream | None:
        """A stream to `target`, which takes the circuit; None where it does not."""
        info = self._host.peers.get(target)
        if info is None or info.path is not PathKind.DIRECT:
            return None
        stream = None
        try:
            with trio.fail_after(self._limits.request_s):
                stream = await self._host.open_stream(target, STOP)
                await stream.send(relay.write_stop(Message(Kind.CONNECT, source, limit=limit)))
                answer = relay.read_stop(await receive_prefixed(stream, MESSAGE_BYTES_MAX))
            if answer.status == Status.OK:
                kept, stream = stream, None
                return kept
            _log.debug("%s does not take a circuit: %s", target, relay.meaning(answer.status))
        except (MycelError, trio.TooSlowError) as error:
            _log.debug("%s does not take a circuit: %s", target, error)
        finally:
            if stream is not None:
                stream.reset()
        return None

    def _join(self, stream: HostStream, onward: HostStream, booked: Booked) -> None:
        splice = self._splicer.join(stream, onward, booked.limit, booked.buckets)
        self.counters["OK"] += 1
        self._splices[booked] = splice

        def over(reason: str) -> None:
            _log.debug("circuit %s - %s is over: %s", booked.source, booked.target, reason)
            self._splices.pop(booked, None)
            if self._book is not None:
                self._book.end(booked)

        splice.when_over(over)

    def _addrs(self) -> Sequence[Multiaddr]:
        """This node's own direct addresses, as a reservation tells them."""
        return [addr for addr in self._host.listen_addrs if "/p2p-circuit" not in str(addr)][
            : relay.ADDRS_MAX
        ]
