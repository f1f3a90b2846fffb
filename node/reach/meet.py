"""Two peers meet: each dials and accepts on one fresh port, until a socket is proven and chosen.

A `Doorstep` is such a port, one for each address family this machine has. It may be dialled from before, to
learn its mapping from an echo: a NAT that keeps one public port for one local port then shows the other peer
the address that the echo saw.

Where both dial at the same moment, the packets cross and TCP opens from both ends (RFC 9293, section 3.5).
Where one is late, the other's first packet may be thrown away or answered with a reset by a NAT that does not
expect it; the late one's packet then finds the way open. So a refused dial is repeated at once and again, and
a silent one is left to the kernel, which repeats it by itself.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import trio
from multiaddr import Multiaddr

from mycel.node.reach.exchange import receive_exactly, send_all
from mycel.protocol.address import endpoint_of
from mycel.protocol.errors import AddressError, DialError, PipeBroken, RemoteProtocolError
from mycel.protocol.limits_reach import PunchLimits
from mycel.protocol.network import Listener, Network, Pipe
from mycel.protocol.proof import CHOSEN, Proof, Stranger

FAMILIES = ("/ip4/0.0.0.0/tcp/0", "/ip6/::/tcp/0")


class Doorstep:
    """A fresh port of each family, to dial from and to accept on. Use `close`."""

    def __init__(self, listeners: Sequence[Listener]) -> None:
        self.listeners = listeners

    @classmethod
    async def bind(cls, network: Network) -> Doorstep:
        """A doorstep in every family this machine has. Raises `AddressError` where it has none."""
        listeners: list[Listener] = []
        failure: AddressError | None = None
        for family in FAMILIES:
            try:
                listeners.append(await network.listen(Multiaddr(family), shared=True))
            except AddressError as error:
                failure = error
        if failure is not None and not listeners:
            raise failure
        return cls(listeners)

    def beside(self, host: str) -> Multiaddr | None:
        """The local address from which `host` (an IP address) is dialled; None without that family."""
        for listener in self.listeners:
            if (":" in endpoint_of(listener.addr).host) == (":" in host):
                return listener.addr
        return None

    def close(self) -> None:
        """Stop accepting. Connections live on."""
        for listener in self.listeners:
            listener.close()


Taker = Callable[[Pipe], Awaitable[None]]


class Meeting:
    """Dials and accepts on a doorstep, and hands every socket to `take`, which must end or keep it."""

    def __init__(self, doorstep: Doorstep, network: Network, take: Taker, limits: PunchLimits) -> None:
        self._doorstep = doorstep
        self._network = network
        self._take = take
        self._limits = limits
        self._taken = 0
        self.turned_away = 0
        """Sockets that came in when too many were in proof."""

    async def run(self, targets: Sequence[str]) -> None:
        """Until cancelled."""
        async with trio.open_nursery() as nursery:
            for listener in self._doorstep.listeners:
                nursery.start_soon(self._accept, listener, nursery)
            for target in targets:
                nursery.start_soon(self._dial, target)

    async def _accept(self, listener: Listener, nursery: trio.Nursery) -> None:
        while True:
            try:
                pipe = await listener.accept()
            except PipeBroken:
                return
            if self._taken >= self._limits.sockets:
                self.turned_away += 1
                pipe.reset()
                continue
            nursery.start_soon(self._hand, pipe)

    async def _dial(self, target: str) -> None:
        local = self._doorstep.beside(endpoint_of(target).host)
        pause = self._limits.redial_s
        for _ in range(self._limits.redials if local is not None else 0):
            try:
                pipe = await self._network.dial(Multiaddr(target), local=local)
            except (DialError, AddressError):
                # By chance, or two NATs that refuse each other's packets out of step would stay so.
                chance = int.from_bytes(self._network.entropy(2), "big") / 65536
                await trio.sleep(pause * (0.5 + chance))
                pause = min(2 * pause, self._limits.redial_max_s)
            else:
                await self._hand(pipe)

    async def _hand(self, pipe: Pipe) -> None:
        self._taken += 1
        try:
            await self._take(pipe)
        finally:
            self._taken -= 1


class Proving:
    """A meeting of two that share a key. `make_proof` gives the proof for a new socket."""

    def __init__(
        self, doorstep: Doorstep, network: Network, make_proof: Callable[[], Proof], limits: PunchLimits
    ) -> None:
        self._meeting = Meeting(doorstep, network, self._prove, limits)
        self._make_proof = make_proof
        self._limits = limits
        self._chosen: Pipe | None = None
        self._scope = trio.CancelScope()
        self._strangers = 0

    @property
    def strangers(self) -> int:
        """Sockets that were somebody else's."""
        return self._strangers + self._meeting.turned_away

    async def run(self, targets: Sequence[str]) -> Pipe:
        """Dial `targets` and accept until a socket is chosen; its next byte is the handshake's.

        Raises `DialError` when `PunchLimits.window_s` is over; no socket but the chosen one stays open.
        """
        self._scope.deadline = trio.current_time() + self._limits.window_s
        try:
            with self._scope:
                await self._meeting.run(targets)
        except BaseException:  # why: given up from outside; raised again
            if self._chosen is not None:
                self._chosen.reset()
            raise
        if self._chosen is None:
            raise DialError(
                f"no socket between the two ports within {self._limits.window_s:g} s"
                + (f" ({self.strangers} of strangers)" if self.strangers else "")
            )
        return self._chosen

    async def _prove(self, pipe: Pipe) -> None:
        """Exchange proofs on a socket; keep it if it is the one."""
        proof = self._make_proof()
        try:
            with trio.move_on_after(self._limits.proof_s) as patience:
                await send_all(pipe, proof.outgoing)
                while not proof.is_done:
                    proof.receive(await receive_exactly(pipe, proof.needs))
                    patience.deadline = self._scope.deadline  # the other side chooses in its own time
                if self._chosen is None:
                    self._choose(pipe, proof)
        except Stranger:
            self._strangers += 1
        except (PipeBroken, RemoteProtocolError):
            pass  # gone before it was proven: the next one may hold
        finally:
            if self._chosen is not pipe:
                pipe.reset()

    def _choose(self, pipe: Pipe, proof: Proof) -> None:
        """This socket and no other; the side that asks tells the other one."""
        if proof.asks and pipe.try_send(CHOSEN) != len(CHOSEN):
            return  # a fresh socket takes a byte, or it is none
        self._chosen = pipe
        self._scope.cancel()
