"""Dial-backs at work: `DialBack` asks for them, and does them for other members within bounds.

The wire is `mycel.protocol.dialback`. What an outcome is worth is decided in `mycel.node.reach.verdict`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import trio
from multiaddr import Multiaddr

from mycel.node.host import Host
from mycel.node.reach.outward import ip_of
from mycel.protocol import dialback, varint
from mycel.protocol.address import endpoint_of, tcp_addr
from mycel.protocol.delimited import receive_prefixed
from mycel.protocol.dialback import Call, CallBy, Knock, Outcome, Request
from mycel.protocol.errors import AddressError, MycelError
from mycel.protocol.limits_reach import DEFAULT_REACH_LIMITS, ReachLimits
from mycel.protocol.mesh import Access, PathKind, PeerId, Stream
from mycel.protocol.network import Network

log = logging.getLogger("mycel.reach")

ASKERS_MAX = 1024
"""Peers whose last request is remembered."""


class DialBack:
    """The dial-backs of one node."""

    def __init__(self, host: Host, network: Network, limits: ReachLimits = DEFAULT_REACH_LIMITS) -> None:
        self._host = host
        self._network = network
        self._limits = limits
        self._last: dict[PeerId, float] = {}
        self._busy = 0
        self.done = 0
        """Dial-backs done for others."""

    def serve(self) -> None:
        """From now on do them for members."""
        self._host.serve_stream(dialback.PROTOCOL, self._answer)

    # Asking

    async def knock(self, peer: PeerId, addrs: Sequence[Multiaddr]) -> Outcome:
        """Have `peer` dial one of `addrs` and hang up. Never raises: a failure is an outcome too."""
        return await self._ask(peer, Knock(_texts(addrs)))

    async def call_by(self, peer: PeerId, witness: PeerId, addrs: Sequence[Multiaddr]) -> Outcome:
        """Have `witness`, whom `peer` is connected with, connect to this node. Never raises."""
        return await self._ask(peer, CallBy(witness, _texts(addrs)))

    async def _ask(self, peer: PeerId, request: Request) -> Outcome:
        seconds = self._limits.dialback_s
        try:
            with trio.fail_after(seconds):
                stream = await self._host.open_stream(peer, dialback.PROTOCOL)
                try:
                    await stream.send(varint.prefixed(dialback.write(request)), end=True)
                    raw = await receive_prefixed(stream, self._limits.dialback_message_bytes)
                    return dialback.read_outcome(raw)
                finally:
                    stream.reset()
        except trio.TooSlowError:
            return Outcome(why=f"no word of it within {seconds:g} s")
        except MycelError as error:
            return Outcome(why=str(error)[: dialback.TEXT_MAX])

    # Answering

    async def _answer(self, stream: Stream) -> None:
        with trio.move_on_after(self._limits.dialback_s):
            raw = await receive_prefixed(stream, self._limits.dialback_message_bytes)
            request = dialback.read_request(raw)
            refusal = self._refusal(stream.peer)
            if refusal:
                outcome = Outcome(why=refusal)
            else:
                self._busy += 1
                try:
                    outcome = await self._do(stream.peer, request)
                finally:
                    self._busy -= 1
            await stream.send(varint.prefixed(dialback.write(outcome)), end=True)
            return
        stream.reset()

    def _refusal(self, peer: PeerId) -> str:
        """Why a request of `peer` is not done now; "" where it is."""
        now = trio.current_time()
        last = self._last.pop(peer, None)
        self._last[peer] = now
        if len(self._last) > ASKERS_MAX:
            del self._last[next(iter(self._last))]
        if self._busy >= self._limits.dialbacks:
            return "too many dial-backs are under way; ask again in some seconds"
        if last is not None and now - last < self._limits.dialback_every_s:
            return f"asked too often; once in {self._limits.dialback_every_s:g} s will do"
        return ""

    async def _do(self, asker: PeerId, request: Request) -> Outcome:
        self.done += 1
        if isinstance(request, Call):
            return await self._call(PeerId(request.peer), request.addrs)
        info = self._host.peers.get(asker)
        seen = ip_of(info.addr) if info is not None and info.path is PathKind.DIRECT else ""
        addrs = [addr for addr in request.addrs if seen and _is_tcp_at(addr, seen)]
        if not addrs:
            return Outcome(why=f"none of the addresses is where you are seen, {seen or 'over a relay'}")
        if isinstance(request, Knock):
            return await self._knock(addrs)
        witness = PeerId(request.witness)
        known = self._host.peers.get(witness)
        if known is None or known.access < Access.MEMBER or witness == asker:
            return Outcome(why="not connected with that witness")
        return await self._ask(witness, Call(asker, tuple(addrs)))

    async def _knock(self, addrs: Sequence[str]) -> Outcome:
        """Dial from a fresh port, as nothing else of this node does."""
        why = ""
        for addr in addrs:
            try:
                with trio.fail_after(self._limits.knock_s):
                    pipe = await self._network.dial(Multiaddr(addr))
            except trio.TooSlowError:
                why = f"{addr}: no answer within {self._limits.knock_s:g} s"
            except MycelError as error:
                why = str(error)
            else:
                pipe.close()
                return Outcome(addr, tried=True)
        return Outcome(why=why[: dialback.TEXT_MAX], tried=True)

    async def _call(self, peer: PeerId, addrs: Sequence[str]) -> Outcome:
        """Connect as a member does, and stay."""
        if peer in self._host.peers or peer == self._host.peer_id:
            return Outcome(why="connected already")
        try:
            wanted = [f"{tcp_addr(ip, port)}/p2p/{peer}" for ip, port in _ends(addrs)]
        except AddressError as error:
            return Outcome(why=str(error)[: dialback.TEXT_MAX])
        try:
            await self._host.connect(wanted, timeout=self._limits.dialback_s / 2)
        except MycelError as error:
            return Outcome(why=str(error)[: dialback.TEXT_MAX], tried=True)
        info = self._host.peers.get(peer)
        return Outcome(str(info.addr) if info is not None else "", why="lost again at once", tried=True)


def _texts(addrs: Sequence[Multiaddr]) -> tuple[str, ...]:
    return tuple(str(addr) for addr in addrs[: dialback.ADDRS_MAX])


def _is_tcp_at(addr: str, ip: str) -> bool:
    """Whether `addr` is a TCP port on `ip`."""
    try:
        return not (end := endpoint_of(addr)).is_name and end.host == ip and end.port > 0
    except AddressError:
        return False


def _ends(addrs: Sequence[str]) -> list[tuple[str, int]]:
    """Hosts and ports. Raises `AddressError` for what is no TCP address on an IP address."""
    ends = [endpoint_of(addr) for addr in addrs]
    if any(end.is_name for end in ends):
        raise AddressError("a dial-back goes to IP addresses only")
    return [(end.host, end.port) for end in ends]
