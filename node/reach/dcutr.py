"""DCUtR at work: a direct connection with a foreign libp2p peer that is connected over a relay.

The wire is `mycel.protocol.dcutr`. Where the peer tells a public address of its own, that is dialled first,
as the specification asks. Else both dial and accept on a fresh port; the port's address comes from an echo of
a member, or is the port itself at the address where others see this node.

Who dials in the handshake is the caller's part, but not everybody keeps to it: js-libp2p dials where it was
called, too, and a socket may end at a port where the peer just listens. So both parts listen first, the
caller for a moment, the called for longer, and speak where they hear nothing.

A stranger's addresses are its own word. `may_dial` says which of them are worth a packet; where none is, this
node tells its own addresses, accepts and dials nobody.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial

import trio
from multiaddr import Multiaddr

from mycel.node.dialer import Race
from mycel.node.host import Host
from mycel.node.reach.locate import Located, Locator
from mycel.node.reach.meet import Doorstep, Meeting
from mycel.protocol import dcutr
from mycel.protocol.address import circuit_of, endpoint_of, is_circuit
from mycel.protocol.delimited import receive_prefixed
from mycel.protocol.errors import AddressError, MycelError, RemoteProtocolError, single_failure
from mycel.protocol.limits_reach import DEFAULT_PUNCH_LIMITS, PunchLimits
from mycel.protocol.mesh import Access, PathKind, PeerId, Stream
from mycel.protocol.network import Network, Pipe
from mycel.protocol.punch import PunchFailed

log = logging.getLogger("mycel.reach")

CALLER_S = 0.5
"""How long the dialer by right lets the other end speak first: a packet's way over half the world, twice."""
CALLED_S = 2.0
"""How long the other one waits for it: the same, and the dialer's own patience."""

MayDial = Callable[[PeerId, Multiaddr], bool]
"""Whether an address that a foreign peer names may be dialled."""

Actions = list[dcutr.Say | dcutr.Dial | dcutr.Stop]


class Dcutr:
    """Leads where this node was called through a relay, follows where it called."""

    def __init__(
        self,
        host: Host,
        network: Network,
        locator: Locator,
        may_dial: MayDial,
        limits: PunchLimits = DEFAULT_PUNCH_LIMITS,
    ) -> None:
        """Serves `/libp2p/dcutr` to everybody from now on."""
        self.host = host
        self.network = network
        self.locator = locator
        self.limits = limits
        self._may_dial = may_dial
        self._under_way: dict[PeerId, trio.CancelScope] = {}
        host.serve_stream(dcutr.PROTOCOL, self._follow, access=Access.STRANGER)

    def is_direct(self, peer: PeerId) -> bool:
        """Whether a direct connection to `peer` stands."""
        info = self.host.peers.get(peer)
        return info is not None and info.path is PathKind.DIRECT

    def dialable(self, peer: PeerId, addrs: Sequence[Multiaddr]) -> list[Multiaddr]:
        """Those of `addrs` that are TCP addresses of an IP and may be dialled, without peer id."""
        found: list[Multiaddr] = []
        for addr in addrs:
            with suppress(AddressError):
                end = endpoint_of(addr)
                if not end.is_name and end.port and end.peer in (None, peer) and self._may_dial(peer, addr):
                    found.append(Multiaddr(f"/{end.kind}/{end.host}/tcp/{end.port}"))
        return list(dict.fromkeys(found))[: self.limits.targets]

    async def lead(self, peer: PeerId) -> None:
        """Return once a direct connection to `peer`, which called over a relay, stands.

        Raises `PunchFailed` within bounded time.
        """
        info = self.host.peers.get(peer)
        if info is None or peer in self._under_way:
            raise PunchFailed(f"{peer} is gone or being upgraded already", reason="busy")
        if await self._dial_listening(peer, self.dialable(peer, info.listen_addrs)):
            return
        try:
            stream = await self.host.open_stream(peer, dcutr.PROTOCOL)
        except MycelError as error:
            raise PunchFailed(str(error), reason="lost") from None
        await self._run(stream, called=True)

    async def _dial_listening(self, peer: PeerId, addrs: Sequence[Multiaddr]) -> bool:
        """The unilateral upgrade: dial where the peer says it listens."""

        async def attempt(addr: Multiaddr) -> PeerId:
            return await self.host.adopt(await self.network.dial(addr), expected=peer, dialer=True)

        if addrs:
            with trio.move_on_after(self.limits.plain_s), suppress(MycelError):
                await Race(addrs, attempt).run()
        return self.is_direct(peer)

    async def _follow(self, stream: Stream) -> None:
        info = self.host.peers.get(stream.peer)
        if info is None or not is_circuit(info.addr):
            stream.reset()
            return
        before = self._under_way.get(stream.peer)
        if before is not None:
            before.cancel()  # it begins anew, on a stream of its own
        elif len(self._under_way) >= self.limits.serving:
            stream.reset()
            return
        try:
            await self._run(stream, called=False)
        except PunchFailed as error:
            log.info("no direct connection to %s: %s", stream.peer, error)

    async def _run(self, stream: Stream, *, called: bool) -> None:
        scope = self._under_way[stream.peer] = trio.CancelScope()
        work = Work(self, stream, called=called)
        failure: MycelError | None = None
        try:
            with scope:
                await work.run()
        except MycelError as error:
            failure = error
        except ExceptionGroup as errors:
            failure = single_failure(errors)
            if failure is None:
                raise
        finally:
            if self._under_way.get(stream.peer) is scope:
                del self._under_way[stream.peer]
            stream.reset()
        if not self.is_direct(stream.peer):
            reason = "protocol" if isinstance(failure, RemoteProtocolError) else work.reason
            raise PunchFailed(str(failure or work.text), reason=reason)


