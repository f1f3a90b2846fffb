"""How packets get from one machine to another: over networks and through the boxes between them.

Between two stations of one network a packet takes the latency of their lines. At a box it is shown to the
box's translator when it is there, and goes on as that rules: with other addresses, back as a reset, or not at
all. Nobody knows where a packet will end; it goes as its addresses say. Two machines on the public internet
have nothing between them, and a packet from one to the other is one event.

Data does not cross packet by packet. A connection's `Path` is what its first segment met on the way: latency
and the narrowest lines. When boxes stand on it, each chunk is shown to all of them at the moment of its
arrival (`Crossing`); a chunk that comes out anywhere but at its connection's other end does not count.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import TYPE_CHECKING, NamedTuple

from mycel.simnet.box import Box, Lan
from mycel.simnet.link import Downlink, LinkOptions, Uplink
from mycel.simnet.packet import RST, SYN, Packet

if TYPE_CHECKING:
    from mycel.simnet.internet import Internet
    from mycel.simnet.machine import Machine
    from mycel.simnet.tcp import Opening

NO_NEIGHBOUR_S = 3.0
"""How long a machine looks on its own network for an address that nobody has (Linux: three ARP requests)."""


@dataclass(slots=True)
class Trip:
    """What one packet has met on its way."""

    origin: Machine | None
    """Who sent it; None: a box did."""
    seconds: float = 0.0
    climbed: list[Box] = field(default_factory=list)
    """Boxes that it left through, from the sender outwards."""
    descended: list[Box] = field(default_factory=list)
    """Boxes that it came in through, inwards to the receiver."""
    turned: bool = False
    """Whether a box sent it back inside, from where it came."""

    @property
    def has_boxes(self) -> bool:
        """Whether anything but lines was on the way."""
        return self.turned or bool(self.climbed or self.descended)


class Path(NamedTuple):
    """What a flow needs to know of its way."""

    latency_s: float
    uplink: Uplink
    downlink: Downlink
    links: tuple[LinkOptions, ...]
    """Lines that delay what leaves over them."""
    crossing: Crossing | None = None
    """None where no box is on the way."""


class Wire:
    """Carries packets between the stations of one internet."""

    def __init__(self, internet: Internet) -> None:
        self._internet = internet

    def send(self, packet: Packet, origin: Machine) -> None:
        """Let `packet` leave `origin` now."""
        ip = packet.target[0]
        station = origin if origin.has_ip(ip) else origin.lan.stations.get(ip)
        if station is None or isinstance(station, Box):
            if origin.is_on and not origin.is_silent:
                self._go(packet, Trip(origin), origin.lan, origin)
        elif not self._internet.is_cut(origin, station):
            trip = Trip(origin, self._internet.latency(origin, station))
            self._internet.timeline.after(trip.seconds, self._deliver, station, packet, trip)

    def _go(self, packet: Packet, trip: Trip, lan: Lan, leaving: Machine | Box) -> None:
        """`packet` leaves a station for another on `lan`."""
        station = _next(lan, packet, leaving)
        if station is None:
            self._fail(packet, trip, lan, leaving)
            return
        seconds = self._between(leaving, station, lan)
        trip.seconds += seconds
        if isinstance(station, Box):
            self._internet.timeline.after(seconds, self._cross, station, packet, trip, lan)
        else:
            self._internet.timeline.after(seconds, self._deliver, station, packet, trip)

    def _fail(self, packet: Packet, trip: Trip, lan: Lan, leaving: Machine | Box) -> None:
        """Nobody on `lan` has the address. Private addresses vanish on the internet; it knows no way back."""
        if packet.kind != SYN or packet.sender is None:
            return
        if lan.is_here(packet.target[0]):
            seconds = NO_NEIGHBOUR_S
        elif ip_address(packet.target[0]).is_global:
            seconds = 2 * (trip.seconds + leaving.link.latency_s)
        else:
            return
        self._internet.timeline.after(seconds, packet.sender.on_unreachable)

    def _between(self, a: Machine | Box, b: Machine | Box, lan: Lan) -> float:
        """One-way seconds between two stations of one network; a gateway is at the inner end of its line."""
        if a is lan.gateway:
            return b.link.latency_s
        return a.link.latency_s if b is lan.gateway else self._internet.latency(a, b)

    def _cross(self, box: Box, packet: Packet, trip: Trip, lan: Lan) -> None:
        """`packet` has reached `box` from `lan`."""
        from_inside = lan is box.inside
        ruling = box.rule(packet, from_inside=from_inside)
        if ruling is None:
            self._internet.trace.note(f"{packet.kind} dropped", _name(packet), box.name)
            return
        if ruling.packet.kind == RST and packet.kind != RST:
            self._internet.trace.note(f"{packet.kind} rejected", _name(packet), box.name)
            trip = Trip(None)
        elif from_inside and ruling.inwards:
            trip.turned = True
        elif from_inside:
            trip.climbed.append(box)
        else:
            trip.descended.append(box)
        self._go(ruling.packet, trip, box.inside if ruling.inwards else box.outside, box)

    def _deliver(self, machine: Machine, packet: Packet, trip: Trip) -> None:
        if trip.origin is not None:
            is_lost = self._internet.is_cut(trip.origin, machine)
        else:
            is_lost = not machine.is_on or machine.is_silent
        if not is_lost:
            machine.tcp.receive(packet, trip)

    def paths(self, trip: Trip, near: Opening, far: Opening) -> tuple[Path, Path]:
        """The way of `trip`, which led from `near` to `far`, and the way back."""
        a, b = near.machine, far.machine
        if not trip.has_boxes:
            if a is b:
                inner = Path(trip.seconds, a.inside, a.inside_down, (a.link,))
                return inner, inner
            there = Path(trip.seconds, a.uplink, b.downlink, (a.link,))
            return there, Path(trip.seconds, b.uplink, a.downlink, (b.link,))
        return (
            self._path(trip, (a, *trip.climbed), (b, *trip.descended), Crossing(self, near, far)),
            self._path(trip, (b, *trip.descended), (a, *trip.climbed), Crossing(self, far, near)),
        )

    def _path(
        self, trip: Trip, up: tuple[Machine | Box, ...], down: tuple[Machine | Box, ...], crossing: Crossing
    ) -> Path:
        return Path(
            trip.seconds,
            min((station.uplink for station in up), key=lambda line: line.bytes_per_s),
            min((station.downlink for station in down), key=lambda line: line.bytes_per_s),
            tuple(station.link for station in up),
            crossing,
        )

    def walk(self, packet: Packet, origin: Machine) -> tuple[Machine, Packet] | None:
        """Where `packet` would come out and how it would look there, all boxes met now; None: nowhere.

        A box that answers with a reset sends it; it takes its time as any packet does.
        """
        lan = origin.lan
        station = _next(lan, packet, origin)
        while isinstance(station, Box):
            ruling = station.rule(packet, from_inside=lan is station.inside)
            if ruling is None:
                return None
            lan = station.inside if ruling.inwards else station.outside
            if ruling.packet.kind == RST and packet.kind != RST:
                self._go(ruling.packet, Trip(None), lan, station)
                return None
            packet = ruling.packet
            station = _next(lan, packet, station)
        return None if station is None else (station, packet)


class Crossing:
    """The boxes between two ends of a connection, as one of its flows meets them."""

    def __init__(self, wire: Wire, near: Opening, far: Opening) -> None:
        self._wire = wire
        self._near = near
        self._far = far

    def passes(self, kind: str) -> bool:
        """Whether a chunk that arrives now gets to the other end. Whoever refuses it says so by a reset."""
        near, far = self._near, self._far
        out = self._wire.walk(Packet(kind, near.near, near.far, sender=near), near.machine)
        if out is None:
            return False
        machine, packet = out
        if machine is far.machine and (packet.target, packet.source) == (far.near, far.far):
            return True
        if machine.is_on and not machine.is_silent:
            machine.tcp.refuse(packet)
        return False


def _next(lan: Lan, packet: Packet, leaving: Machine | Box) -> Machine | Box | None:
    """Where a packet goes that enters `lan` from a station of it; None: nobody there would have it."""
    station = lan.stations.get(packet.target[0])
    if station is None and not lan.is_here(packet.target[0]):
        station = lan.gateway
    return station if station is not leaving else None


def _name(packet: Packet) -> str:
    """Where from and where to, for traces."""
    return f"{packet.source[0]}:{packet.source[1]}>{packet.target[0]}:{packet.target[1]}"
