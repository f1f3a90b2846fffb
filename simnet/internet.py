"""The internet in memory: machines, the distance between them, and what is cut.

    async with internet(InternetOptions(seed=7)) as net:
        a, b = net.add("a"), net.add("b", link=LinkOptions(latency_s=0.05))
        listener = await SimNetwork(b).listen(Multiaddr("/ip4/0.0.0.0/tcp/0"))

Everything that happens is drawn from the seed and noted in `trace`; invariant checkers watch it. Addresses
are public-looking (11.0.0.0/8 and 2a0a:ffff::/32): nothing here leaves this process.

Networks behind NATs will be packet handlers between a machine and the internet; `find` and `is_cut` are the
two questions they will answer for their machines.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio

from mycel.simnet.check import Checks
from mycel.simnet.clock import Timeline
from mycel.simnet.events import Trace
from mycel.simnet.flow import Flow
from mycel.simnet.link import LinkOptions
from mycel.simnet.machine import Machine

LOOPBACK_LATENCY_S = 25e-6


@dataclass(frozen=True, slots=True)
class BufferOptions:
    """Kernel socket buffers, in bytes: Linux's smallest useful sizes, and room for a long fat path."""

    send_min: int = 256 << 10
    send_max: int = 64 << 20
    receive_min: int = 256 << 10
    receive_max: int = 64 << 20


@dataclass(frozen=True, slots=True)
class InternetOptions:
    """The world's nature, from one seed."""

    seed: int = 0
    link: LinkOptions = field(default_factory=LinkOptions)
    """The line of a machine that is given none of its own."""
    buffers: BufferOptions = field(default_factory=BufferOptions)
    epoch: float = 1_800_000_000.0
    """Calendar time at the start of the run."""


class Internet:
    """Machines and what stands between them."""

    def __init__(self, options: InternetOptions, timeline: Timeline) -> None:
        self.options = options
        self.timeline = timeline
        self.trace = Trace()
        self.checks = Checks(self.trace)
        self.rng = random.Random(f"internet {options.seed}")
        self.machines: dict[str, Machine] = {}
        self.names: dict[str, Sequence[str]] = {}
        """Host names and the IP addresses they resolve to."""
        self._by_ip: dict[str, Machine] = {}
        self._cuts: dict[tuple[str, str], None] = {}
        self._latency: dict[tuple[str, str], float] = {}
        self._holding: dict[Flow, None] = {}
        self._started = trio.current_time()

    def add(self, name: str, *, link: LinkOptions | None = None, ips: Sequence[str] = ()) -> Machine:
        """A new machine, with an IPv4 and an IPv6 address where none are given."""
        if name in self.machines:
            raise ValueError(f"there is a machine called {name} already")
        index = len(self.machines) + 1
        given = ips or (f"11.{index >> 16 & 255}.{index >> 8 & 255}.{index & 255}", f"2a0a:ffff::{index:x}")
        machine = Machine(self, name, given, link or self.options.link)
        self.machines[name] = machine
        for ip in given:
            self._by_ip[ip] = machine
        return machine

    def find(self, ip: str) -> Machine | None:
        """The machine that answers to `ip`."""
        return self._by_ip.get(ip)

    def latency(self, a: Machine, b: Machine) -> float:
        """One-way seconds between two machines."""
        if a is b:
            return LOOPBACK_LATENCY_S
        fixed = self._latency.get((min(a.name, b.name), max(a.name, b.name)))
        return a.link.latency_s + b.link.latency_s if fixed is None else fixed

    def set_latency(self, a: Machine, b: Machine, seconds: float) -> None:
        """Fix the one-way latency of a pair, for connections made from now on."""
        self._latency[min(a.name, b.name), max(a.name, b.name)] = seconds

    def is_cut(self, a: Machine, b: Machine) -> bool:
        """Whether nothing passes between two machines now."""
        if not (a.is_on and b.is_on):
            return True
        if a is b:
            return False
        return a.is_silent or b.is_silent or (min(a.name, b.name), max(a.name, b.name)) in self._cuts

    def cut(self, side: Iterable[Machine], other: Iterable[Machine]) -> None:
        """Let nothing pass between two groups of machines until `heal`."""
        others = list(other)
        for a in side:
            for b in others:
                self.trace.note("cut", a.name, b.name)
                self._cuts[min(a.name, b.name), max(a.name, b.name)] = None

    def heal(self) -> None:
        """Undo every `cut`. Bytes in flight come with their next retransmission."""
        self.trace.note("heal", "", "")
        self._cuts.clear()
        self.retry_held()

    def hold(self, flow: Flow) -> None:
        """`flow` met a cut and waits for it to heal."""
        self._holding[flow] = None

    def let_go(self, flow: Flow) -> None:
        """`flow` got through."""
        self._holding.pop(flow, None)

    def retry_held(self) -> None:
        """Something healed: whoever waits will find out at the next retransmission."""
        for flow in self._holding:
            if not self.is_cut(flow.source, flow.target):
                flow.retry()

    def wall(self) -> float:
        """Calendar seconds: the epoch and the time since the run began."""
        return self.options.epoch + trio.current_time() - self._started


@asynccontextmanager
async def internet(options: InternetOptions | None = None) -> AsyncIterator[Internet]:
    """An internet that lives as long as the block. What runs on its machines is the caller's to stop."""
    async with trio.open_nursery() as nursery:
        timeline = Timeline()
        await nursery.start(timeline.run)
        net = Internet(options or InternetOptions(), timeline)
        yield net
        net.checks.at_end(net.machines.values())
        nursery.cancel_scope.cancel()
