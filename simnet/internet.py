"""The internet in memory: machines, the distance between them, and what is cut.

    async with internet(InternetOptions(seed=7)) as net:
        a, b = net.add("a"), net.add("b", link=LinkOptions(latency_s=0.05))
        listener = await SimNetwork(b).listen(Multiaddr("/ip4/0.0.0.0/tcp/0"))

Everything that happens is drawn from the seed and noted in `trace`; invariant checkers watch it. Addresses
are public-looking (11.0.0.0/8 and 2a0a:ffff::/32): nothing here leaves this process.

    home = net.add("h", behind=net.add_nat("box", PORT_RESTRICTED))

A box (`mycel.simnet.nat` has the kinds) is a packet handler between the machines behind it and the network
that it is plugged into, which may be the inside of another box. `add_site` builds a whole way to be
connected.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

import trio

from mycel.simnet.box import CARRIER_NET, HOME_NET, Box, Lan
from mycel.simnet.check import Checks
from mycel.simnet.clock import Timeline
from mycel.simnet.events import Trace
from mycel.simnet.flow import Flow
from mycel.simnet.link import LinkOptions
from mycel.simnet.machine import Machine
from mycel.simnet.nat import KINDS, NatKind
from mycel.simnet.wire import Wire

LOOPBACK_LATENCY_S = 25e-6

HOME_LINE = LinkOptions(latency_s=0.0002)
"""Between a machine and the box of its home, unless told otherwise."""


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
        self.boxes: dict[str, Box] = {}
        self.public = Lan("", None)
        self.wire = Wire(self)
        self._cuts: dict[tuple[str, str], None] = {}
        self._latency: dict[tuple[str, str], float] = {}
        self._holding: dict[Flow, None] = {}
        self._started = trio.current_time()

    def add(
        self,
        name: str,
        *,
        link: LinkOptions | None = None,
        ips: Sequence[str] = (),
        behind: Box | None = None,
    ) -> Machine:
        """A new machine on the internet, or `behind` a box.

        Where no addresses are given it has a public IPv4 and IPv6 one, behind a box an IPv4 one of the
        network inside (a public one behind a box that does not translate).
        """
        if name in self.machines:
            raise ValueError(f"there is a machine called {name} already")
        if behind is None:
            number = len(self.machines) + 1
            ip = f"11.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}"
            lan, line, given = self.public, self.options.link, ips or (ip, f"2a0a:ffff::{number:x}")
        else:
            lan, line, given = behind.inside, HOME_LINE, ips or (behind.new_inner_ip(),)
        machine = Machine(self, name, lan, given, link or line)
        self.machines[name] = machine
        for ip in given:
            lan.stations[ip] = machine
        return machine

    def add_nat(
        self,
        name: str,
        kind: NatKind,
        *,
        behind: Box | None = None,
        link: LinkOptions | None = None,
        net: str = HOME_NET,
    ) -> Box:
        """A new box on the internet, or `behind` another.

        `net`: how addresses inside begin, 192.168.1 in all homes alike unless told otherwise.
        """
        if name in self.boxes:
            raise ValueError(f"there is a box called {name} already")
        if behind is None:
            index = len(self.boxes) + 1
            at = self.public, f"11.{128 + (index >> 8)}.{index & 255}.1"
        else:
            if behind.inside.net == net:
                raise ValueError(f"{name} would have {net}.x on both sides; give the outer box another net")
            at = behind.inside, behind.new_inner_ip()
        self.boxes[name] = Box(
            self, name, kind, at, link or self.options.link, net if kind.translates else ""
        )
        return self.boxes[name]

    def add_site(self, name: str, kind: str, *, homes: int = 1, hairpin: bool = False) -> list[Machine]:
        """Machines that are connected in one of the ways of `KINDS`, all behind the same boxes.

        One machine is called like the site; several have `.0`, `.1`, ... appended.
        """
        box: Box | None = None
        boxes = KINDS[kind]
        for place in reversed(range(len(boxes))):
            nature = replace(boxes[place], hairpin=hairpin)
            net = CARRIER_NET if place else HOME_NET
            line = HOME_LINE if box is not None else None
            box = self.add_nat(f"{name} box {place}", nature, behind=box, net=net, link=line)
        names = [name] if homes == 1 else [f"{name}.{place}" for place in range(homes)]
        return [self.add(one, behind=box) for one in names]

    def latency(self, a: Machine | Box, b: Machine | Box) -> float:
        """One-way seconds between two machines or boxes of one network."""
        if a is b:
            return LOOPBACK_LATENCY_S
        fixed = self._latency.get((min(a.name, b.name), max(a.name, b.name)))
        return a.link.latency_s + b.link.latency_s if fixed is None else fixed

    def set_latency(self, a: Machine | Box, b: Machine | Box, seconds: float) -> None:
        """Fix the one-way latency of a pair on one network, for connections made from now on."""
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
