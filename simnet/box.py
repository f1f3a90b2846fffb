"""A box on the simulated internet, and the networks that boxes and machines are plugged into.

A `Lan` is one network: the public internet, or the inner side of a box. Whoever is on it answers to
addresses there; what is for nobody on it goes to its gateway. So boxes may stand behind boxes, and two homes
may use the same addresses inside, as most homes of the world do.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import trio

from mycel.simnet.link import Downlink, LinkOptions, Uplink
from mycel.simnet.nat import NatKind, Ruling, Translator
from mycel.simnet.packet import SYN, Packet

if TYPE_CHECKING:
    from mycel.simnet.internet import Internet
    from mycel.simnet.machine import Machine

HOME_NET, CARRIER_NET = "192.168.1", "100.64.0"
"""The first three numbers of every address inside a home, and inside a carrier (RFC 6598)."""


class Lan:
    """One network. `net` is what its addresses begin with, empty for the public internet."""

    def __init__(self, net: str, gateway: Box | None) -> None:
        self.net = net
        self.gateway = gateway
        self.stations: dict[str, Machine | Box] = {}
        self.count = 1

    def is_here(self, ip: str) -> bool:
        """Whether `ip` belongs to this network, so that nobody looks for it elsewhere."""
        return bool(self.net) and ip.startswith(f"{self.net}.")


class Box:
    """A router with one address outside and a network inside: a `Translator` with a line of its own."""

    def __init__(
        self, internet: Internet, name: str, kind: NatKind, at: tuple[Lan, str], link: LinkOptions, net: str
    ) -> None:
        """`at`: the network outside and the address there. `net`: of addresses inside; "": like outside."""
        self.internet = internet
        self.name = name
        self.outside, self.ip = at
        self.link = link
        self.uplink = Uplink(internet.timeline, link.up_bytes_per_s)
        self.downlink = Downlink(link.down_bytes_per_s)
        rng = random.Random(f"{internet.options.seed} box {name}")
        self.translator = Translator(kind, self.ip, rng)
        self.inside = Lan(net, self)
        self.outside.stations[self.ip] = self

    def __repr__(self) -> str:
        return f"<Box {self.name} {self.ip}>"

    def rule(self, packet: Packet, *, from_inside: bool) -> Ruling | None:
        """What becomes of a packet that is here now; None: nothing."""
        opened = self.translator.opened
        handle = self.translator.outward if from_inside else self.translator.inward
        ruling = handle(packet, trio.current_time())
        if self.translator.opened != opened and packet.kind != SYN:
            # A connection that was forgotten is known again: what waits on its other side may come through.
            self.internet.retry_held()
        return ruling

    def new_inner_ip(self) -> str:
        """The next free address for somebody inside. Where nothing is translated, outside it leads here."""
        self.inside.count += 1
        net = self.inside.net or self.ip.rpartition(".")[0]
        ip = f"{net}.{self.inside.count}"
        if not self.inside.net:
            self.outside.stations[ip] = self
        return ip

    def reboot(self) -> None:
        """Lose all memory of who spoke with whom."""
        self.internet.trace.note("reboot", self.name, self.name)
        self.translator.forget()
