"""A lab: public hosts and sites of every kind, joined by an internet with latency.

    with Lab() as lab:
        relay = lab.public("relay")
        home = lab.site("a", kind("symmetric"))
        lab.open()
        home.start([...]); home.socket()

A `Site` is one or more homes behind the boxes of its kind. Every home has the address 192.168.1.2 (the second
one .3, and so on) behind a box at 192.168.1.1, in all sites alike, as most homes of the world do: an address
inside says nothing to somebody outside. A carrier's inner side is 100.64.0.0/10 in the same way. Only public
addresses differ, and each site has its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from types import TracebackType

from netlab.boxes import KINDS, Box, Kind, rules
from netlab.internet import RTT_S, Internet
from netlab.space import LabError, Space

HOME_NET, CARRIER_NET = "192.168.1", "100.64.0"


def kind(name: str) -> Kind:
    """The kind of that name, one of `KINDS`."""
    return next(one for one in KINDS if one.name == name)


@dataclass(frozen=True, slots=True)
class Site:
    """A way to be connected, built."""

    name: str
    kind: Kind
    outer: str
    """The public address of the outermost box; of the home itself where there is none."""
    homes: tuple[Space, ...]
    addrs: tuple[str, ...]
    """Of the homes, each on its own interface."""
    boxes: tuple[Space, ...] = field(default=())
    """From the home outwards."""

    @property
    def home(self) -> Space:
        """The first home."""
        return self.homes[0]

    @property
    def addr(self) -> str:
        """The first home's own address."""
        return self.addrs[0]


class Lab:
    """Sites and the internet between them. Leaving the context takes all of it down."""

    def __init__(self, rtt_s: float = RTT_S) -> None:
        self._internet = Internet(rtt_s)
        self._spaces: list[Space] = []
        self.sites: dict[str, Site] = {}

    def __enter__(self) -> Lab:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take everything down. A program inside that has not ended keeps its space until it does."""
        self._internet.close()
        for space in self._spaces:
            space.close()
        self._spaces.clear()

    def open(self) -> None:
        """Let packets flow; every site must have been built."""
        self._internet.open()

    def unknown(self) -> dict[str, int]:
        """Packets that were sent to public addresses that nobody has, by ADDRESS/PROTOCOL NUMBER."""
        return self._internet.unknown()

    def public(self, name: str) -> Site:
        """A host with a public address and nothing before it."""
        return self.site(name, KINDS[0])

    def site(self, name: str, kind: Kind, homes: int = 1) -> Site:
        """So many homes behind the boxes of `kind`. Raises `LabError`."""
        if name in self.sites:
            raise LabError(f"there is a site {name!r} already")
        number = len(self.sites) + 1
        net = f"11.{number >> 8}.{number & 255}"
        if not kind.boxes:
            home = self._space(name)
            self._internet.attach(home, [f"{net}.1"])
            site = Site(name, kind, f"{net}.1", (home,), (f"{net}.1",))
        elif kind.boxes[0].translates:
            site = self._behind(name, kind, f"{net}.1", homes)
        else:
            site = self._walled(name, kind, net, homes)
        self.sites[name] = site
        return site

    def neighbours(self, names: Sequence[str], inner: Box, outer: Box) -> list[Site]:
        """Sites of one home each, every one with an `inner` box of its own, all behind one `outer` box."""
        number = len(self.sites) + 1
        addr = f"11.{number >> 8}.{number & 255}.1"
        carrier = self._box(f"{'+'.join(names)}.carrier", outer, addr)
        self._internet.attach(carrier, [addr])
        self._bridge(carrier, f"{CARRIER_NET}.1")
        sites = []
        for place, name in enumerate(names):
            box = self._box(f"{name}.box", inner, f"{CARRIER_NET}.{place + 2}")
            self._cable(carrier, place, box, "wan", f"{CARRIER_NET}.{place + 2}", f"{CARRIER_NET}.1")
            self._bridge(box, f"{HOME_NET}.1")
            home = self._home(name, box, 0)
            site = Site(name, Kind(name, (inner, outer)), addr, (home,), (f"{HOME_NET}.2",), (box, carrier))
            self.sites[name] = site
            sites.append(site)
        return sites

    def _behind(self, name: str, kind: Kind, outer: str, homes: int) -> Site:
        boxes = []
        addrs = [f"{CARRIER_NET}.2"] * (len(kind.boxes) - 1) + [outer]
        for place, (box, addr) in enumerate(zip(kind.boxes, addrs, strict=True)):
            boxes.append(self._box(f"{name}.box{place}", box, addr))
        self._internet.attach(boxes[-1], [outer])
        self._bridge(boxes[0], f"{HOME_NET}.1")
        for inner, further in pairwise(boxes):
            self._bridge(further, f"{CARRIER_NET}.1")
            self._cable(further, 0, inner, "wan", f"{CARRIER_NET}.2", f"{CARRIER_NET}.1")
        spaces = tuple(self._home(name, boxes[0], place) for place in range(homes))
        return Site(
            name,
            kind,
            outer,
            spaces,
            tuple(f"{HOME_NET}.{place + 2}" for place in range(homes)),
            tuple(boxes),
        )

    def _walled(self, name: str, kind: Kind, net: str, homes: int) -> Site:
        box = self._box(f"{name}.box0", kind.boxes[0], f"{net}.1")
        addrs = tuple(f"{net}.{place + 2}" for place in range(homes))
        self._internet.attach(box, [f"{net}.1", *addrs])
        self._bridge(box, f"{net}.254")
        spaces = []
        for place, addr in enumerate(addrs):
            space = self._space(f"{name}.{place}")
            self._cable(box, place, space, "eth", addr, f"{net}.254")
            spaces.append(space)
        return Site(name, kind, addrs[0], tuple(spaces), addrs, (box,))

    def _home(self, name: str, box: Space, place: int) -> Space:
        space = self._space(f"{name}.{place}")
        self._cable(box, place, space, "eth", f"{HOME_NET}.{place + 2}", f"{HOME_NET}.1")
        return space

    def _space(self, name: str) -> Space:
        space = Space(name)
        self._spaces.append(space)
        # IPv6 chatter (router and neighbour discovery) would be noise in what is counted.
        space.sysctl({"ipv6/conf/all/disable_ipv6": "1", "ipv6/conf/default/disable_ipv6": "1"})
        return space

    def _box(self, name: str, box: Box, outer: str) -> Space:
        space = self._space(name)
        space.sysctl({"ipv4/ip_forward": "1", "ipv4/conf/all/send_redirects": "0"})
        space.command("nft", "-f", "-", text=rules(box, outer))
        return space

    def _bridge(self, box: Space, addr: str) -> None:
        """The inner side of a box: one network that homes are plugged into."""
        batch = f"link add lan type bridge\nlink set lan up\naddr add {addr}/24 dev lan\n"
        box.command("ip", "-batch", "-", text=batch)
        # What stays within the inner network is not the box's business, also where the kernel would ask nft.
        box.sysctl({"bridge/bridge-nf-call-iptables": "0"}, where_there=True)

    def _cable(self, box: Space, place: int, inner: Space, device: str, addr: str, gateway: str) -> None:
        """Plug `inner` into the box's inner network."""
        box.command(
            "ip", "-batch", "-",
            text=f"link add port{place} type veth peer name {device} netns {inner.path}\n"
            f"link set port{place} master lan up\n",
        )  # fmt: skip
        batch = f"link set {device} up\naddr add {addr}/24 dev {device}\nroute add default via {gateway}\n"
        inner.command("ip", "-batch", "-", text=batch)
