"""Hole punching: how two members that meet over a relay agree on a direct connection.

One side **asks**, over a stream of `/mycel/punch/1` on the relayed (and authenticated) connection:

    asks                                   answers
    Ask                            ->
    learns its mapping                     learns its own
    Offer                          ->
                                   <-      Offer, Go(way)
                                           ... the way fails: Go(next way), or Over(reason, text)

Each side binds a fresh port and learns from an address echo which public address the NAT gives it. An `Offer`
carries that address, the machine's own ones in the LAN, those where it is reachable for everybody, and half a
key. The answering side, which is the first to know both, **leads**: it names the way.

    dial      the leading side dials an address that everybody can reach
    reverse   the asking side does; it says Failed when it could not
    punch     both dial and accept on their fresh ports at the same moment: the asking side when `Go` comes,
              the leading side half a round trip after it sent that

On a punched socket both prove with the key that they are the two of this exchange (`mycel.protocol.proof`);
the asking side is the dialer of the connection made of it. Whom to dial is `mycel.protocol.aim`'s to say.

`Exchange` is one side of it: messages, results and the time go in, actions come out. Every step has a
deadline. Messages are msgpack maps with a `type` behind a length of four bytes, big-endian.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import msgspec

from mycel.protocol.aim import Aim, take_aim
from mycel.protocol.errors import MycelError, RemoteProtocolError
from mycel.protocol.limits_reach import DEFAULT_PUNCH_LIMITS, PunchLimits

PROTOCOL = "/mycel/punch/1"
SHARE_BYTES = 32
ADDRS_MAX = 8
RTT_MAX_S = 2.0
"""A round trip beyond this is not waited for: both sides dial for seconds anyway."""

Addr = Annotated[str, msgspec.Meta(max_length=128)]
Addrs = Annotated[tuple[Addr, ...], msgspec.Meta(max_length=ADDRS_MAX)]


class Way(enum.Enum):
    """How the two get connected."""

    DIAL = "dial"
    REVERSE = "reverse"
    PUNCH = "punch"


class Ask(msgspec.Struct, frozen=True, tag="ask"):
    """Let us connect directly."""


class Offer(msgspec.Struct, frozen=True, tag="offer"):
    """Where this side can be met. Addresses are `/ip4|ip6/HOST/tcp/PORT`."""

    share: Annotated[bytes, msgspec.Meta(min_length=SHARE_BYTES, max_length=SHARE_BYTES)]
    """Fresh random bytes: half of what the proof's key is made of."""
    mapped: Addrs = ()
    """The fresh port as the internet sees it."""
    symmetric: bool = False
    """Whether each destination sees another port, so that `mapped` holds for nobody but the echo."""
    near: Addrs = ()
    """The fresh port at the machine's own addresses."""
    public: Addrs = ()
    """Where this node listens for everybody, as far as it knows."""


