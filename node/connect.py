"""Getting connected: from addresses to a peer whose membership is settled.

An address is dialled by the transport of its kind: TCP through the network, a relayed one through whatever
was registered for it (`Host.carry_circuits`). All addresses of a peer race each other (`dialer.Race`); one
dial per peer is under way at a time, and whoever asks meanwhile gets its result.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Protocol

import trio
from multiaddr import Multiaddr

from mycel.node.counters import Counters
from mycel.node.dialer import Race, Stagger
from mycel.node.link import Link
from mycel.node.roster import Roster
from mycel.protocol.address import is_circuit, peer_of
from mycel.protocol.errors import (
    AddressError,
    ConnectionLost,
    DeadlineExceeded,
    DialError,
    MycelError,
    Refused,
)
from mycel.protocol.limits import Limits
from mycel.protocol.mesh import PeerId
from mycel.protocol.network import Network, Pipe

CircuitDial = Callable[[Multiaddr], Awaitable[Pipe]]
"""Opens a pipe to the peer behind a relayed address. Raises `DialError`; cleans up when cancelled."""


class Beginner(Protocol):
    """What the connector needs of the host."""

    limits: Limits
    counters: Counters

    @property
    def bound_addrs(self) -> Sequence[Multiaddr]: ...

    def begin(self, pipe: Pipe, *, expected: PeerId | None, dialer: bool) -> Link: ...


class Connector:
    """The dials of one host."""

    def __init__(self, host: Beginner, network: Network, roster: Roster) -> None:
        self._host = host
        self._network = network
        self._roster = roster
        self._stagger = Stagger()
        self._dialing: dict[PeerId, trio.Lock] = {}
        self.dial_circuit: CircuitDial | None = None
        """Dials relayed addresses, where this host can."""

    async def connect(self, addrs: Sequence[Multiaddr | str], timeout: float | None) -> PeerId:
        """See `Mesh.connect`."""
        parsed = [Multiaddr(addr) if isinstance(addr, str) else addr for addr in addrs]
        wanted = [peer for addr in parsed if (peer := peer_of(addr)) is not None]
        limits = self._host.limits
        seconds = timeout if timeout is not None else limits.dial_s + limits.handshake_s + limits.membership_s
        try:
            with trio.fail_after(seconds):
                if len(set(wanted)) != 1:
                    return await self._dial(parsed, None)
                lock = self._dialing.setdefault(wanted[0], trio.Lock())
                try:
                    async with lock:
                        return await self._dial(parsed, wanted[0])
                finally:
                    if not lock.locked():
                        self._dialing.pop(wanted[0], None)
        except trio.TooSlowError:
            raise DialError(f"no connection to {', '.join(map(str, addrs))} within {seconds:g} s") from None

    async def settle(self, link: Link) -> PeerId:
        """Park until the peer behind an open link is up. Raises `Refused`, `DialError`."""
        while link.peer not in self._roster.peers:
            if link.lost is not None and self._roster.get(link.peer) is None:
                raise link.failure if isinstance(link.failure, Refused) else _as_dial_error(link.lost)
            await self._roster.changed.park()
        return link.peer

    async def _dial(self, addrs: Sequence[Multiaddr], wanted: PeerId | None) -> PeerId:
        if wanted is not None and wanted in self._roster.peers:
            await trio.lowlevel.checkpoint()
            return wanted
        try:
            link = await self._race(addrs, wanted)
        except DialError:
            self._host.counters.dials_failed += 1
            raise
        if link is None:
            assert wanted is not None, "nobody else ends a race"
            return wanted
        return await self.settle(link)

    async def _race(self, addrs: Sequence[Multiaddr], wanted: PeerId | None) -> Link | None:
        """The first link that opens; None once `wanted` is up by other means, as when it dials this node."""
        direct_first = sorted(self._elsewhere(addrs), key=is_circuit)
        own: list[Link] = []
        race = Race(direct_first, partial(self._attempt, begun=own), self._stagger, self._spare)
        link: Link | None = None
        failure: MycelError | None = None
        async with trio.open_nursery() as nursery:
            if wanted is not None:
                nursery.start_soon(self._await_other, wanted, own, nursery.cancel_scope)
            try:
                link = await race.run()
            except MycelError as error:  # a nursery would make a group of it
                failure = error
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure
        return link

    async def _await_other(self, wanted: PeerId, own: Sequence[Link], race: trio.CancelScope) -> None:
        """End the race once `wanted` is up over a link that is none of the race's `own`."""
        while True:
            peering = self._roster.get(wanted) if wanted in self._roster.peers else None
            if peering is not None and any(link not in own for link in peering.links):
                race.cancel()
                return
            await self._roster.changed.park()

    def _elsewhere(self, addrs: Sequence[Multiaddr]) -> Sequence[Multiaddr]:
        """`addrs` without those that this node itself has, as when two homes use the same ones inside; all
        of them where nothing else is left."""
        own = [str(addr) for addr in self._host.bound_addrs]
        return [addr for addr in addrs if str(addr).partition("/p2p/")[0] not in own] or addrs

    def _spare(self, link: Link) -> None:
        """A dial brought a link that nobody waits for any more. Of several, peering gives up all but one."""
        peering = self._roster.get(link.peer)
        if peering is None or len(peering.links) < 2:
            link.end("closed", "the dial was given up")

    async def _attempt(self, addr: Multiaddr, begun: list[Link]) -> Link:
        """Connect to one address, up to a proven peer; notes the link in `begun`."""
        seconds = self._host.limits.dial_s
        try:
            with trio.fail_after(seconds):
                pipe = await self._open(addr)
        except trio.TooSlowError:
            raise DeadlineExceeded(f"no answer within {seconds:g} s") from None
        self._host.counters.dialed += 1
        return await self._shake(pipe, expected=peer_of(addr), dialer=True, begun=begun)

    async def _open(self, addr: Multiaddr) -> Pipe:
        if not is_circuit(addr):
            return await self._network.dial(addr)
        if self.dial_circuit is None:
            raise AddressError(f"{addr} is relayed, and this node uses no relays; give a direct address")
        return await self.dial_circuit(addr)

    async def shake(self, pipe: Pipe, *, expected: PeerId | None, dialer: bool) -> Link:
        """A link over `pipe` with a proven peer. Raises why there is none; cancelled, it gives it up."""
        return await self._shake(pipe, expected=expected, dialer=dialer, begun=[])

    async def _shake(self, pipe: Pipe, *, expected: PeerId | None, dialer: bool, begun: list[Link]) -> Link:
        link = self._host.begin(pipe, expected=expected, dialer=dialer)
        begun.append(link)
        try:
            await link.wait_open()
        except BaseException:  # why: a cancelled dial gives its connection up too; raised again
            link.end("closed", "the dial was given up")
            raise
        return link


def _as_dial_error(lost: ConnectionLost) -> MycelError:
    if lost.reason == "refused":
        return Refused(str(lost), reason="refused")
    return DialError(str(lost))
