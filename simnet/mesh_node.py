"""One node's `Mesh` in a simulated mesh: its peers, handlers, watchers and signatures."""

from __future__ import annotations

import hashlib
import hmac
import math
import random
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import base58
import trio
from multiaddr import Multiaddr

from mycel.protocol.address import endpoint_of
from mycel.protocol.errors import ConnectionLost, DialError, LimitExceeded, LocalProtocolError, StreamReset
from mycel.protocol.limits import DEFAULT_LIMITS
from mycel.protocol.mesh import (
    Access,
    PathKind,
    PeerDown,
    PeerEvent,
    PeerId,
    PeerInfo,
    PeerUp,
    Stream,
    StreamHandler,
    StreamTaker,
)
from mycel.simnet.mesh_link import ConnectionEnd, connect_ends
from mycel.simnet.park import Park
from mycel.simnet.stream import MeshStream

if TYPE_CHECKING:
    from mycel.simnet.mesh import MeshWorld

PEER_ID_PREFIX = b"\x00\x24\x08\x01\x12\x20"
"""Identity multihash of an Ed25519 public key message: what makes a peer id begin with 12D3KooW."""

CONNECT_ROUND_TRIPS = 4
"""TCP, Noise, yamux with identify, and the membership exchange."""

RETRANSMIT_S = 0.2
"""How often a dial into a cut tries again."""

PORT = 4001


class PeerNews:
    """What one watcher has not read yet."""

    def __init__(self) -> None:
        self._unread: deque[PeerEvent] = deque()
        self._lagged = False
        self._news = Park("news of peers")

    def put(self, event: PeerEvent) -> None:
        """Add news; a watcher that lags too far behind is told so once it has read what there is."""
        if self._lagged or len(self._unread) >= DEFAULT_LIMITS.events:
            self._lagged = True
        else:
            self._unread.append(event)
        self._news.wake()

    def __aiter__(self) -> PeerNews:
        return self

    async def __anext__(self) -> PeerEvent:
        if self._unread:
            await trio.lowlevel.checkpoint_if_cancelled()
        elif self._lagged:
            raise LimitExceeded(
                f"this watcher fell more than limits.events = {DEFAULT_LIMITS.events} peer events behind"
            )
        else:
            await self._news.wait()
        return self._unread.popleft()


class Dial:
    """One handshake on its way: so many round trips, each of which a cut may hold up or a death end."""

    def __init__(self, source: SimMesh, target: SimMesh) -> None:
        self._source = source
        self._target = target
        self._left = CONNECT_ROUND_TRIPS
        self._over = Park("a handshake")
        self._stands = False
        self._until = math.inf

    async def run(self, until: float) -> bool:
        """Spend the round trips. False when either end died meanwhile, or at `until` (trio time)."""
        self._until = until
        self._step()
        try:
            await self._over.wait()
        finally:
            self._left = 0
        return self._stands

    def _step(self) -> None:
        world = self._source.world
        if world.is_blocked(self._source.peer_id, self._target.peer_id):
            self._next(RETRANSMIT_S, self._step)
        else:
            self._next(2 * world.latency(self._source.peer_id, self._target.peer_id), self._arrived)

    def _next(self, seconds: float, act: Callable[[], None]) -> None:
        at = trio.current_time() + seconds
        in_time = at <= self._until
        self._source.world.timeline.at(min(at, self._until), self._do, act if in_time else self._over.wake)

    def _do(self, act: Callable[[], None]) -> None:
        if self._left:
            act()

    def _arrived(self) -> None:
        self._left -= 1
        alive = self._source.is_alive and self._target.is_alive
        if alive and self._left:
            self._step()
        else:
            self._stands = alive
            self._over.wake()