class Go(msgspec.Struct, frozen=True, tag="go"):
    """Now, and how."""

    way: Way


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The asking side could not dial."""

    text: Annotated[str, msgspec.Meta(max_length=512)] = ""


class Over(msgspec.Struct, frozen=True, tag="over"):
    """No more ways: one word for machines, a sentence for people."""

    reason: Annotated[str, msgspec.Meta(max_length=32)]
    text: Annotated[str, msgspec.Meta(max_length=512)] = ""


Message = Ask | Offer | Go | Failed | Over
_DECODER: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)
REASONS = ("impossible", "failed", "busy", "deadline", "unmapped")


class PunchFailed(MycelError):
    """No direct connection came about; the relayed one goes on.

    `reason` is one word: "impossible" (the two NATs do not allow it), "failed" (every way was tried),
    "busy" (the peer takes part in another exchange), "deadline", "unmapped" (this side learned no address),
    "protocol", "lost".
    """

    def __init__(self, text: str, *, reason: str) -> None:
        super().__init__(text)
        self.reason = reason


def encode(message: Message) -> bytes:
    """`message` behind its length."""
    body = msgspec.msgpack.encode(message)
    return len(body).to_bytes(4, "big") + body


def decode(body: bytes) -> Message:
    """The message in `body` (without its length). Raises `RemoteProtocolError`."""
    try:
        return _DECODER.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RemoteProtocolError(f"a punch message that cannot be read: {error}") from None


@dataclass(frozen=True, slots=True)
class Learn:
    """Bind a fresh port, learn its mapping, and report it by `Exchange.on_learned`."""


@dataclass(frozen=True, slots=True)
class Send:
    """Send these, in one piece."""

    messages: tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Try:
    """Go this way from trio time `at_s` on; report by `Exchange.on_failed` where it leads nowhere."""

    way: Way
    at_s: float
    targets: tuple[str, ...]
    shares: tuple[bytes, bytes]
    """Of the asking and of the answering side."""


@dataclass(frozen=True, slots=True)
class Wait:
    """The other side goes this way."""

    way: Way


@dataclass(frozen=True, slots=True)
class End:
    """It is over, without a direct connection."""

    reason: str
    text: str


Action = Learn | Send | Try | Wait | End


class Step(enum.Enum):
    """What an exchange waits for."""

    ASKED = "the other side to ask"
    OFFERS = "both sides to learn their addresses"
    ACT = "a connection"
    GO = "the other side to say how to go on"
    ENDED = "nothing"


class Exchange:
    """One side of a punch. `own_ips` are this machine's addresses, by which a LAN is known.

    Each method takes the time (trio's) and returns what to do. The exchange has succeeded when a direct
    connection stands, which its service sees; it is not told.
    """

    def __init__(
        self, *, asks: bool, own_ips: Sequence[str], now: float, limits: PunchLimits = DEFAULT_PUNCH_LIMITS
    ) -> None:
        self.asks = asks
        self.step = Step.OFFERS if asks else Step.ASKED
        self.deadline = now + limits.step_s + (limits.learn_s if asks else 0.0)
        self._limits = limits
        self._own_ips = own_ips
        self._own: Offer | None = None
        self._theirs: Offer | None = None
        self._aim: Aim | None = None
        self._ways: list[Way] = []
        """For the side that leads those still to go, for the other those gone."""
        self._failures: list[str] = []
        self._is_alone = False

    def begin(self) -> list[Action]:
        """The first words of the side that asks."""
        return [Send((Ask(),)), Learn()] if self.asks else []

    def on_message(self, message: Message, now: float, rtt: float | None = None) -> list[Action]:
        """Something came. `rtt` is the round trip of the relayed connection, where it is known.

        Raises `RemoteProtocolError` for a message that is not due.
        """
        match message:
            case Ask() if self.step is Step.ASKED:
                self._await(Step.OFFERS, now, self._limits.step_s + self._limits.learn_s)
                return [Learn()]
            case Offer() if self._theirs is None and self.step is Step.OFFERS:
                self._theirs = message
                return self._on_offers(now, rtt)
            case Go() if self.asks and self._may_go(message.way):
                return self._go(message.way, now)
            case Failed() if not self.asks and self.step is Step.ACT:
                return self._next_way(now, f"the peer could not dial: {_printable(message.text)}", rtt)
            case Over() if self.step is not Step.ENDED:
                reason = message.reason if message.reason in REASONS else "failed"
                return self._end(reason, f"the peer gave up: {_printable(message.text)}")
        raise RemoteProtocolError(f"{type(message).__name__} came while waiting for {self.step.value}")

    def on_learned(self, offer: Offer, now: float, rtt: float | None = None) -> list[Action]:
        """This side's addresses are known."""
        if self.step is Step.ENDED:
            return []
        self._own = offer
        return [Send((offer,))] if self.asks else self._on_offers(now, rtt)

    def on_unmapped(self, text: str) -> list[Action]:
        """This side's addresses cannot be known."""
        return self._give_up("unmapped", text)

    def on_lost(self, text: str) -> list[Action]:
        """The stream ended. A way under way is gone to its end all the same."""
        self._is_alone = True
        return [] if self.step is Step.ACT else self._end("lost", text)

    def on_failed(self, text: str, now: float) -> list[Action]:
        """The way that this side went leads nowhere."""
        if self.step is not Step.ACT:
            return []
        if self._is_alone:
            return self._end("lost", text)
        if not self.asks:
            return self._next_way(now, text)
        self._await(Step.GO, now, self._limits.step_s + self._limits.settle_s)
        return [Send((Failed(text[:512]),))] if self._ways[-1] is Way.REVERSE else []

    def on_time(self, now: float) -> list[Action]:
        """Time went by."""
        if now < self.deadline or self.step is Step.ENDED:
            return []
        if self._is_alone:
            return self._end("lost", "no connection came in time, and the way to the peer is gone")
        if self.step is Step.ACT and not self.asks:
            return self._next_way(now, "no connection came in time")
        return self._give_up("deadline", f"waited too long for {self.step.value}")

    def _on_offers(self, now: float, rtt: float | None) -> list[Action]:
        """The leading side: both offers may be there."""
        if self.asks or self._own is None or self._theirs is None:
            return []
        self._aim = take_aim(self._own, self._theirs, self._own_ips, self._limits.targets)
        self._ways = [Way.DIAL] if self._aim.public else []
        self._ways += [Way.REVERSE] if self._own.public else []
        self._ways += [Way.PUNCH] if not self._aim.obstacle else []
        if self._aim.obstacle:
            self._failures.append(self._aim.obstacle)
        first, *rest = self._next_way(now, "", rtt)
        assert isinstance(first, Send)
        return [Send((self._own, *first.messages)), *rest]

    def _next_way(self, now: float, failure: str, rtt: float | None = None) -> list[Action]:
        """The leading side: how to go on."""
        assert self._aim is not None
        if failure:
            self._failures.append(failure)
        if not self._ways:
            reason = "impossible" if self._aim.obstacle else "failed"
            return self._give_up(reason, "; ".join(self._failures))
        way = self._ways.pop(0)
        pause = min(rtt or 0.0, RTT_MAX_S) / 2 if way is Way.PUNCH else 0.0
        self._await(Step.ACT, now, pause + self._seconds(way))
        said = Send((Go(way),))
        return [said, Wait(way)] if way is Way.REVERSE else [said, self._try(way, now + pause)]

    def _may_go(self, way: Way) -> bool:
        """Whether the leading side may say so now: each way once, after its offer."""
        ready = self._own is not None and self._theirs is not None and self.step is not Step.ENDED
        return ready and way not in self._ways

    def _go(self, way: Way, now: float) -> list[Action]:
        """The asking side: as the other one says."""
        assert self._own is not None
        assert self._theirs is not None
        self._aim = take_aim(self._own, self._theirs, self._own_ips, self._limits.targets)
        self._ways.append(way)
        # Longer than the other side's own patience, so that its next word comes first.
        self._await(Step.ACT, now, self._seconds(way) + self._limits.step_s)
        return [Wait(way)] if way is Way.DIAL else [self._try(way, now)]

    def _seconds(self, way: Way) -> float:
        """How long a way may take, the handshake included."""
        opening = self._limits.window_s if way is Way.PUNCH else self._limits.plain_s
        return opening + self._limits.settle_s

    def _try(self, way: Way, at_s: float) -> Try:
        assert self._own is not None
        assert self._theirs is not None
        assert self._aim is not None
        mine, other = self._own.share, self._theirs.share
        targets = self._aim.punch if way is Way.PUNCH else self._aim.public
        return Try(way, at_s, targets, (mine, other) if self.asks else (other, mine))

    def _await(self, step: Step, now: float, seconds: float) -> None:
        self.step, self.deadline = step, now + seconds

    def _give_up(self, reason: str, text: str) -> list[Action]:
        return [Send((Over(reason, text[:512]),)), *self._end(reason, text)]

    def _end(self, reason: str, text: str) -> list[Action]:
        self.step = Step.ENDED
        return [End(reason, text)]


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else "?" for char in text)
