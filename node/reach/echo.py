"""The address echo at work: `Echo` asks other members and, where this node is public, answers them.

The wire is `mycel.protocol.echo`. A server opens its two ports when the first member asks and closes them
when it stops serving. What a server says is proven to come from it, not to be true: who decides anything by
it asks several (`mycel.node.reach.verdict`), and a punch towards a false address just fails.
"""

from __future__ import annotations

import contextlib
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from ipaddress import ip_address

import msgspec
import trio
from multiaddr import Multiaddr

from mycel.node.host import Host
from mycel.node.reach.exchange import receive_end, receive_exactly, send_all
from mycel.node.reach.outward import ip_of
from mycel.protocol import echo, varint
from mycel.protocol.address import endpoint_of, tcp_addr
from mycel.protocol.delimited import receive_prefixed
from mycel.protocol.echo import Mapped as Mapped
from mycel.protocol.errors import AddressError, MycelError, PipeBroken, RemoteProtocolError
from mycel.protocol.limits_reach import DEFAULT_REACH_LIMITS, ReachLimits
from mycel.protocol.mesh import PathKind, PeerId, Stream
from mycel.protocol.network import Listener, Network, Pipe

log = logging.getLogger("mycel.reach")

KNOWN_MAX = 256
"""Servers whose echo ports are remembered."""


class EchoFailed(MycelError):
    """An echo server did not say, within the deadline and with a proof, what it sees."""


@dataclass(slots=True)
class _Key:
    """A key given to an asker."""

    peer: PeerId
    key: bytes
    until: float
    used: list[int] = field(default_factory=list)
    """The ports' indices that it was used at."""