class SimMesh:
    """One node's `Mesh`."""

    def __init__(self, world: MeshWorld, index: int, name: str, access: Access, swarm: str) -> None:
        seed = f"{world.options.seed} {index} {name}".encode()
        self.world = world
        self.index = index
        self.name = name
        self.access = access
        self.swarm = swarm
        self.host = f"10.{index >> 16 & 255}.{index >> 8 & 255}.{index & 255}"
        self._secret = hashlib.sha256(b"secret " + seed).digest()
        self._peer_id = PeerId(
            base58.b58encode(PEER_ID_PREFIX + hashlib.sha256(self._secret).digest()).decode()
        )
        self._random = random.Random(seed)
        self._listen = (Multiaddr(f"/ip4/{self.host}/tcp/{PORT}/p2p/{self._peer_id}"),)
        self._ends: dict[PeerId, ConnectionEnd] = {}
        self._peers: dict[PeerId, PeerInfo] = {}
        self._handlers: dict[str, tuple[StreamHandler, Access]] = {}
        self._protocols: tuple[str, ...] = ()
        self._takers: dict[str, StreamTaker] = {}
        self._watchers: dict[int, PeerNews] = {}
        self._scopes: dict[int, trio.CancelScope] = {}
        self._dead = False
        self.handler_errors = 0
        self.last_handler_error: Exception | None = None

    def __repr__(self) -> str:
        return f"<SimMesh {self.name} {self._peer_id}>"

    @property
    def peer_id(self) -> PeerId:
        """See `Mesh.peer_id`."""
        return self._peer_id

    @property
    def peers(self) -> Mapping[PeerId, PeerInfo]:
        """See `Mesh.peers`."""
        return self._peers

    @property
    def listen_addrs(self) -> tuple[Multiaddr, ...]:
        """See `Mesh.listen_addrs`."""
        return self._listen

    @property
    def is_alive(self) -> bool:
        """False once killed."""
        return not self._dead

    async def connect(self, addrs: Sequence[Multiaddr | str], *, timeout: float | None = None) -> PeerId:
        """See `Mesh.connect`. Addresses are tried in order: here they differ in nothing but who is there."""
        seconds = self.world.options.dial_s if timeout is None else timeout
        failures: list[str] = []
        until = trio.current_time() + seconds
        for addr in addrs:
            expected = endpoint_of(addr).peer
            if expected in self._peers:
                return expected
            node = self.world.find(addr)
            if node is None or (expected is not None and node.peer_id != expected):
                await trio.sleep(min(2 * self.world.options.latency_s_min, until - trio.current_time()))
                failures.append(f"{addr}: connection refused")
            elif node.peer_id == self._peer_id:
                failures.append(f"{addr}: that is this node itself")
            elif await self._dial(node, until):
                return node.peer_id
            elif trio.current_time() < until:
                failures.append(f"{addr}: connection reset")
            if trio.current_time() >= until:
                break
        if len(failures) < len(addrs):
            failures.append(f"{addrs[len(failures)]}: no answer within {seconds:g} s")
        raise DialError("; ".join(failures) or "no address to dial")

    async def _dial(self, node: SimMesh, until: float) -> bool:
        """Spend the handshake's round trips. False when the other end died meanwhile, or time was up."""
        if not await Dial(self, node).run(until):
            return False
        if node.peer_id not in self._peers:
            connect_ends(self, node)
        return True

    async def open_stream(self, peer: PeerId, protocol: str) -> MeshStream:
        """See `Mesh.open_stream`."""
        end = self._ends.get(peer)
        if end is None:
            raise ConnectionLost(f"not connected to {peer}; connect first", reason="closed")
        await trio.lowlevel.checkpoint()
        return end.open_stream(protocol)

    def try_open_stream(self, peer: PeerId, protocol: str) -> MeshStream | None:
        """See `Mesh.try_open_stream`. There is always room for one more here."""
        end = self._ends.get(peer)
        if end is None:
            raise ConnectionLost(f"not connected to {peer}; connect first", reason="closed")
        return end.open_stream(protocol)

    def serve_stream(self, protocol: str, handler: StreamHandler, *, access: Access = Access.MEMBER) -> None:
        """See `Mesh.serve_stream`. Raises `LocalProtocolError` where `protocol` is served already."""
        if protocol in self._handlers:
            raise LocalProtocolError(f"{protocol} is served already; a protocol has one handler")
        self._handlers[protocol] = (handler, access)
        self._tell_protocols()

    def stop_serving(self, protocol: str) -> None:
        """See `Mesh.stop_serving`."""
        self._takers.pop(protocol, None)
        if self._handlers.pop(protocol, None) is not None:
            self._tell_protocols()

    def _tell_protocols(self) -> None:
        self._protocols = tuple(self._handlers)
        for end in self._ends.values():
            end.tell_protocols(self.protocols)

    def on_protocols(self, peer: PeerId, protocols: tuple[str, ...]) -> None:
        """A connected peer says what it serves from now on."""
        if peer in self._peers:
            self._peers[peer] = replace(self._peers[peer], protocols=protocols)

    def take_streams(self, protocol: str, taker: StreamTaker, *, access: Access = Access.MEMBER) -> None:
        """See `Mesh.take_streams`."""

        async def take(stream: Stream) -> None:
            taker(stream)

        self.serve_stream(protocol, take, access=access)
        self._takers[protocol] = taker

    def handler_of(self, protocol: str) -> tuple[StreamHandler, Access] | None:
        """Who serves `protocol` here, and to whom."""
        return self._handlers.get(protocol)

    def start_handler(self, handler: StreamHandler, stream: MeshStream) -> None:
        """Serve one inbound stream in a task of its own, until the node dies; or let it be taken."""
        if self.world.is_over:
            return
        taker = self._takers.get(stream.protocol)
        if taker is not None:
            try:
                taker(stream)
            except Exception as error:  # boundary: a taker's failure ends its own stream only
                self.count_error(stream.protocol, error)
                stream.reset()
            return
        self.world.nursery.start_soon(self._handle, handler, stream)

    async def _handle(self, handler: StreamHandler, stream: MeshStream) -> None:
        with trio.CancelScope() as scope:
            if not self.is_alive:
                return
            self._scopes[id(scope)] = scope
            try:
                await handler(stream)
            except (StreamReset, ConnectionLost):
                stream.reset()  # the peer went away in the middle: nobody's failure
            except Exception as error:  # boundary: a handler's failure ends its own stream only
                self.count_error(stream.protocol, error)
                stream.reset()
            else:
                await stream.aclose()
            finally:
                del self._scopes[id(scope)]

    def count_error(self, protocol: str, error: Exception) -> None:
        """A handler or receiver of `protocol` raised."""
        self.handler_errors += 1
        self.last_handler_error = error

    def on_up(self, end: ConnectionEnd) -> None:
        """A connection stands and its membership is settled."""
        other = end.other.node
        access = other.access if other.swarm == self.swarm else Access.STRANGER
        self._ends[other.peer_id] = end
        self._peers[other.peer_id] = PeerInfo(
            peer=other.peer_id,
            access=access,
            addr=other.listen_addrs[0],
            path=PathKind.DIRECT,
            agent="mycel-simnet",
            listen_addrs=tuple(other.listen_addrs),
            protocols=other.protocols,
            inbound=end.inbound,
            since=trio.current_time(),
        )
        self._tell(PeerUp(other.peer_id, access))

    def on_down(self, peer: PeerId, reason: str, text: str) -> None:
        """The connection to `peer` is over."""
        del self._ends[peer], self._peers[peer]
        self._tell(PeerDown(peer, reason, text))

    def _tell(self, event: PeerEvent) -> None:
        for watcher in list(self._watchers.values()):
            watcher.put(event)

    @property
    def protocols(self) -> tuple[str, ...]:
        """What this node serves."""
        return tuple(self._handlers)

    def disconnect(self, peer: PeerId, reason: str) -> None:
        """See `Mesh.disconnect`."""
        end = self._ends.get(peer)
        if end is not None:
            end.close(reason)

    def crash(self) -> None:
        """Stop every handler and reset every connection."""
        self._dead = True
        for end in list(self._ends.values()):
            end.crash()
        for scope in list(self._scopes.values()):
            scope.cancel()

    def watch_silence(self) -> None:
        """Something was cut: connections that it severs will be noticed when they stay severed."""
        for end in self._ends.values():
            end.watch_silence()

    def release_held(self) -> None:
        """Something healed: what TCP kept retransmitting arrives now."""
        for end in self._ends.values():
            end.release()

    def sign(self, data: bytes) -> bytes:
        """See `Mesh.sign`: 64 bytes that only this node can make (HMAC-SHA512 with its secret)."""
        return hmac.digest(self._secret, data, "sha512")

    def verify(self, peer: PeerId, data: bytes, signature: bytes) -> bool:
        """See `Mesh.verify`: the world knows every node's secret and checks for us."""
        author = self.world.nodes.get(peer)
        return author is not None and hmac.compare_digest(author.sign(data), signature)

    def rtt(self, peer: PeerId) -> float | None:
        """See `Mesh.rtt`."""
        return 2 * self.world.latency(self._peer_id, peer) if peer in self._peers else None

    @asynccontextmanager
    async def events(self) -> AsyncIterator[AsyncIterator[PeerEvent]]:
        """See `Mesh.events`."""
        news = PeerNews()
        self._watchers[id(news)] = news
        try:
            yield news
        finally:
            del self._watchers[id(news)]

    def wall(self) -> float:
        """See `Mesh.wall`."""
        return self.world.wall()

    def entropy(self, count: int) -> bytes:
        """See `Mesh.entropy`."""
        return self._random.randbytes(count)
