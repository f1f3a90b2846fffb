"""Being relayed: the two other sides of circuit relay v2, who dials through a relay and who is reached so.

Who cannot be called keeps reservations (`mycel.node.reach.reservations` decides where) and takes the circuits
that those relays bring; who wants to reach such a peer dials an address that names relay and peer. Either way
a `StreamPipe` comes out, over which the host speaks Noise and yamux end to end, as over TCP: the circuit's
dialer dials. A relay that lies about who is at the far end is found out by the handshake.

Members that relay are asked first, in an order that differs from node to node; relays from the configuration
(any libp2p relay will do) where the members do not suffice.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence

import trio
from multiaddr import Multiaddr

from mycel.node.host import Host
from mycel.node.reach.circuit import StreamPipe
from mycel.node.reach.reservations import Candidate, Reservations
from mycel.node.stream import HostStream
from mycel.protocol import relay
from mycel.protocol.address import circuit_of, endpoint_of, peer_of
from mycel.protocol.delimited import receive_prefixed
from mycel.protocol.errors import AddressError, DialError, MycelError, RemoteProtocolError
from mycel.protocol.limits_reach import DEFAULT_RELAY_LIMITS, RelayLimits
from mycel.protocol.mesh import Access, PathKind, PeerDown, PeerId, PeerInfo, Stream
from mycel.protocol.network import Pipe
from mycel.protocol.relay import HOP, MESSAGE_BYTES_MAX, STOP, Kind, Message, Reservation, Status

_log = logging.getLogger(__name__)

LOOK_S = 1.0
"""How often relays are looked for while reservations are lacking: what a peer serves is learnt in silence."""

RESERVATION_MIN_S = 30.0
RESERVATION_MAX_S = 86400.0
"""What is made of a reservation's end where the relay's calendar differs from ours."""


class RelayClient:
    """The circuits of one host. Call `run` in a nursery; dialling works from the start."""

    def __init__(
        self,
        host: Host,
        limits: RelayLimits = DEFAULT_RELAY_LIMITS,
        *,
        relays: Sequence[str] = (),
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        """`relays`: addresses of relays outside the swarm; `on_change` hears of every change of `addrs`."""
        self._host = host
        self._limits = limits
        self._configured = [(addr, peer) for addr in relays if (peer := peer_of(addr)) is not None]
        self._on_change = on_change
        self._reservations = Reservations(limits)
        self._nursery: trio.Nursery | None = None
        self._pending = 0
        self._wake = trio.Event()
        self.troubles: dict[PeerId, str] = {}
        """Why relays gave no reservation when last asked."""
        host.carry_circuits(self.dial)
        host.take_streams(STOP, self._take, access=Access.STRANGER)

    @property
    def relays(self) -> Sequence[PeerId]:
        """Where this node holds a reservation now."""
        return self._reservations.relays

    @property
    def addrs(self) -> Sequence[Multiaddr]:
        """The addresses that the reservations give, without this node's id."""
        return self._reservations.addrs

    def want(self, count: int) -> None:
        """Keep reservations at so many relays from now on; 0 gives up those there are."""
        if count == self._reservations.wanted:
            return
        self._reservations.wanted = count
        if not count and self._reservations.relays:
            self._reservations.drop()
            self._on_change()
        self._wake.set()

    # Dialling

    async def dial(self, addr: Multiaddr) -> Pipe:
        """A pipe to the peer behind a relayed address. Raises `AddressError`, `DialError`.

        See `mycel.node.connect.CircuitDial`.
        """
        circuit = circuit_of(addr)
        if circuit.peer is None or self._host.peer_id in (circuit.peer, circuit.relay_peer):
            raise AddressError(f"{addr} leads to nobody else; write RELAY/p2p/RELAYID/p2p-circuit/p2p/PEERID")
        began = trio.current_time()
        try:
            await self._host.connect([circuit.relay])
            info = self._direct(circuit.relay_peer)
            with trio.fail_after(2 * self._limits.request_s):
                stream, answer = await self._ask(circuit.relay_peer, Message(Kind.CONNECT, circuit.peer))
        except trio.TooSlowError:
            took = trio.current_time() - began
            raise DialError(f"relay {circuit.relay_peer} did not answer within {took:.1f} s") from None
        except DialError:
            raise
        except MycelError as error:
            raise DialError(f"relay {circuit.relay_peer}: {error}") from error
        if answer.status != Status.OK:
            stream.reset()
            raise DialError(f"relay {circuit.relay_peer} made no circuit: {relay.meaning(answer.status)}")
        return StreamPipe(stream, local=_behind(info), remote=addr, limit=answer.limit)

    async def _ask(self, peer: PeerId, request: Message) -> tuple[HostStream, Message]:
        """A HOP request and its answer. Raises `MycelError`; cancelled, it gives the stream up."""
        stream = await self._host.open_stream(peer, HOP)
        try:
            await stream.send(relay.write_hop(request))
            answer = relay.read_hop(await receive_prefixed(stream, MESSAGE_BYTES_MAX))
            if answer.kind is not Kind.STATUS:
                raise RemoteProtocolError(f"it answered with {answer.kind.value}")
        except BaseException:  # why: a cancelled request resets its stream too; raised again
            stream.reset()
            raise
        return stream, answer

    def _direct(self, peer: PeerId) -> PeerInfo:
        info = self._host.peers.get(peer)
        if info is None or info.path is not PathKind.DIRECT:
            raise DialError(f"relay {peer} is itself reached through a relay; circuits are not chained")
        return info

    # Being dialled

    def _take(self, stream: Stream) -> None:
        """A STOP stream arrived; called in the connection's reader."""
        assert isinstance(stream, HostStream)
        if self._nursery is None or self._pending >= self._limits.pending:
            stream.reset()
            return
        self._pending += 1
        self._nursery.start_soon(self._answer, stream)

    async def _answer(self, stream: HostStream) -> None:
        try:
            with trio.move_on_after(self._limits.request_s) as scope:
                request = await self._agree(stream)
            info = self._host.peers.get(stream.peer)
            if scope.cancelled_caught or request is None or info is None:  # None: the relay left meanwhile
                stream.reset()
                return
            assert request.peer is not None
            through = Multiaddr(f"{_behind(info)}/p2p/{request.peer}")
            pipe = StreamPipe(stream, local=_behind(info), remote=through, limit=request.limit)
            await self._host.adopt(pipe, expected=request.peer, dialer=False)
        except MycelError as error:
            _log.info("a circuit through %s came to nothing: %s", stream.peer, error)
            stream.reset()
        finally:
            self._pending -= 1

    async def _agree(self, stream: HostStream) -> Message | None:
        """The request on a STOP stream, once it was granted; None where it was not."""
        try:
            request = relay.read_stop(await receive_prefixed(stream, MESSAGE_BYTES_MAX))
        except RemoteProtocolError as error:
            _log.debug("relay %s: %s", stream.peer, error)
            return await _refuse(stream, Status.MALFORMED_MESSAGE)
        if request.kind is not Kind.CONNECT:
            return await _refuse(stream, Status.UNEXPECTED_MESSAGE)
        if not self._reservations.knows(stream.peer) or request.peer == self._host.peer_id:
            return await _refuse(stream, Status.PERMISSION_DENIED)
        if self._host.connections >= self._host.limits.connections or stream.peer not in self._host.peers:
            return await _refuse(stream, Status.RESOURCE_LIMIT_EXCEEDED)
        await stream.send(relay.write_stop(Message(Kind.STATUS, status=Status.OK)))
        return request

    # Reservations

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep reservations and take circuits until cancelled."""
        async with self._host.events() as events, trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._keep, nursery)
            task_status.started()
            try:
                async for event in events:
                    if isinstance(event, PeerDown):
                        self._lose(event.peer)
                    self._wake.set()
            finally:
                self._nursery = None

    async def _keep(self, nursery: trio.Nursery) -> None:
        while True:
            self._wake = trio.Event()
            for peer in self._reservations.relays:
                info = self._host.peers.get(peer)
                if info is None or info.path is not PathKind.DIRECT:
                    self._lose(peer)
            now = trio.current_time()
            before = list(self.addrs)
            candidates = self._candidates()
            for one in self._reservations.plan(candidates, now):
                nursery.start_soon(self._reserve, one.peer)
            if list(self.addrs) != before:
                self._on_change()
            until = self._reservations.next_at(candidates)
            if len(self._reservations.relays) < self._reservations.wanted:
                until = min(until, now + LOOK_S)
            with trio.move_on_at(max(until, now + 0.01)):
                await self._wake.wait()

    def _lose(self, peer: PeerId) -> None:
        if self._reservations.on_lost(peer):
            _log.info("the reservation at relay %s is lost", peer)
            self._on_change()

    def _candidates(self) -> list[Candidate]:
        """Relays that might be asked, best first."""
        members = [
            info
            for info in self._host.peers.values()
            if info.access >= Access.MEMBER and info.path is PathKind.DIRECT and HOP in info.protocols
        ]
        members.sort(key=lambda info: hashlib.sha256(f"{self._host.peer_id}{info.peer}".encode()).digest())
        found = [Candidate(info.peer, _place(info.addr)) for info in members]
        if len(found) < self._reservations.wanted:
            known = [one.peer for one in found]
            found += [
                Candidate(peer, _place(Multiaddr(addr)))
                for addr, peer in self._configured
                if peer not in known
            ]
        return found

    async def _reserve(self, peer: PeerId) -> None:
        before = list(self.addrs)
        try:
            with trio.fail_after(3 * self._limits.request_s):
                addrs = [addr for addr, one in self._configured if one == peer]
                if peer not in self._host.peers and addrs:
                    await self._host.connect(addrs)
                info = self._direct(peer)
                stream, answer = await self._ask(peer, Message(Kind.RESERVE))
            await stream.aclose()
            held, given = self._check(peer, answer, info)
        except (MycelError, trio.TooSlowError) as error:
            self.troubles[peer] = str(error) or "it did not answer in time"
            _log.info("relay %s gave no reservation: %s", peer, self.troubles[peer])
            self._reservations.on_failed(peer, trio.current_time())
        else:
            self.troubles.pop(peer, None)
            seconds = min(max(held.expire - self._host.wall(), RESERVATION_MIN_S), RESERVATION_MAX_S)
            self._reservations.on_granted(peer, given, seconds, trio.current_time())
            if list(self.addrs) != before:
                self._on_change()
        self._wake.set()

    def _check(
        self, peer: PeerId, answer: Message, info: PeerInfo
    ) -> tuple[Reservation, Sequence[Multiaddr]]:
        """The reservation in a relay's answer, and the addresses it gives. Raises `MycelError`."""
        if answer.status != Status.OK:
            raise DialError(relay.meaning(answer.status))
        held = answer.reservation
        if held is None:
            raise RemoteProtocolError("it said OK without a reservation")
        if held.voucher:
            relay.open_voucher(held.voucher, relay=peer, peer=self._host.peer_id)
        reached = [info.addr] if not info.inbound else []
        addrs = [addr for addr in relay.relayed_addrs(peer, reached, held.addrs) if _is_dialable(addr)]
        if not addrs:
            raise RemoteProtocolError("it names no address at which it can be dialled")
        return held, addrs


async def _refuse(stream: HostStream, status: Status) -> Message | None:
    """Answer a STOP request with a refusal, and with nothing the one who asks here."""
    await stream.send(relay.write_stop(Message(Kind.STATUS, status=status)), end=True)
    await stream.aclose()
    return None


def _behind(info: PeerInfo) -> Multiaddr:
    """The relayed address that stands for nobody in particular behind a relay."""
    return Multiaddr(f"{str(info.addr).removesuffix(f'/p2p/{info.peer}')}/p2p/{info.peer}/p2p-circuit")


def _place(addr: Multiaddr) -> str:
    return endpoint_of(addr).host


def _is_dialable(addr: Multiaddr) -> bool:
    try:
        return endpoint_of(circuit_of(addr).relay).host not in ("0.0.0.0", "::")
    except AddressError:
        return False
