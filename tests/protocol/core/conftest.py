"""Two `Connection`s back to back, without a network: bytes go over by hand."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from mycel.protocol import noise, yamux
from mycel.protocol.channel import Channel
from mycel.protocol.connection import Connection, Setup
from mycel.protocol.errors import ConnectionLost
from mycel.protocol.keys import OwnKey, PublicKey
from mycel.protocol.limits import DEFAULT_LIMITS, Limits


@dataclass
class End:
    """One side: its connection, and what it was told."""

    setup: Setup
    key: OwnKey
    connection: Connection = field(init=False)
    opened: PublicKey | None = None
    inbound: list[Channel] = field(default_factory=list)
    got: dict[int, bytearray] = field(default_factory=dict)
    ends: dict[int, object] = field(default_factory=dict)
    slots: int = 0
    away: list[int] = field(default_factory=list)
    credits: bool = True

    def on_open(self, remote: PublicKey) -> None:
        self.opened = remote

    def on_channel(self, channel: Channel) -> None:
        self.inbound.append(channel)
        self.listen(channel)

    def on_slot(self) -> None:
        self.slots += 1

    def on_go_away(self, code: int) -> None:
        self.away.append(code)

    def listen(self, channel: Channel) -> Channel:
        """Keep what arrives on `channel`."""
        self.got[channel.id] = bytearray()

        def sink(data, error):
            if data is None:
                self.ends[channel.id] = error
                return
            self.got[channel.id] += data
            if self.credits:
                channel.credit(len(data))

        channel.sink = sink
        return channel

    def open(self) -> Channel:
        return self.listen(self.connection.session.open())

    def take_output(self) -> bytes:
        """All that this side has to say now."""
        out = bytearray()
        while view := self.connection.outgoing():
            out += view
            self.connection.sent(len(view))
        return bytes(out)


class Wire:
    """Both sides. Time stands still unless told otherwise."""

    def __init__(self, *, limits: Limits, muxers: bool, expected: bool, seed: int) -> None:
        rng = random.Random(seed)
        self.rng = rng
        self.now = 100.0
        self.ends: list[End] = []
        for _ in range(2):
            key = OwnKey(rng.randbytes(32))
            static = noise.Static(key, rng.randbytes(32), muxers=(yamux.PROTOCOL,) if muxers else ())
            self.ends.append(End(Setup(static, limits, []), key))
        self.near, self.far = self.ends
        wanted = self.far.key.peer_id if expected else None
        for end, peer in ((self.near, wanted), (self.far, None)):
            end.connection = Connection(
                end.setup, end, expected=peer, dialer=end is self.near, ephemeral=rng.randbytes(32)
            )

    def carry(self, source: End, target: End, *, cut: Callable[[int], int] | None = None) -> int:
        """Bring over what `source` has to say, in pieces of `cut(left)` bytes."""
        data = source.take_output()
        at = 0
        while at < len(data):
            size = cut(len(data) - at) if cut else len(data)
            target.connection.receive(memoryview(bytearray(data[at : at + size])), self.now)
            at += size
        return len(data)

    def settle(self, *, cut: Callable[[int], int] | None = None, delay: float = 0.0) -> None:
        """Carry to and fro until neither has anything to say."""
        for _ in range(10_000):
            moved = self.carry(self.near, self.far, cut=cut)
            self.now += delay
            moved += self.carry(self.far, self.near, cut=cut)
            self.now += delay
            if not moved:
                return
        raise AssertionError("the two sides never stop talking")

    def lose(self) -> None:
        for end in self.ends:
            end.connection.lose(ConnectionLost("over"))


@pytest.fixture
def make_wire() -> Callable[..., Wire]:
    """A fresh `Wire`; `open_wire` is one whose handshake is done."""

    def make(
        *, limits: Limits = DEFAULT_LIMITS, muxers: bool = True, expected: bool = True, seed: int = 7
    ) -> Wire:
        return Wire(limits=limits, muxers=muxers, expected=expected, seed=seed)

    return make


@pytest.fixture
def open_wire(make_wire: Callable[..., Wire]) -> Callable[..., Wire]:
    """A `Wire` whose connection is open."""

    def make(**options: object) -> Wire:
        wire = make_wire(**options)
        wire.settle()
        assert wire.near.opened is not None
        assert wire.far.opened is not None
        return wire

    return make
