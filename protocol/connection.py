"""A libp2p connection without I/O: bytes in, calls on an `Observer` and on channels out; bytes out.

It composes the layers in the order libp2p speaks them (libp2p specs/connections): multistream-select of
`/noise`, the Noise handshake, the muxer (named inside the handshake where both sides can, else by
multistream-select within the sealed channel), then yamux. The dialer does not wait where the answer can only
be yes: its first packet holds the negotiation and the first Noise message, so a connection costs two round
trips after TCP's own.

`receive` takes what arrived and raises `RemoteProtocolError` with the reason for anything the protocols
forbid, in any state; `outgoing` and `sent` hand out what is to be written. Nothing here waits, and nothing
grows without a bound from `Limits`.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace
from typing import Protocol

from mycel.protocol import multistream, noise, yamux
from mycel.protocol.errors import ConnectionLost, LocalProtocolError, Refused, RemoteProtocolError
from mycel.protocol.keys import PublicKey
from mycel.protocol.limits import Limits
from mycel.protocol.mesh import PeerId
from mycel.protocol.sealed import NESTED_PLAINTEXT_MAX, PLAINTEXT_MAX, Opener, Outlet
from mycel.protocol.session import Observer as SessionObserver
from mycel.protocol.session import Session

_MUXERS = (yamux.PROTOCOL,)

NESTED_PATIENCE = 4.0
"""How many times longer a connection through a relay may be silent: 256 KiB at 32 KiB/s wait for 8 s."""


class Observer(SessionObserver, Protocol):
    """Who is told what happens on a connection."""

    def on_open(self, remote: PublicKey) -> None:
        """The peer is proven and the muxer runs: streams may be opened."""


class Stage(enum.Enum):
    """How far the connection is."""

    SECURITY = "negotiating security"
    HANDSHAKE = "handshake"
    MUXER = "negotiating the muxer"
    OPEN = "open"
    ENDED = "ended"


@dataclass(frozen=True, slots=True)
class Setup:
    """What all connections of one node share."""

    static: noise.Static
    limits: Limits
    spare: list[bytearray]
    """Output buffers for reuse."""
    message_max: int = PLAINTEXT_MAX
    """Plaintext of one Noise message."""

    def nested(self) -> Setup:
        """The same for connections within a stream of another one, through a relay.

        There a ping waits behind all that the relay holds back for its rates, and whoever dies is missed by
        the relay first: silence proves less and matters less.
        """
        limits = replace(self.limits, silence_s=NESTED_PATIENCE * self.limits.silence_s)
        return replace(self, limits=limits, message_max=NESTED_PLAINTEXT_MAX)


class Connection:
    """One connection from the first byte to the last."""

    def __init__(
        self,
        setup: Setup,
        observer: Observer,
        *,
        expected: PeerId | None,
        dialer: bool,
        ephemeral: bytes,
    ) -> None:
        """`expected` is who must answer (None: anybody); `ephemeral` 32 fresh random bytes."""
        self._setup = setup
        self._observer = observer
        self._expected = expected
        self._dialer = dialer
        self._noise = noise.Handshake(setup.static, initiator=dialer, ephemeral=ephemeral)
        self._held = bytearray()
        self._raw = bytearray()
        self._raw_sent = 0
        self._outlet: Outlet | None = None
        self._opener: Opener | None = None
        self._session: Session | None = None
        self.now = 0.0
        """When the last bytes came."""
        self._asks: multistream.Dialer | None = None
        self._answers: multistream.Listener | None = None
        self.stage = Stage.SECURITY
        limit = setup.limits.multistream_message
        if dialer:
            self._asks = multistream.Dialer(noise.PROTOCOL, limit)
            self._raw += multistream.proposal(noise.PROTOCOL) + self._noise.start()
        else:
            self._answers = multistream.Listener(lambda name: name == noise.PROTOCOL, limit)

    @property
    def session(self) -> Session:
        """The muxer. Raises `LocalProtocolError` before the connection is open."""
        if self._session is None:
            raise LocalProtocolError(f"no streams yet: the connection is at stage {self.stage.value!r}")
        return self._session

    @property
    def window(self) -> int:
        """The largest receive window that the peer filled, in bytes."""
        return self._session.learned if self._session is not None else yamux.INITIAL_WINDOW

    # In

    def receive(self, data: memoryview, now: float) -> None:
        """Take bytes from the pipe (writable memory: it is decrypted in place) at time `now`.

        Raises `RemoteProtocolError` or `Refused` with the reason to drop the connection; nothing is to be
        called but `lose` after that.
        """
        self.now = now
        if self._opener is None:
            rest = self._before_cipher(data)
            if self._opener is None or not rest:
                return
            data = memoryview(rest)
        self._opener.receive(data, self._on_plain)

    def _before_cipher(self, data: memoryview) -> bytearray:
        """Negotiation and handshake; returns what arrived behind them, which is sealed already."""
        held = self._held
        held += data
        if self.stage is Stage.SECURITY and held:
            piece = bytes(held)
            held.clear()
            held += self._negotiate(piece) or b""
        while self.stage is Stage.HANDSHAKE and len(held) >= 2:
            size = held[0] << 8 | held[1]
            if size > noise.MESSAGE_BYTES_MAX:
                raise RemoteProtocolError(f"a handshake message of {size} bytes")
            if len(held) < 2 + size:
                break
            message = bytes(held[2 : 2 + size])
            del held[: 2 + size]
            self._raw += self._noise.receive(message)
            if self._noise.done:
                self._begin_sealed()
        self._held = bytearray()
        if self._opener is None:
            self._held = held
        return held

    def _negotiate(self, data: bytes | memoryview) -> bytes | memoryview | None:
        """Multistream-select in either role: what is behind the agreement, None while there is none."""
        if self._asks is not None:
            rest = self._asks.receive(data)
            if rest is not None:
                self._agreed()
            return rest
        assert self._answers is not None
        answer, behind = self._answers.receive(data)
        if self._answers.given_up is not None:
            raise RemoteProtocolError(f"{self.stage.value}: {self._answers.given_up}")
        if self.stage is Stage.SECURITY:
            self._raw += answer
        else:
            self._write_sealed(answer)
        if self._answers.protocol is None:
            return None
        self._agreed()
        return behind

    def _agreed(self) -> None:
        self._asks = self._answers = None
        if self.stage is Stage.SECURITY:
            self.stage = Stage.HANDSHAKE
        else:
            self._open()

    def _begin_sealed(self) -> None:
        """The handshake is over: check who it is, and agree on the muxer."""
        remote = self._noise.remote
        assert remote is not None
        if self._expected is not None and remote.peer_id != self._expected:
            raise Refused(f"expected peer {self._expected}, found {remote.peer_id}", reason="identity")
        send_key, receive_key = self._noise.keys()
        self._outlet = Outlet(send_key, self._setup.spare, self._setup.message_max)
        self._opener = Opener(receive_key)
        offered = self._noise.muxers
        if offered:
            if yamux.PROTOCOL not in offered:
                raise RemoteProtocolError(
                    f"the peer speaks no muxer that we do, only {', '.join(offered)[:200]}"
                )
            self._open()
            return
        self.stage = Stage.MUXER
        limit = self._setup.limits.multistream_message
        if self._dialer:
            self._asks = multistream.Dialer(yamux.PROTOCOL, limit)
            self._write_sealed(multistream.proposal(yamux.PROTOCOL))
        else:
            self._answers = multistream.Listener(lambda name: name == yamux.PROTOCOL, limit)

    def _open(self) -> None:
        remote = self._noise.remote
        assert self._outlet is not None
        assert remote is not None
        self._session = Session(
            self._outlet,
            self._observer,
            self._setup.limits,
            client=self._dialer,
            now=self.now,
        )
        self.stage = Stage.OPEN
        self._observer.on_open(remote)

    def _on_plain(self, plain: memoryview) -> None:
        if self._session is not None:
            self._session.feed(plain, self.now)
            return
        if self.stage is not Stage.MUXER:
            return
        rest = self._negotiate(bytes(plain))
        if rest and self._session is not None:
            self._session.feed(memoryview(rest), self.now)

    # Out

    def outgoing(self) -> memoryview:
        """Bytes for the pipe, as many as one call should take; empty when there is nothing to send."""
        if self._raw:
            return memoryview(bytes(self._raw[self._raw_sent :]))
        outlet = self._outlet
        if outlet is None:
            return memoryview(b"")
        if self._session is not None:
            self._session.egress.fill()
        outlet.seal()
        return outlet.outgoing()

    def sent(self, count: int) -> bool:
        """The pipe took `count` of the bytes of the last `outgoing`; False where nothing is left to send."""
        if self._raw:
            self._raw_sent += count
            if self._raw_sent == len(self._raw):
                self._raw.clear()
                self._raw_sent = 0
        elif self._outlet is not None and self._outlet.sent(count):
            return self._session is not None and self._session.egress.waiting
        return True

    def lose(self, error: ConnectionLost) -> None:
        """The connection is over: every stream ends with `error`."""
        self.stage = Stage.ENDED
        if self._session is not None:
            self._session.lose(error)

    def _write_sealed(self, data: bytes) -> None:
        if data and self._outlet is not None:
            view, at = self._outlet.reserve(len(data))
            view[at : at + len(data)] = data