class Echo:
    """The echo of one node: `ask` and `hold` ask, `serve` starts answering."""

    def __init__(self, host: Host, network: Network, limits: ReachLimits = DEFAULT_REACH_LIMITS) -> None:
        self._host = host
        self._network = network
        self._limits = limits
        self._keys: OrderedDict[bytes, _Key] = OrderedDict()
        self._listeners: dict[int, tuple[Listener, Listener]] = {}
        self._ports_of: OrderedDict[tuple[PeerId, str], tuple[int, int]] = OrderedDict()
        self._opening = trio.Lock()
        self._nursery: trio.Nursery | None = None
        self._sockets = 0
        self.answered = 0
        """Questions answered so far."""

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Be able to answer until cancelled. Nothing is listened on before `serve` and a question."""
        try:
            async with trio.open_nursery() as self._nursery:
                task_status.started()
                await trio.sleep_forever()
        finally:
            self.stop()
            self._nursery = None

    # Asking

    async def ask(self, server: PeerId, local: Multiaddr) -> Mapped:
        """How `server`, a member connected directly, sees the port `local` (/ip4/0.0.0.0/tcp/PORT will do).

        The port may be listened on with `shared=True` meanwhile. Raises `EchoFailed` within
        `ReachLimits.echo_s`.
        """
        async with self.hold(server, local) as mapped:
            return mapped

    @asynccontextmanager
    async def hold(self, server: PeerId, local: Multiaddr) -> AsyncIterator[Mapped]:
        """As `ask`, with both connections kept open inside, so that no NAT forgets the mapping meanwhile."""
        seconds = self._limits.echo_s
        pipes: list[Pipe] = []
        try:
            try:
                with trio.fail_after(seconds):
                    mapped = await self._learn(server, local, pipes)
            except trio.TooSlowError:
                raise EchoFailed(
                    f"{server} did not echo within {seconds:g} s; its echo ports may be filtered"
                ) from None
            yield mapped
        finally:
            for pipe in pipes:
                pipe.close()

    async def _learn(self, server: PeerId, local: Multiaddr, pipes: list[Pipe]) -> Mapped:
        seen: dict[int, Multiaddr] = {}
        failures: list[str] = []

        async def ask_port(index: int, port: int) -> None:
            try:
                pipe = early.get(index) or await self._network.dial(tcp_addr(ip, port), local=local)
                pipes.append(pipe)
                nonce = self._network.entropy(echo.NONCE_BYTES)
                await send_all(pipe, echo.ask(offer.key_id, offer.key, nonce, index))
                raw = await receive_exactly(pipe, echo.ANSWER_BYTES)
                seen[index] = echo.read_answer(raw, offer.key, nonce, index)
            except MycelError as error:
                failures.append(str(error))
                nursery.cancel_scope.cancel()

        ip = self._direct_ip(server)
        early: dict[int, Pipe] = {}
        offer = await self._offer_and_dial(server, ip, local, early)
        if offer.ports is None:
            raise EchoFailed(f"{server} echoes nothing: {offer.why}")
        async with trio.open_nursery() as nursery:
            for index, port in enumerate(offer.ports):
                nursery.start_soon(ask_port, index, port)
        if failures:
            raise EchoFailed(f"{server} echoed nothing: {'; '.join(failures)}")
        return Mapped(seen[0], seen[1])

    async def _offer_and_dial(
        self, server: PeerId, ip: str, local: Multiaddr, early: dict[int, Pipe]
    ) -> echo.Offer:
        """The server's offer; `early` are connections to its ports, made meanwhile where they were known.

        A punch waits for this, and each round trip counts.
        """
        family = 6 if ":" in ip else 4
        known = self._ports_of.get((server, ip))

        async def dial(index: int, port: int) -> None:
            with contextlib.suppress(MycelError):  # it is dialled once more when the offer says so
                early[index] = await self._network.dial(tcp_addr(ip, port), local=local)

        offer: echo.Offer | None = None
        failure: EchoFailed | None = None
        try:
            async with trio.open_nursery() as nursery:
                for index, port in enumerate(known or ()):
                    nursery.start_soon(dial, index, port)
                try:
                    offer = await self._offer(server, family)
                except EchoFailed as error:
                    failure = error
                if offer is None or offer.ports != known:
                    nursery.cancel_scope.cancel()
        finally:
            if offer is None or offer.ports != known:
                _drop(early)
        if offer is None:
            raise failure or EchoFailed(f"{server} was not asked for an echo")
        if offer.ports is not None:
            self._ports_of[server, ip] = offer.ports
            self._ports_of.move_to_end((server, ip))
            if len(self._ports_of) > KNOWN_MAX:
                self._ports_of.popitem(last=False)
        return offer

    def _direct_ip(self, server: PeerId) -> str:
        info = self._host.peers.get(server)
        ip = ip_of(info.addr) if info is not None and info.path is PathKind.DIRECT else ""
        if not ip:
            raise EchoFailed(f"{server} is not connected directly; only such a peer can echo")
        return ip

    async def _offer(self, server: PeerId, family: int) -> echo.Offer:
        try:
            stream = await self._host.open_stream(server, echo.PROTOCOL)
        except MycelError as error:
            raise EchoFailed(f"{server} cannot be asked for an echo: {error}") from None
        try:
            await stream.send(varint.prefixed(_ENCODER.encode(echo.Wish(family))), end=True)
            return _OFFERS.decode(await receive_prefixed(stream, echo.OFFER_BYTES_MAX))
        except (MycelError, msgspec.DecodeError) as error:
            raise EchoFailed(f"{server} offers no echo: {error}") from None
        finally:
            stream.reset()

    # Answering

    def serve(self) -> None:
        """From now on answer members, until `stop`."""
        if echo.PROTOCOL not in self._host.protocols:
            self._host.serve_stream(echo.PROTOCOL, self._answer_wish)

    def stop(self) -> None:
        """Answer nobody any more; the ports are closed."""
        self._host.stop_serving(echo.PROTOCOL)
        self._keys.clear()
        for listeners in self._listeners.values():
            for listener in listeners:
                listener.close()
        self._listeners.clear()

    @property
    def ports(self) -> Sequence[int]:
        """The echo ports that are open now."""
        return [endpoint_of(one.addr).port for two in self._listeners.values() for one in two]

    async def _answer_wish(self, stream: Stream) -> None:
        with trio.move_on_after(self._limits.echo_s):
            try:
                wish = _WISHES.decode(await receive_prefixed(stream, echo.OFFER_BYTES_MAX))
            except msgspec.DecodeError as error:
                raise RemoteProtocolError(f"not a wish for an echo: {error}") from None
            offer = await self._make_offer(stream.peer, wish.family)
            await stream.send(varint.prefixed(_ENCODER.encode(offer)), end=True)
            return
        stream.reset()

    async def _make_offer(self, peer: PeerId, family: int) -> echo.Offer:
        now = trio.current_time()
        for key_id in [key_id for key_id, key in self._keys.items() if key.until <= now]:
            del self._keys[key_id]
        own = sum(key.peer == peer for key in self._keys.values())
        if own >= self._limits.echo_keys_per_peer or len(self._keys) >= self._limits.echo_keys:
            return echo.Offer(None, why="it gave as many keys as it may; ask again in some seconds")
        try:
            async with self._opening:
                listeners = self._listeners.get(family) or await self._open(family)
        except AddressError as error:
            return echo.Offer(None, why=str(error)[: echo.WHY_MAX])
        key_id = self._network.entropy(echo.KEY_ID_BYTES)
        key = self._network.entropy(echo.KEY_BYTES)
        self._keys[key_id] = _Key(peer, key, now + self._limits.echo_key_s)
        first, second = (endpoint_of(listener.addr).port for listener in listeners)
        return echo.Offer((first, second), key_id, key)

    async def _open(self, family: int) -> tuple[Listener, Listener]:
        """Two ports of an IP version, on loopback only where this node listens nowhere else in it.

        Raises `AddressError`.
        """
        ips = [ip_address(ip_of(addr)) for addr in self._host.bound_addrs]
        mine = [ip for ip in ips if ip.version == family]
        if not mine or self._nursery is None:
            raise AddressError(f"it does not listen on IPv{family}")
        everywhere = "0.0.0.0" if family == 4 else "::"
        host = str(mine[0]) if all(ip.is_loopback for ip in mine) else everywhere
        first = await self._network.listen(tcp_addr(host, 0))
        try:
            second = await self._network.listen(tcp_addr(host, 0))
        except AddressError:
            first.close()
            raise
        self._listeners[family] = (first, second)
        for index, listener in enumerate((first, second)):
            self._nursery.start_soon(self._accept, self._nursery, listener, index)
        return first, second

    async def _accept(self, nursery: trio.Nursery, listener: Listener, index: int) -> None:
        while True:
            try:
                pipe = await listener.accept()
            except PipeBroken:
                return
            if self._sockets >= self._limits.echo_sockets:
                pipe.reset()
                continue
            self._sockets += 1
            nursery.start_soon(self._answer_question, pipe, index)

    async def _answer_question(self, pipe: Pipe, index: int) -> None:
        try:
            with trio.move_on_after(self._limits.echo_s):
                question = await receive_exactly(pipe, echo.QUESTION_BYTES)
                key = self._keys.get(echo.key_id_of(question))
                if key is None or index in key.used or key.until <= trio.current_time():
                    raise RemoteProtocolError("an echo question without a key that is still good")
                said = echo.answer(question, key.key, index, pipe.remote)
                key.used.append(index)
                if len(key.used) == 2:
                    del self._keys[echo.key_id_of(question)]
                await send_all(pipe, said)
                self.answered += 1
            with trio.move_on_after(self._limits.echo_hold_s):
                await receive_end(pipe)
        except MycelError as error:
            log.debug("an echo connection from %s ended: %s", pipe.remote, error)
        finally:
            self._sockets -= 1
            pipe.close()


def _drop(early: dict[int, Pipe]) -> None:
    for pipe in early.values():
        pipe.close()
    early.clear()


_ENCODER = msgspec.msgpack.Encoder()
_WISHES = msgspec.msgpack.Decoder(echo.Wish)
_OFFERS = msgspec.msgpack.Decoder(echo.Offer)
