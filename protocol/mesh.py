"""The seam above: what services (rpc, dht, compute) know of the mesh.

The real one is `mycel.node.host.Host` over any `Network`; `mycel.simnet` has a lighter twin that carries
streams between thousands of nodes without ciphers. Services take a `Mesh` and trio, nothing else.
"""

from __future__ import annotations

import enum
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import NewType, Protocol

from multiaddr import Multiaddr

PeerId = NewType("PeerId", str)
"""A libp2p peer id in its base58 text form (12D3KooW... for Ed25519 keys)."""

Buffer = bytes | bytearray | memoryview


class Access(enum.IntEnum):
    """Who may use a protocol or call a method: each role includes those below it.

    STRANGER is any libp2p peer; the others hold a membership chain of this swarm with that role.
    """

    STRANGER = 0
    SUBMIT = 1
    MEMBER = 2
    ADMIN = 3


class PathKind(enum.Enum):
    """How bytes reach a peer."""

    DIRECT = "direct"
    RELAYED = "relayed"


@dataclass(frozen=True, slots=True)
class PeerInfo:
    """What this node knows of a connected peer."""

    peer: PeerId
    access: Access
    addr: Multiaddr  # the other end of the connection in use
    path: PathKind
    agent: str  # identify's agentVersion, "" before identify came
    listen_addrs: tuple[Multiaddr, ...]  # what it says it listens on
    protocols: tuple[str, ...]
    inbound: bool
    since: float  # trio time of the connection


@dataclass(frozen=True, slots=True)
class PeerUp:
    """A peer became usable: connected, and its membership settled (its role is `access`)."""

    peer: PeerId
    access: Access


@dataclass(frozen=True, slots=True)
class PeerDown:
    """A peer's last connection ended. `reason` as in `ConnectionLost`."""

    peer: PeerId
    reason: str
    text: str


PeerEvent = PeerUp | PeerDown


class Stream(Protocol):
    """A two-way, flow-controlled stream of bytes to one peer, multiplexed over its connection.

    One task sends and one receives at a time (two at once is a bug and raises `trio.BusyResourceError`).
    A cancelled `send` never hurts the connection nor any other stream; this stream may then hold a prefix
    of the data, so reset it.
    """

    @property
    def peer(self) -> PeerId: ...

    @property
    def protocol(self) -> str: ...

    def try_send(self, data: Buffer, *, end: bool = False) -> bool:
        """Send all of `data` now if the peer's window has room for it; False (nothing sent) if not.

        `end` sends the end of stream with it, in the same frame. Raises as `send` does.
        """

    async def send(self, data: Buffer, *, end: bool = False) -> None:
        """Send all of `data`, waiting for the peer's window where needed. No task hop when there is room.

        `end` sends the end of stream with it, in the same frame: what a request or an answer that stands
        alone should do, for it saves a packet. Raises `StreamReset`, `ConnectionLost`, or `StreamClosed`
        after `send_eof`.
        """

    async def receive_some(self, max_bytes: int = 1 << 20) -> bytes:
        """The next bytes that arrived (at most `max_bytes`), b"" at the peer's end of stream.

        Raises `StreamReset`, `ConnectionLost`.
        """

    async def receive_exactly(self, count: int) -> bytes:
        """Exactly `count` bytes. Raises `RemoteProtocolError` when the stream ends before them."""

    def deliver_to(
        self, receiver: Callable[[memoryview | None, Exception | None], None], *, credit: bool = True
    ) -> None:
        """From now on call `receiver` in the connection's reader with each piece as it arrives.

        The view is valid during the call only. `receiver(None, None)` is the end of stream,
        `receiver(None, error)` its loss, also when the peer resets it or the connection goes after that end
        and before this side's. It must not block. The window is credited when it returns, or, with
        `credit=False`, by `credit` once the bytes are used up: backpressure without a task that reads. What
        had arrived before is delivered from within this call. This is how small messages are answered
        without a task hop.
        """

    def credit(self, count: int) -> None:
        """Let the peer send `count` bytes more; only after `deliver_to(..., credit=False)`.

        Never blocks, never raises, does nothing on a stream that is gone.
        """

    async def send_eof(self) -> None:
        """Say that no more will be sent; the other direction stays open."""

    def reset(self) -> None:
        """End both directions at once; the peer sees `StreamReset`. Never blocks, never raises."""

    async def aclose(self) -> None:
        """End in order what was sent and forget the rest. Never raises for a stream already gone."""


StreamHandler = Callable[[Stream], Awaitable[None]]
StreamTaker = Callable[[Stream], None]


class Mesh(Protocol):
    """Peers, streams, signatures and news of who comes and goes. Calls are `mycel.protocol.rpc` over it."""

    @property
    def peer_id(self) -> PeerId:
        """This node's id."""

    @property
    def peers(self) -> Mapping[PeerId, PeerInfo]:
        """Connected peers whose membership is settled, strangers included. Do not change it."""

    @property
    def listen_addrs(self) -> Sequence[Multiaddr]:
        """Addresses that others can dial this node on, each ending in /p2p/ID."""

    async def connect(self, addrs: Sequence[Multiaddr | str], *, timeout: float | None = None) -> PeerId:
        """Connect to the peer behind `addrs` (tried in parallel, staggered) or return at once if connected.

        Raises `DialError` naming each address and its failure, `Refused` when either side refuses the
        other's membership.
        """

    async def open_stream(self, peer: PeerId, protocol: str) -> Stream:
        """A fresh stream speaking `protocol`. Costs no round trip: negotiation rides with the first data.

        Raises `ConnectionLost` when the peer is not connected; a peer that does not speak `protocol` or
        does not grant it shows as `StreamReset` or `Refused` on the first receive.
        """

    def try_open_stream(self, peer: PeerId, protocol: str) -> Stream | None:
        """As `open_stream`, now or not at all: None where it would have to wait. Raises `ConnectionLost`."""

    def serve_stream(self, protocol: str, handler: StreamHandler, *, access: Access = Access.MEMBER) -> None:
        """Let `handler` take inbound streams of `protocol` from peers of at least `access`.

        What a handler raises ends its own stream (reset) and is counted and logged, nothing else.
        """

    def take_streams(self, protocol: str, taker: StreamTaker, *, access: Access = Access.MEMBER) -> None:
        """As `serve_stream`, without a task: `taker` is called in the connection's reader with each stream.

        It must not block, and the stream is its own to end. What it raises resets the stream and is counted
        and logged.
        """

    def stop_serving(self, protocol: str) -> None:
        """Take no more streams of `protocol`, and tell others. Nothing happens where it is not served."""

    def disconnect(self, peer: PeerId, reason: str) -> None:
        """Drop the connection to `peer` with a reason that both sides' logs show."""

    def sign(self, data: bytes) -> bytes:
        """Ed25519 signature (64 bytes) by this node's key."""

    def verify(self, peer: PeerId, data: bytes, signature: bytes) -> bool:
        """Whether `signature` over `data` is by `peer`'s key."""

    def rtt(self, peer: PeerId) -> float | None:
        """Smoothed round trip in seconds, None before the first measurement."""

    def events(self) -> AbstractAsyncContextManager[AsyncIterator[PeerEvent]]:
        """News from the moment of entering; a reader too slow for the bound gets `LimitExceeded`."""

    def wall(self) -> float:
        """The network's calendar clock, seconds since 1970."""

    def entropy(self, count: int) -> bytes:
        """The network's random bytes."""
