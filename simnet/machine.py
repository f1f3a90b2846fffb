"""A machine on the simulated internet: addresses, ports, listeners, and what can befall it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING

import trio
from multiaddr import Multiaddr

from mycel.protocol.address import tcp_addr
from mycel.protocol.errors import AddressError, PipeBroken
from mycel.simnet.link import Downlink, LinkOptions, Uplink
from mycel.simnet.packet import Address
from mycel.simnet.park import Park
from mycel.simnet.pipe import SimPipe
from mycel.simnet.tcp import Key, Tcp

if TYPE_CHECKING:
    from mycel.simnet.box import Lan
    from mycel.simnet.internet import Internet

BACKLOG = 512
"""Connections that wait to be accepted; the next SYN is dropped and comes again, as on Linux."""

PORTS = range(32768, 61000)
"""Ephemeral ports (Linux's default range)."""

LOOPBACK = ("127.0.0.1", "::1")
ANY = ("0.0.0.0", "::")


class SimListener:
    """A listening port. See `Listener`."""

    def __init__(self, machine: Machine, at: Address, *, shared: bool) -> None:
        self._machine = machine
        self.at = at
        self.shared = shared
        self._backlog: deque[SimPipe] = deque()
        self.coming = 0
        self._news = Park(f"a connection on {at[0]}:{at[1]}")
        self.is_open = True

    @property
    def addr(self) -> Multiaddr:
        """See `Listener.addr`."""
        return tcp_addr(*self.at)

    @property
    def is_full(self) -> bool:
        """Whether the next newcomer is dropped."""
        return len(self._backlog) + self.coming >= BACKLOG

    def admit(self, pipe: SimPipe) -> None:
        """A handshake is complete."""
        self.coming -= 1
        if not self.is_open:
            pipe.reset()
            return
        self._backlog.append(pipe)
        if self._machine.is_running:
            self._news.wake()

    async def accept(self) -> SimPipe:
        """See `Listener.accept`."""
        await trio.lowlevel.checkpoint()
        while self.is_open:
            if self._backlog and self._machine.is_running:
                return self._backlog.popleft()
            await self._news.wait()
        raise PipeBroken(f"the listener on {self.addr} is closed")

    def resume(self) -> None:
        """The machine runs again after a pause."""
        self._news.wake()

    def close(self) -> None:
        """See `Listener.close`."""
        if self.is_open:
            self.is_open = False
            self._machine.forget_listener(self)
            while self._backlog:
                self._backlog.popleft().reset()
            self._news.wake()


class Machine:
    """A computer with one or more addresses and a line to a network: the internet, or the inside of a box."""

    def __init__(
        self, internet: Internet, name: str, lan: Lan, ips: Sequence[str], link: LinkOptions
    ) -> None:
        self.internet = internet
        self.name = name
        self.lan = lan
        self.ips = tuple(ips)
        self.link = link
        self.uplink = Uplink(internet.timeline, link.up_bytes_per_s)
        self.downlink = Downlink(link.down_bytes_per_s)
        self.inside = Uplink(internet.timeline, math.inf)
        self.inside_down = Downlink(math.inf)
        self.is_on = True
        self.is_silent = False
        self.is_paused = False
        self.has_died = False
        """Whether its programs were ever killed."""
        self.tcp = Tcp(self)
        self._listeners: dict[Address, SimListener] = {}
        self._pipes: dict[Key, SimPipe] = {}
        self._programs: list[trio.CancelScope] = []
        self._next_port = 0

    def __repr__(self) -> str:
        return f"<Machine {self.name} {self.ips[0]}>"

    @property
    def is_running(self) -> bool:
        """Whether programs on it do anything."""
        return self.is_on and not self.is_paused

    @property
    def pipes(self) -> Sequence[SimPipe]:
        """Connections that this side has neither closed nor reset."""
        return tuple(self._pipes.values())

    @property
    def listeners(self) -> Sequence[SimListener]:
        """Open listeners."""
        return tuple(self._listeners.values())

    def has_ip(self, ip: str) -> bool:
        """Whether this machine answers to `ip`."""
        return ip in self.ips or ip in LOOPBACK

    def source_ip(self, target: str) -> str:
        """The address from which `target` is dialled: of the same family; loopback from loopback."""
        if target in LOOPBACK:
            return target
        family = [ip for ip in self.ips if (":" in ip) == (":" in target)]
        return family[0] if family else ""

    def free_port(self) -> int:
        """An ephemeral port that nothing here uses. Raises `AddressError` when there is none."""
        used = {at[1] for at in self._listeners}
        used.update(near[1] for near, _ in self._pipes)
        used.update(near[1] for near, _ in self.tcp.openings)
        for _ in PORTS:
            port = PORTS[self._next_port % len(PORTS)]
            self._next_port += 1
            if port not in used:
                return port
        raise AddressError(f"{self.name} has no free port left; close connections first")

    def listen(self, ip: str, port: int, *, shared: bool) -> SimListener:
        """Bind a listener. Raises `AddressError`."""
        if ip not in ANY and not self.has_ip(ip):
            raise AddressError(
                f"cannot listen on {tcp_addr(ip, port)}: Cannot assign requested address; "
                f"{self.name} has {', '.join(self.ips)}"
            )
        at = (ip, port or self.free_port())
        for other in self._listeners:
            same_family = (":" in other[0]) == (":" in ip)
            if other[1] == at[1] and (other[0] == ip or (same_family and (ip in ANY or other[0] in ANY))):
                raise AddressError(
                    f"cannot listen on {tcp_addr(*at)}: Address already in use; free the port or name another"
                )
        listener = SimListener(self, at, shared=shared)
        self._listeners[at] = listener
        return listener

    def listener_at(self, ip: str, port: int) -> SimListener | None:
        """Who would get a connection to `ip`:`port`."""
        anywhere = "::" if ":" in ip else "0.0.0.0"
        return self._listeners.get((ip, port)) or self._listeners.get((anywhere, port))

    def forget_listener(self, listener: SimListener) -> None:
        """The port is free again."""
        self._listeners.pop(listener.at, None)

    def bind(self, wanted: Address | None, target: Address) -> Address:
        """The near address of a dial. Raises `AddressError` when it is taken or not this machine's."""
        ip = self.source_ip(target[0])
        if wanted is None:
            return ip, self.free_port()
        if wanted[0] not in ANY and not self.has_ip(wanted[0]):
            raise AddressError(f"Cannot assign requested address {wanted[0]} on {self.name}")
        near = (ip if wanted[0] in ANY else wanted[0], wanted[1] or self.free_port())
        listener = self.listener_at(*near)
        taken = self.pipe_at((near, target)) is not None or (near, target) in self.tcp.openings
        if taken or (listener is not None and not listener.shared):
            raise AddressError(f"Address already in use: {tcp_addr(*near)}")
        return near

    def pipe_at(self, key: Key) -> SimPipe | None:
        """The connection between two addresses, this machine's own first. One that was reset is none."""
        pipe = self._pipes.get(key)
        return pipe if pipe is not None and not pipe.was_reset else None

    def own_pipe(self, pipe: SimPipe) -> None:
        """A connection has its end here."""
        self._pipes[pipe.near, pipe.far] = pipe

    def forget_pipe(self, pipe: SimPipe) -> None:
        """This side is done with the connection."""
        if self._pipes.get((pipe.near, pipe.far)) is pipe:
            del self._pipes[pipe.near, pipe.far]

    # -- what can befall it ------------------------------------------------------------------------------

    async def run(self, program: Callable[[], Awaitable[None]]) -> None:
        """Run `program` on this machine until it ends, or the machine crashes or vanishes under it."""
        scope = trio.CancelScope()
        self._programs.append(scope)
        try:
            with scope:
                await program()
        except Exception:  # boundary: what a killed program stumbles over while it falls is nobody's failure
            if not scope.cancel_called:
                raise
        finally:
            self._programs.remove(scope)

    def crash(self) -> None:
        """Its programs die and the kernel resets their connections: others notice in one latency."""
        self.internet.trace.note("crash", self.name, self.name)
        self._drop_all("is gone: the program crashed", reset=True)

    def vanish(self) -> None:
        """Power is cut: nothing is said to anybody, and nothing answers until `boot`."""
        self.internet.trace.note("vanish", self.name, self.name)
        self.is_on = False
        self._drop_all("is gone: the machine lost power", reset=False)

    def boot(self) -> None:
        """Power is back. Nothing runs yet; bytes for connections of its former life are reset."""
        self.internet.trace.note("boot", self.name, self.name)
        self.is_on = True
        self.internet.retry_held()

    def silence(self, silent: bool = True) -> None:
        """Let packets to and from it vanish while its programs run on (a pulled cable, a dead router)."""
        self.internet.trace.note("silence" if silent else "unsilence", self.name, self.name)
        self.is_silent = silent
        if not silent:
            self.internet.retry_held()

    def pause(self) -> None:
        """Stop its programs (SIGSTOP, a laptop's lid): the kernel acknowledges, nobody reads or writes.

        Their timers go on, for they are this process's; but nothing of them shows outside.
        """
        self.internet.trace.note("pause", self.name, self.name)
        self.is_paused = True

    def resume(self) -> None:
        """Let its programs go on."""
        self.internet.trace.note("resume", self.name, self.name)
        self.is_paused = False
        for listener in self.listeners:
            listener.resume()
        for pipe in self.pipes:
            pipe.resume()

    def _drop_all(self, why: str, *, reset: bool) -> None:
        self.has_died = True
        for scope in self._programs:
            scope.cancel()
        # In the same breath: what a dying program still wants to say must reach nobody.
        for listener in self.listeners:
            listener.close()
        self.tcp.drop_all(why)
        for pipe in self.pipes:
            pipe.die(why, reset=reset)
