"""DCUtR, how foreign libp2p peers turn a relayed connection into a direct one (libp2p specs/relay/DCUtR).

The peer that was called through the relay opens `/libp2p/dcutr` to the one that called:

    called                                 caller
    CONNECT(addrs)             ->
                               <-          CONNECT(addrs)      (the time between is the round trip)
    SYNC                       ->          dials at once
    half a round trip later, dials

Up to three times over, on one stream or a fresh one. Who called through the relay is the dialer of the
connection, whoever's packets opened it: go-libp2p, rust-libp2p and js-libp2p agree on that.

Messages are protobufs of at most 4 KiB behind their length. `Upgrade` is one side: messages, results and the
time go in, actions come out; every step has a deadline. The protocol knows no proof of its own: any socket
is handed to the Noise handshake, which lets only the expected peer in.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

from google.protobuf.message import DecodeError
from multiaddr import Multiaddr

from mycel.protocol import varint
from mycel.protocol.errors import RemoteProtocolError
from mycel.protocol.identify import read_addrs
from mycel.protocol.limits_reach import DEFAULT_PUNCH_LIMITS, PunchLimits
from mycel.protocol.pb import dcutr_pb2

PROTOCOL = "/libp2p/dcutr"
ATTEMPTS = 3
"""By the one that was called (the specification's number)."""
RTT_MAX_S = 2.0


class Kind(enum.Enum):
    """What a message is."""

    CONNECT = "connect"
    SYNC = "sync"


@dataclass(frozen=True, slots=True)
class Message:
    """CONNECT with the sender's addresses, or SYNC."""

    kind: Kind
    addrs: tuple[Multiaddr, ...] = ()


def write(message: Message) -> bytes:
    """`message` behind its length."""
    kind = dcutr_pb2.HolePunch.CONNECT if message.kind is Kind.CONNECT else dcutr_pb2.HolePunch.SYNC
    raw = dcutr_pb2.HolePunch(type=kind, ObsAddrs=[addr.to_bytes() for addr in message.addrs])
    return varint.prefixed(raw.SerializeToString())


def read(raw: bytes) -> Message:
    """The message in `raw` (without its length); addresses that do not parse are left out.

    Raises `RemoteProtocolError`.
    """
    try:
        found = dcutr_pb2.HolePunch.FromString(raw)
    except DecodeError as error:
        raise RemoteProtocolError(f"not a DCUtR message: {error}") from None
    kinds = {dcutr_pb2.HolePunch.CONNECT: Kind.CONNECT, dcutr_pb2.HolePunch.SYNC: Kind.SYNC}
    if not found.HasField("type") or found.type not in kinds:
        raise RemoteProtocolError("a DCUtR message that is neither CONNECT nor SYNC")
    return Message(kinds[found.type], read_addrs(found.ObsAddrs))


@dataclass(frozen=True, slots=True)
class Say:
    """Send this."""

    message: Message


@dataclass(frozen=True, slots=True)
class Dial:
    """Dial and accept from trio time `at_s` on; report by `Upgrade.on_failed` where nothing comes of it."""

    at_s: float
    addrs: tuple[Multiaddr, ...]


@dataclass(frozen=True, slots=True)
class Stop:
    """It is over without a direct connection: a word for machines, a sentence for people."""

    reason: str
    text: str


class Upgrade:
    """One side. `addrs` are this side's own, where it can be met from now on."""

    def __init__(
        self,
        *,
        called: bool,
        addrs: Sequence[Multiaddr],
        now: float,
        limits: PunchLimits = DEFAULT_PUNCH_LIMITS,
    ) -> None:
        """`called` says whether this side was called through the relay: then it leads."""
        self.called = called
        self.attempt = 0
        self.deadline = now + limits.step_s
        self.is_over = False
        self._addrs = tuple(addrs)
        self._limits = limits
        self._due: Kind | None = Kind.CONNECT
        self._asked_at = now
        self._theirs: tuple[Multiaddr, ...] = ()

    def begin(self, now: float) -> list[Say | Dial | Stop]:
        """The first words of the side that was called, and of each further attempt."""
        if not self.called:
            return []
        self.attempt += 1
        self._asked_at = now
        self._wait(Kind.CONNECT, now + self._limits.step_s)
        return [Say(Message(Kind.CONNECT, self._addrs))]

    def on_message(self, message: Message, now: float) -> list[Say | Dial | Stop]:
        """Something came. Raises `RemoteProtocolError` for what is not due."""
        # The side that leads may begin again while this one still dials.
        again = self._due is None and not self.called and message.kind is Kind.CONNECT
        if self.is_over or (message.kind is not self._due and not again):
            due = self._due.value if self._due is not None else "nothing"
            raise RemoteProtocolError(f"{message.kind.value} came where {due} is due in DCUtR")
        if message.kind is Kind.SYNC:
            return [self._dial(now, now)]
        if self.attempt >= ATTEMPTS and not self.called:
            return self._stop("failed", f"{ATTEMPTS} attempts came to nothing")
        self._theirs = message.addrs
        if self.called:
            rtt = min(now - self._asked_at, RTT_MAX_S)
            return [Say(Message(Kind.SYNC)), self._dial(now + rtt / 2, now)]
        self.attempt += 1
        self._wait(Kind.SYNC, now + self._limits.step_s)
        return [Say(Message(Kind.CONNECT, self._addrs))]

    def on_failed(self, text: str, now: float) -> list[Say | Dial | Stop]:
        """The dials of this attempt came to nothing."""
        if self.is_over:
            return []
        if not self.called:
            # The other side leads: it begins again, at once, or here or on a stream of its own.
            self._wait(Kind.CONNECT, now + self._limits.step_s)
            return []
        if self.attempt < ATTEMPTS:
            return self.begin(now)
        return self._stop("failed", f"{ATTEMPTS} attempts came to nothing; the last: {text}")

    def on_time(self, now: float) -> list[Say | Dial | Stop]:
        """Time went by."""
        if now < self.deadline or self.is_over:
            return []
        if self._due is None:
            return self.on_failed("no connection in time", now)
        return self._stop("deadline", f"waited too long for the peer's {self._due.value}")

    def _dial(self, at_s: float, now: float) -> Dial:
        self._due = None
        self.deadline = at_s + self._limits.window_s + self._limits.settle_s
        return Dial(at_s, self._theirs)

    def _wait(self, kind: Kind, deadline: float) -> None:
        self._due, self.deadline = kind, deadline

    def _stop(self, reason: str, text: str) -> list[Say | Dial | Stop]:
        self.is_over = True
        return [Stop(reason, text)]
