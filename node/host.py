"""The mesh over a network: this node's peers, streams and services.

`Host.run` is one nursery: an acceptor per listening address, a ticker that looks after every connection, and
a task per `Link`. All decisions are made elsewhere and without waiting: which of two links stays in
`peering`, who may open what in `gate`, who is dead in `keepalive`, every byte of the wire in
`mycel.protocol.connection`.

A peer is *up* once its membership is settled. With a `Membership` the dialer proves and the listener answers
over a stream; a peer that does not speak that protocol is a stranger and stays, one that is refused is
disconnected with the reason on both sides.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager

import trio
from multiaddr import Multiaddr

from mycel.node import introduce
from mycel.node.addresses import dialable
from mycel.node.admission import Admission
from mycel.node.connect import CircuitDial, Connector
from mycel.node.counters import Counters
from mycel.node.gate import Gate, Service
from mycel.node.keepalive import LATE_S, TICK_S
from mycel.node.link import RECEIVE_BYTES, Link
from mycel.node.news import News
from mycel.node.roster import Roster
from mycel.node.settle import Membership, Settling
from mycel.node.stream import HostStream
from mycel.protocol import noise, yamux
from mycel.protocol.connection import Setup
from mycel.protocol.errors import (
    ConnectionLost,
    LocalProtocolError,
    MycelError,
    PipeBroken,
    Refused,
    StreamReset,
)
from mycel.protocol.keys import OwnKey, key_of
from mycel.protocol.limits import DEFAULT_LIMITS, Limits
from mycel.protocol.mesh import Access, PeerEvent, PeerId, PeerInfo, StreamHandler, StreamTaker
from mycel.protocol.network import Listener, Network, Pipe

_log = logging.getLogger(__name__)


class Host:
    """See `mycel.protocol.mesh.Mesh`. Call `run` in a nursery; the rest works while it runs."""

    def __init__(
        self,
        network: Network,
        key: OwnKey,
        *,
        listen: Sequence[Multiaddr | str] = (),
        membership: Membership | None = None,
        limits: Limits = DEFAULT_LIMITS,
        default_access: Access = Access.STRANGER,
    ) -> None:
        """`default_access` is every peer's role where there is no `membership` (tests, benchmarks)."""
        self._network = network
        self._key = key
        self._listen = [Multiaddr(addr) if isinstance(addr, str) else addr for addr in listen]
        self._listeners: list[Listener] = []
        self._admission = Admission(limits)
        self._news = News(limits.events)
        self._roster = Roster(key.peer_id, self._news)
        self._nursery: trio.Nursery | None = None
        self._links: list[Link] = []
        self._announced: list[Multiaddr] = []
        self.limits = limits
        self.counters = Counters()
        self.receive_buffer = memoryview(bytearray(RECEIVE_BYTES))
        self.setup = Setup(noise.Static(key, network.entropy(32), muxers=(yamux.PROTOCOL,)), limits, [])
        self.services: dict[str, Service] = {}
        self._settling = Settling(self, key, self._roster, membership, default_access)
        self._connector = Connector(self, network, self._roster)

    def __repr__(self) -> str:
        return f"<Host {self.peer_id}>"

    # Facts

    @property
    def peer_id(self) -> PeerId:
        """See `Mesh.peer_id`."""
        return self._key.peer_id

    @property
    def peers(self) -> Mapping[PeerId, PeerInfo]:
        """See `Mesh.peers`."""
        return self._roster.peers

    @property
    def listen_addrs(self) -> Sequence[Multiaddr]:
        """See `Mesh.listen_addrs`.

        A wildcard address stands for every address of this machine that others can dial; loopback is among
        them only where there is no other.
        """
        return [Multiaddr(f"{addr}/p2p/{self.peer_id}") for addr in self.told_addrs]

    @property
    def told_addrs(self) -> Sequence[Multiaddr]:
        """`listen_addrs` without the peer id: what was announced, else the listening addresses."""
        return self._announced or self.bound_addrs

    @property
    def bound_addrs(self) -> Sequence[Multiaddr]:
        """Where this node listens, without the peer id."""
        return dialable([listener.addr for listener in self._listeners], self._network.local_ips())

    @property
    def observed_addrs(self) -> Mapping[PeerId, Multiaddr]:
        """Where each connected peer says it sees this node."""
        return self._settling.observed

    @property
    def protocols(self) -> Sequence[str]:
        """The protocols that this node serves."""
        return tuple(self.services)

    @property
    def connections(self) -> int:
        """Connections now, those in handshake included."""
        return self._admission.connections

    @property
    def streams(self) -> int:
        """Streams now, over all connections."""
        return sum(link.channels for link in self._links)

    def streams_with(self, peer: PeerId) -> int:
        """Streams now between this node and `peer`."""
        peering = self._roster.get(peer)
        return sum(link.channels for link in peering.links) if peering is not None else 0

    # Running

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Listen and serve until cancelled; started once every address is bound.

        Raises `AddressError` where an address cannot be bound. Leaving closes listeners and connections.
        """
        if self._nursery is not None:
            raise LocalProtocolError("this host runs already")
        try:
            for addr in self._listen:
                self._listeners.append(await self._network.listen(addr))
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                for listener in self._listeners:
                    nursery.start_soon(self._accept, listener)
                nursery.start_soon(self._tick)
                task_status.started()
                await trio.sleep_forever()
        finally:
            self._nursery = None
            for listener in self._listeners:
                listener.close()
            self._listeners.clear()
            for link in list(self._links):
                self.on_shutdown(link)

    async def _accept(self, listener: Listener) -> None:
        while True:
            try:
                pipe = await listener.accept()
            except PipeBroken:
                return
            refusal = self._admission.refusal(pipe.remote)
            if refusal is not None:
                self.counters.refused[refusal] += 1
                pipe.reset()
                continue
            self.counters.accepted += 1
            self.begin(pipe, expected=None, dialer=False)

    async def _tick(self) -> None:
        """Look after every connection; a tick that comes late says that this process stood still."""
        due = trio.current_time() + TICK_S
        while True:
            await trio.sleep_until(due)
            now = trio.current_time()
            late = now - due if now - due > LATE_S else 0.0
            for link in list(self._links):
                link.on_tick(now, late)
            self._settling.on_tick()
            due = now + TICK_S

    def begin(self, pipe: Pipe, *, expected: PeerId | None, dialer: bool) -> Link:
        """A link over `pipe`, at work. Raises `LocalProtocolError` where this host does not run."""
        if self._nursery is None:
            pipe.reset()
            raise LocalProtocolError("this host does not run; start Host.run in a nursery first")
        link = Link(self, pipe, expected=expected, dialer=dialer, ephemeral=self._network.entropy(32))
        self._links.append(link)
        self._admission.enter(link.remote, inbound=not dialer)
        self._nursery.start_soon(self._run_link, link)
        return link

    async def _run_link(self, link: Link) -> None:
        try:
            await link.run()
        except Exception as error:  # boundary: a bug met on one connection must not end the others
            _log.exception("%r ended by a bug on this side", link)
            self.counters.handler_errors["connection"] += 1
            link.end("closed", f"internal error: {type(error).__name__}")

    # What links report

    def on_open(self, link: Link) -> Gate:
        """See `link.Owner`."""
        if link.peer == self.peer_id:
            raise Refused("that address leads back to this node", reason="self")
        self.counters.opened += 1
        self._admission.proven(inbound=not link.dialer)
        peering = self._roster.add(link)
        link.start_soon(self._settling.run, link, peering)
        return peering.gate

    def on_lost(self, link: Link) -> None:
        """See `link.Owner`."""
        assert link.lost is not None
        self._links.remove(link)
        self._admission.leave(link.remote, inbound=not link.dialer, was_proven=link.proven)
        self.counters.lost[link.lost.reason] += 1
        _log.info("%s", link.lost)
        self._roster.remove(link, link.lost)

    def on_shutdown(self, link: Link) -> None:
        """See `link.Owner`. Relayed links go first: their goodbyes travel over the others."""
        if link.lost is None:
            for one in [*(other for other in self._links if other.is_relayed), link]:
                one.end("left", "the node shut down")

    def on_drain(self, link: Link) -> None:
        """See `link.Owner`."""
        self._roster.refresh(link)

    def on_stream_refused(self, cause: str) -> None:
        """See `link.Owner`."""
        self.counters.refused[cause] += 1

    def on_handler_error(self, protocol: str, error: Exception) -> None:
        """See `link.Owner`."""
        self.counters.handler_errors[protocol] += 1
        _log.error("handler of %s failed", protocol, exc_info=error)

    def learned_window(self, peer: PeerId) -> int:
        """See `link.Owner`."""
        return self._roster.window(peer)

    async def handle(self, stream: HostStream, handler: StreamHandler) -> None:
        """See `link.Owner`."""
        self.counters.streams_inbound += 1
        try:
            await handler(stream)
        except (StreamReset, ConnectionLost):
            stream.reset()  # the peer went away in the middle: nobody's failure
        except Exception as error:  # boundary: a handler's failure ends its own stream only
            self.on_handler_error(stream.protocol, error)
            stream.reset()
        except BaseException:  # why: a cancelled handler resets its stream too; raised again
            stream.reset()
            raise
        else:
            await stream.aclose()

    # Connecting

    async def connect(self, addrs: Sequence[Multiaddr | str], *, timeout: float | None = None) -> PeerId:
        """See `Mesh.connect`."""
        return await self._connector.connect(addrs, timeout)

    async def adopt(self, pipe: Pipe, *, expected: PeerId | None = None, dialer: bool) -> PeerId:
        """Be connected over a pipe that came about elsewhere: through a relay, or by a hole punch.

        `dialer` says which side speaks first, `expected` who must be there. Returns once the peer is up; the
        link then competes with others to the same peer as any (`mycel.node.peering`). Raises `DialError`,
        `Refused`, `RemoteProtocolError`.
        """
        return await self._connector.settle(
            await self._connector.shake(pipe, expected=expected, dialer=dialer)
        )

    async def links_changed(self) -> None:
        """Park until a link to any peer opened, drained or ended, or a peer settled; maybe until less."""
        await self._roster.changed.park()

    def carry_circuits(self, dial: CircuitDial) -> None:
        """From now on relayed addresses are dialled by `dial`."""
        self._connector.dial_circuit = dial

    def announce(self, addrs: Sequence[Multiaddr]) -> None:
        """From now on `addrs` (without this node's id) are told to others, in this order.

        Who knows better than the listening sockets (`mycel.node.reach`) says so here; peers are told at the
        next tick. `announce([])` goes back to the listening addresses.
        """
        if list(addrs) != self._announced:
            self._announced = list(addrs)
            self._settling.stale = True

    # Streams

    async def open_stream(self, peer: PeerId, protocol: str) -> HostStream:
        """See `Mesh.open_stream`."""
        while (link := self._roster.primary(peer)).draining or not await link.has_slot():
            # That link is given up for another one, which may still be in its handshake here.
            with trio.move_on_after(self.limits.handshake_s) as patience:
                await self._roster.changed.park()
            if patience.cancelled_caught:
                raise ConnectionLost(f"{peer} is closing its connection", reason="closed")
        stream = await link.open_stream(protocol)
        self.counters.streams_outbound += 1
        return stream

    def try_open_stream(self, peer: PeerId, protocol: str) -> HostStream | None:
        """See `Mesh.try_open_stream`."""
        stream = self._roster.primary(peer).try_open_stream(protocol)
        self.counters.streams_outbound += stream is not None
        return stream

    def serve_stream(self, protocol: str, handler: StreamHandler, *, access: Access = Access.MEMBER) -> None:
        """See `Mesh.serve_stream`. Raises `LocalProtocolError` where `protocol` is served already."""
        self._serve(protocol, Service(handler, access))

    def take_streams(self, protocol: str, taker: StreamTaker, *, access: Access = Access.MEMBER) -> None:
        """See `Mesh.take_streams`. Raises `LocalProtocolError` where `protocol` is served already."""
        self._serve(protocol, Service(None, access, taker))

    def stop_serving(self, protocol: str) -> None:
        """See `Mesh.stop_serving`."""
        if self.services.pop(protocol, None) is not None and self._nursery is not None:
            self._settling.stale = True

    def _serve(self, protocol: str, service: Service) -> None:
        if protocol in self.services:
            raise LocalProtocolError(f"{protocol} is served already; a protocol has one handler")
        self.services[protocol] = service
        if self._nursery is not None:
            self._settling.stale = True

    def disconnect(self, peer: PeerId, reason: str) -> None:
        """See `Mesh.disconnect`."""
        peering = self._roster.get(peer)
        for link in list(peering.links) if peering is not None else ():
            link.end("closed", reason)

    async def ping(self, peer: PeerId) -> float:
        """Seconds of one libp2p ping to `peer`."""
        stream = await self.open_stream(peer, introduce.PING)
        return await introduce.ping(stream, self._network.entropy(introduce.PING_BYTES))

    # The rest of a Mesh

    def sign(self, data: bytes) -> bytes:
        """See `Mesh.sign`."""
        return self._key.sign(data)

    def verify(self, peer: PeerId, data: bytes, signature: bytes) -> bool:
        """See `Mesh.verify`. False for ids that hold only a hash, unless that peer is connected."""
        peering = self._roster.get(peer)
        try:
            key = peering.primary.key if peering is not None else key_of(peer)
        except (ValueError, MycelError):
            return False
        return key is not None and key.verify(data, signature)

    def rtt(self, peer: PeerId) -> float | None:
        """See `Mesh.rtt`."""
        peering = self._roster.get(peer)
        return peering.primary.rtt if peering is not None else None

    def events(self) -> AbstractAsyncContextManager[AsyncIterator[PeerEvent]]:
        """See `Mesh.events`."""
        return self._news.watch()

    def wall(self) -> float:
        """See `Mesh.wall`."""
        return self._network.wall()

    def entropy(self, count: int) -> bytes:
        """See `Mesh.entropy`."""
        return self._network.entropy(count)
