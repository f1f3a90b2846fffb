"""Hole punching at work: `mycel.protocol.punch` on a stream, with sockets and a host.

`Puncher.punch` asks a peer that this node is connected with over a relay, `_answer` serves those who ask.
Both run one `Exchange`: a task reads the stream, one learns this side's addresses, one goes the way that is
tried. What they find goes through one queue to the exchange, which says what to do next. It has succeeded
when the host holds a direct connection to the peer, however that came about.

A peer hears nothing of how this side's dials ended but that they did: it could make this node probe others.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial

import trio
from multiaddr import Multiaddr

from mycel.node.dialer import Race
from mycel.node.host import Host
from mycel.node.reach.echo import Echo
from mycel.node.reach.locate import Located, Locator
from mycel.node.reach.meet import Doorstep, Proving
from mycel.protocol import punch
from mycel.protocol.address import circuit_of, is_circuit
from mycel.protocol.errors import (
    AddressError,
    ConnectionLost,
    MycelError,
    RemoteProtocolError,
    single_failure,
)
from mycel.protocol.limits_reach import DEFAULT_PUNCH_LIMITS, PunchLimits
from mycel.protocol.mesh import Access, PathKind, PeerId, Stream
from mycel.protocol.network import Network
from mycel.protocol.proof import NONCE_BYTES, Proof, proof_key
from mycel.protocol.punch import Action, Exchange, Offer, PunchFailed, Way

log = logging.getLogger(__name__)

QUEUE = 8
"""Events that wait for the exchange: more than one side can cause in a step."""

CLOSE_S = 1.0
"""How long the last word of an exchange may take to leave."""


class Puncher:
    """Asks and answers. `public` gives the addresses at which this node believes everybody can reach it."""

    def __init__(
        self,
        host: Host,
        network: Network,
        echo: Echo,
        *,
        public: Callable[[], Sequence[Multiaddr]] = tuple,
        limits: PunchLimits = DEFAULT_PUNCH_LIMITS,
    ) -> None:
        """Serves `/mycel/punch/1` to members from now on."""
        self.host = host
        self.network = network
        self.public = public
        self.limits = limits
        self.locator = Locator(host, echo, limits)
        self.strangers = 0
        """Sockets of strangers that were met on punched ports."""
        self.on_answered: Callable[[PeerId, PunchFailed], None] = lambda peer, failure: None
        """Hears of punches that a peer asked for and that came to nothing."""
        self._under_way: dict[PeerId, trio.CancelScope] = {}
        self._asked: dict[PeerId, bool] = {}
        host.serve_stream(punch.PROTOCOL, self._answer, access=Access.MEMBER)

    async def punch(self, peer: PeerId) -> None:
        """Return once a direct connection to `peer` stands.

        Raises `PunchFailed` with a reason within bounded time; the relayed connection is not touched.
        """
        if self.is_direct(peer):
            await trio.lowlevel.checkpoint()
            return
        if peer in self._under_way:
            raise PunchFailed(f"a punch with {peer} is under way", reason="busy")
        try:
            stream = await self.host.open_stream(peer, punch.PROTOCOL)
        except ConnectionLost as error:
            raise PunchFailed(str(error), reason="lost") from None
        failure = await self._run(stream, asks=True)
        if failure is not None:
            raise failure

    def is_direct(self, peer: PeerId) -> bool:
        """Whether a direct connection to `peer` stands."""
        info = self.host.peers.get(peer)
        return info is not None and info.path is PathKind.DIRECT

    async def _answer(self, stream: Stream) -> None:
        """A peer asks. Of two that ask at once the one with the smaller peer id goes on."""
        before = self._under_way.get(stream.peer)
        crossed = before is not None and self._asked.get(stream.peer, False)
        if before is not None and crossed and stream.peer < self.host.peer_id:
            before.cancel()
        elif before is not None or len(self._under_way) >= self.limits.serving:
            over = punch.Over("busy", "another punch is under way")
            await stream.send(punch.encode(over), end=True)
            return
        failure = await self._run(stream, asks=False)
        if failure is not None:
            log.info("no direct connection to %s: %s", stream.peer, failure)
            self.on_answered(stream.peer, failure)

    async def _run(self, stream: Stream, *, asks: bool) -> PunchFailed | None:
        scope = trio.CancelScope()
        self._under_way[stream.peer], self._asked[stream.peer] = scope, asks
        talk = Talk(self, stream, asks=asks)
        try:
            with scope:
                await talk.run()
        finally:
            if self._under_way.get(stream.peer) is scope:
                del self._under_way[stream.peer], self._asked[stream.peer]
            stream.reset()
        if self.is_direct(stream.peer):
            return None
        if scope.cancelled_caught:
            return PunchFailed(f"{stream.peer} asked at the same time", reason="busy")
        return talk.failure or PunchFailed("the punch was given up", reason="failed")


class Talk:
    """One exchange at work."""

    def __init__(self, puncher: Puncher, stream: Stream, *, asks: bool) -> None:
        self._puncher = puncher
        self._stream = stream
        self._limits = puncher.limits
        self._own_ips = puncher.network.local_ips()
        self._exchange = Exchange(
            asks=asks, own_ips=self._own_ips, now=trio.current_time(), limits=puncher.limits
        )
        self._send_event, self._events = trio.open_memory_channel[partial[list[Action]]](QUEUE)
        self._doorstep: Doorstep | None = None
        self._way = trio.CancelScope()
        self.failure: PunchFailed | None = None

    async def run(self) -> None:
        """Until a direct connection stands, or none will: then `failure` says why."""
        peer = self._stream.peer
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._watch, nursery.cancel_scope)
                nursery.start_soon(self._read)
                await self._decide(nursery)
                nursery.cancel_scope.cancel()
        except* RemoteProtocolError as errors:
            self.failure = PunchFailed(
                f"{peer} broke the protocol: {single_failure(errors)}", reason="protocol"
            )
        finally:
            if self._doorstep is not None:
                self._doorstep.close()

    async def _decide(self, nursery: trio.Nursery) -> None:
        """Let the exchange decide, event by event, until it ends."""
        exchange = self._exchange
        actions = exchange.begin()
        while True:
            for action in actions:
                await self._act(action, nursery)
            if self.failure is not None:
                return
            with trio.move_on_at(exchange.deadline) as patience:
                event = await self._events.receive()
            actions = exchange.on_time(trio.current_time()) if patience.cancelled_caught else event()

    async def _act(self, action: Action, nursery: trio.Nursery) -> None:
        match action:
            case punch.Send(messages):
                data = b"".join(punch.encode(message) for message in messages)
                with trio.move_on_after(CLOSE_S):
                    await self._speak(data)
            case punch.Learn():
                nursery.start_soon(self._learn)
            case punch.Try():
                self._way.cancel()
                self._way = trio.CancelScope()
                nursery.start_soon(self._go, action, self._way)
            case punch.Wait():
                self._way.cancel()
            case punch.End(reason, text):
                self.failure = PunchFailed(text, reason=reason)

    async def _speak(self, data: bytes) -> None:
        try:
            await self._stream.send(data)
        except MycelError as error:
            self.failure = self.failure or PunchFailed(str(error), reason="lost")

    # What the tasks find

    async def _tell(self, event: partial[list[Action]]) -> None:
        await self._send_event.send(event)

    async def _watch(self, scope: trio.CancelScope) -> None:
        """A direct connection is what this is about."""
        while not self._puncher.is_direct(self._stream.peer):
            await self._puncher.host.links_changed()
        scope.cancel()

    async def _read(self) -> None:
        exchange, host, peer = self._exchange, self._puncher.host, self._stream.peer
        try:
            while head := await self._stream.receive_some(4):
                head += await self._stream.receive_exactly(4 - len(head))
                size = int.from_bytes(head, "big")
                if size > self._limits.message_bytes:
                    raise RemoteProtocolError(f"a punch message of {size} bytes")
                message = punch.decode(await self._stream.receive_exactly(size))
                now = trio.current_time()
                await self._tell(partial(exchange.on_message, message, now, host.rtt(peer)))
            await self._tell(partial(exchange.on_lost, "the peer hung up"))
        except RemoteProtocolError as error:
            await self._tell(partial(_break_off, error))
        except MycelError as error:
            await self._tell(partial(exchange.on_lost, f"the way over the relay is gone: {error}"))

    async def _learn(self) -> None:
        puncher, exchange = self._puncher, self._exchange
        try:
            self._doorstep = await Doorstep.bind(puncher.network)
        except AddressError as error:
            await self._tell(partial(exchange.on_unmapped, str(error)))
            return
        async with trio.open_nursery() as nursery:
            relay = relay_of(puncher.host, self._stream.peer)
            locate = puncher.locator.locate
            located: Located = await nursery.start(locate, self._doorstep, self._own_ips, relay)
            offer = Offer(
                share=puncher.host.entropy(punch.SHARE_BYTES),
                mapped=located.mapped,
                symmetric=located.symmetric,
                near=located.near,
                public=tuple(str(addr) for addr in puncher.public())[: punch.ADDRS_MAX],
            )
            rtt = puncher.host.rtt(self._stream.peer)
            await self._tell(partial(exchange.on_learned, offer, trio.current_time(), rtt))

    async def _go(self, action: punch.Try, scope: trio.CancelScope) -> None:
        """Go the way; what comes of it shows in the host's connections."""
        text = f"{action.way.value}: nobody was met"
        with scope:
            try:
                await trio.sleep_until(action.at_s)
                if action.way is Way.PUNCH:
                    await self._meet(action)
                else:
                    await self._dial(action)
            except MycelError as error:
                log.info("%s to %s: %s", action.way.value, self._stream.peer, error)
            await self._tell(partial(self._exchange.on_failed, text, trio.current_time()))

    async def _meet(self, action: punch.Try) -> None:
        puncher, exchange, peer = self._puncher, self._exchange, self._stream.peer
        assert self._doorstep is not None
        own = puncher.host.peer_id
        key = proof_key(*((own, peer) if exchange.asks else (peer, own)), action.shares)

        def make_proof() -> Proof:
            return Proof(key, asks=exchange.asks, nonce=puncher.host.entropy(NONCE_BYTES))

        proving = Proving(self._doorstep, puncher.network, make_proof, self._limits)
        try:
            pipe = await proving.run(action.targets)
        finally:
            puncher.strangers += proving.strangers
        # The other side may see the connection first and hang up the stream: that must not end it here.
        with trio.CancelScope(deadline=trio.current_time() + self._limits.settle_s, shield=True):
            await puncher.host.adopt(pipe, expected=peer, dialer=exchange.asks)

    async def _dial(self, action: punch.Try) -> None:
        """Dial the other side where everybody can; only as long as a silent address deserves."""
        host, network, peer = self._puncher.host, self._puncher.network, self._stream.peer

        async def attempt(addr: Multiaddr) -> PeerId:
            return await host.adopt(await network.dial(addr), expected=peer, dialer=True)

        with trio.move_on_after(self._limits.plain_s):
            await Race([Multiaddr(addr) for addr in action.targets], attempt).run()


def relay_of(host: Host, peer: PeerId) -> PeerId | None:
    """The relay that carries the connection to `peer`; None where it is direct or gone."""
    info = host.peers.get(peer)
    if info is None or not is_circuit(info.addr):
        return None
    return circuit_of(info.addr).relay_peer


def _break_off(error: RemoteProtocolError) -> list[Action]:
    raise error