class Work:
    """One upgrade at work on its stream."""

    def __init__(self, owner: Dcutr, stream: Stream, *, called: bool) -> None:
        self._owner = owner
        self._stream = stream
        self._called = called
        self._limits = owner.limits
        self._way = trio.CancelScope()
        self.reason = "failed"
        self.text = "the upgrade was given up"

    async def run(self) -> None:
        """Until a direct connection stands, or none will."""
        owner = self._owner
        doorstep = await Doorstep.bind(owner.network)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._watch, nursery.cancel_scope)
                own_ips = owner.network.local_ips()
                info = owner.host.peers.get(self._stream.peer)
                relay = circuit_of(info.addr).relay_peer if info and is_circuit(info.addr) else None
                located: Located = await nursery.start(owner.locator.locate, doorstep, own_ips, relay)
                addrs = [*(Multiaddr(addr) for addr in located.mapped), *owner.host.told_addrs]
                plain = [addr for addr in addrs if not is_circuit(addr)]
                await self._decide(doorstep, plain, nursery)
                nursery.cancel_scope.cancel()
        finally:
            doorstep.close()

    async def _decide(self, doorstep: Doorstep, addrs: Sequence[Multiaddr], nursery: trio.Nursery) -> None:
        now = trio.current_time()
        upgrade = dcutr.Upgrade(called=self._called, addrs=addrs, now=now, limits=self._limits)
        send, events = trio.open_memory_channel[partial[Actions]](8)
        nursery.start_soon(self._read, upgrade, send)
        actions = upgrade.begin(now)
        while True:
            for action in actions:
                if isinstance(action, dcutr.Say):
                    self._way.cancel()
                    await self._stream.send(dcutr.write(action.message))
                elif isinstance(action, dcutr.Dial):
                    self._way = trio.CancelScope()
                    nursery.start_soon(self._go, upgrade, doorstep, action, send)
                else:
                    self.reason, self.text = action.reason, action.text
                    return
            with trio.move_on_at(upgrade.deadline) as patience:
                event = await events.receive()
            actions = upgrade.on_time(trio.current_time()) if patience.cancelled_caught else event()

    async def _watch(self, scope: trio.CancelScope) -> None:
        while not self._owner.is_direct(self._stream.peer):
            await self._owner.host.links_changed()
        scope.cancel()

    async def _read(self, upgrade: dcutr.Upgrade, send: trio.MemorySendChannel[partial[Actions]]) -> None:
        """Messages until the stream ends; its end alone ends nothing, for js-libp2p hangs up early."""
        while True:
            try:
                message = dcutr.read(await receive_prefixed(self._stream, self._limits.message_bytes))
            except RemoteProtocolError as error:
                await send.send(partial(_break_off, error))
                return
            except MycelError:
                return
            await send.send(partial(upgrade.on_message, message, trio.current_time()))

    async def _go(
        self,
        upgrade: dcutr.Upgrade,
        doorstep: Doorstep,
        action: dcutr.Dial,
        send: trio.MemorySendChannel[partial[Actions]],
    ) -> None:
        """Dial and accept; every socket may be the one, and the handshake says which."""
        peer = self._stream.peer

        async def shake(pipe: Pipe) -> None:
            with suppress(MycelError), trio.move_on_after(self._limits.settle_s):
                heard = await _is_heard(pipe, CALLED_S if self._called else CALLER_S)
                await self._owner.host.adopt(pipe, expected=peer, dialer=not heard)

        with self._way:
            await trio.sleep_until(action.at_s)
            targets = [str(addr) for addr in self._owner.dialable(peer, action.addrs)]
            with trio.move_on_after(self._limits.window_s):
                await Meeting(doorstep, self._owner.network, shake, self._limits).run(targets)
            await send.send(partial(upgrade.on_failed, "nobody was met", trio.current_time()))


async def _is_heard(pipe: Pipe, seconds: float) -> bool:
    """Whether the other end speaks first. Raises `PipeBroken`; a cancelled wait ends the pipe."""
    heard = False
    try:
        with trio.move_on_after(seconds):
            await pipe.wait_readable()
            heard = True
    except BaseException:  # why: whoever gives up a socket resets it; raised again
        pipe.reset()
        raise
    return heard


def _break_off(error: RemoteProtocolError) -> Actions:
    raise error
