"""The kinds of boxes that stand between homes and the internet, and what each does with addresses.

Two questions tell boxes apart (RFC 4787, RFC 5382). *Mapping*: which port outside does a connection from
inside get? `NatKind.key` is that question: connections with the same key share a port. *Filtering*: who may
send to a port outside that somebody inside has used? Beside them: whether the number of the port is kept,
whether who may not come in is told so by a reset, whether two homes behind one box reach each other by its
outer address (hairpin), and how long an idle connection is remembered.

`Translator` is a box's memory and its packet handler, without clock or wires: a packet and the time in, the
packet with other addresses, a reset, or nothing out. `KINDS` are the ways to be connected, as they are built
from real kernels in tests/netns too, under the same names.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass, field
from enum import StrEnum

from mycel.simnet.conntrack import State, Track, may_reopen
from mycel.simnet.packet import RST, SYN, SYN_ACK, Address, Packet


class Mapping(StrEnum):
    """What a connection's port outside depends on, beside its own address inside."""

    ENDPOINT = "endpoint independent"
    PER_ADDRESS = "per peer address"
    PER_PORT = "per peer address and port"


class Filter(StrEnum):
    """Who may send to a port outside that somebody inside has used."""

    ANYBODY = "anybody"
    ADDRESS = "addresses that were written to"
    PORT = "addresses and ports that were written to"


class Ports(StrEnum):
    """Which port outside."""

    KEPT = "the same as inside, where it is free"
    OTHER = "another one, always the same for one address inside"
    RANDOM = "any"


PORT_MIN, PORT_MAX = 1024, 65535
OTHER_MIN, OTHER_COUNT = 32768, 28000
"""Where a renumbering box begins, and among how many ports it chooses."""

DAY_S = 86400.0

Key = tuple[Address | str, ...]


@dataclass(frozen=True, slots=True)
class NatKind:
    """How a box behaves. The defaults are a Linux home router: `masquerade`, and a firewall that drops."""

    mapping: Mapping = Mapping.ENDPOINT
    filter: Filter = Filter.PORT
    ports: Ports = Ports.KEPT
    rejects: bool = False
    """Whether who may not come in gets a reset, instead of silence."""
    translates: bool = True
    """False: a firewall; machines behind it have public addresses."""
    passes_udp: bool = True
    """Nothing in this world speaks UDP, so boxes that differ in this alone behave alike."""
    hairpin: bool = False
    idle_s: float = 5 * DAY_S
    """How long an established connection is remembered without a packet (Linux: five days)."""
    keep_s: float = 3600.0
    """How long a port outside stays with its address inside after the last packet out."""

    def key(self, inside: Address, peer: Address) -> Key:
        """Connections with the same key share a port outside."""
        if self.mapping is Mapping.ENDPOINT:
            return (inside,)
        if self.mapping is Mapping.PER_ADDRESS:
            return inside, peer[0]
        return inside, peer


PORT_RESTRICTED = NatKind()
FULL_CONE = NatKind(filter=Filter.ANYBODY)
ADDRESS_RESTRICTED = NatKind(filter=Filter.ADDRESS)
RENUMBERING = NatKind(ports=Ports.OTHER)
REJECTING = NatKind(rejects=True)
SYMMETRIC = NatKind(mapping=Mapping.PER_PORT, ports=Ports.RANDOM)
UDP_BLOCKED = NatKind(passes_udp=False)
FIREWALL = NatKind(translates=False)

KINDS: dict[str, tuple[NatKind, ...]] = {
    "open": (),
    "full cone": (FULL_CONE,),
    "address": (ADDRESS_RESTRICTED,),
    "port": (PORT_RESTRICTED,),
    "renumbering": (RENUMBERING,),
    "rejecting": (REJECTING,),
    "symmetric": (SYMMETRIC,),
    "carrier": (PORT_RESTRICTED, PORT_RESTRICTED),
    "carrier symmetric": (PORT_RESTRICTED, SYMMETRIC),
    "udp blocked": (UDP_BLOCKED,),
    "firewall": (FIREWALL,),
}
"""The ways to be connected: the boxes from the home outwards."""


@dataclass(slots=True)
class Mapped:
    """A port outside, and whose it is."""

    key: Key
    inside: Address
    outside: Address
    expires: float
    written_to: dict[str, float] = field(default_factory=dict)
    """Addresses that were written to from it, and until when that counts."""
    tracks: dict[Address, Track] = field(default_factory=dict)
    """Its connections, by peer."""


@dataclass(frozen=True, slots=True)
class Ruling:
    """What becomes of a packet: this one goes on, inwards or outwards."""

    packet: Packet
    inwards: bool


class Translator:
    """One box's memory. A packet that gets no ruling is dropped."""

    def __init__(self, kind: NatKind, ip: str, rng: random.Random) -> None:
        self.kind = kind
        self.ip = ip
        self._rng = rng
        self._mapped: dict[Key, Mapped] = {}
        self._owners: dict[Address, Mapped] = {}
        self._tracks: dict[tuple[Address, Address], Track] = {}
        self.opened = 0
        """Connections so far."""

    def outward(self, packet: Packet, now: float) -> Ruling | None:
        """A packet from inside."""
        turns = self.kind.translates and packet.target[0] == self.ip
        if turns and not self.kind.hairpin:
            return self._refuse(packet, inwards=True)
        outside = self._send(packet, now)
        if outside is None:
            return None
        packet = packet._replace(source=outside)
        return self._receive(packet, now, from_inside=True) if turns else Ruling(packet, inwards=False)

    def inward(self, packet: Packet, now: float) -> Ruling | None:
        """A packet from outside."""
        return self._receive(packet, now, from_inside=False)

    def forget(self) -> None:
        """Lose all memory, as in a restart."""
        self._mapped.clear()
        self._owners.clear()
        self._tracks.clear()

    def outside_of(self, inside: Address, peer: Address, now: float) -> Address | None:
        """What `inside` looks like to `peer` now, None where this box knows of no such thing."""
        track = self._tracks.get((inside, peer))
        if track is not None and track.expires > now:
            return track.outside
        mapped = self._mapped.get(self.kind.key(inside, peer))
        return mapped.outside if mapped is not None and mapped.expires > now else None

    # -- one direction each ------------------------------------------------------------------------------

    def _send(self, packet: Packet, now: float) -> Address | None:
        """Follow a packet out; returns its source address outside, None where it is dropped."""
        track = self._known(packet.source, packet.target, packet.kind, now, outward=True)
        if track is None:
            mapped = None if packet.kind in (SYN_ACK, RST) else self._map(packet.source, packet.target, now)
            if mapped is None:
                return None
            track = self._open(mapped, packet.target, packet.kind, from_inside=True)
        if not track.pass_through(packet.kind, True, now, self.kind.idle_s):
            return None
        mapped = self._owners[track.outside]
        mapped.written_to[packet.target[0]] = now + self.kind.keep_s
        mapped.expires = max(mapped.expires, track.expires, now + self.kind.keep_s)
        return track.outside

    def _receive(self, packet: Packet, now: float, *, from_inside: bool) -> Ruling | None:
        """Follow a packet in. What comes from inside, by the outer address, is not filtered."""
        owner = self._owners.get(packet.target)
        known = owner.tracks.get(packet.source) if owner is not None else None
        track = known and self._known(known.inside, known.peer, packet.kind, now, outward=False)
        if track is None:
            owner = self._admit(packet, now, filtered=not from_inside)
            if owner is None or packet.kind in (SYN_ACK, RST):
                return self._refuse(packet, inwards=from_inside)
            track = self._open(owner, packet.source, packet.kind, from_inside=False)
        if not track.pass_through(packet.kind, False, now, self.kind.idle_s):
            return self._refuse(packet, inwards=from_inside)
        owner = self._owners[track.outside]
        owner.expires = max(owner.expires, track.expires)
        return Ruling(packet._replace(target=track.inside), inwards=True)

    def _refuse(self, packet: Packet, *, inwards: bool) -> Ruling | None:
        """A packet that belongs to nothing here. `inwards`: where its sender is."""
        if not self.kind.rejects or packet.kind == RST:
            return None
        return Ruling(packet.answer_reset(), inwards)

    # -- memory ------------------------------------------------------------------------------------------

    def _known(self, inside: Address, peer: Address, kind: str, now: float, *, outward: bool) -> Track | None:
        """The connection that a packet belongs to, None where it begins a new one."""
        track = self._tracks.get((inside, peer))
        if track is None:
            return None
        reopens = kind == SYN and may_reopen(track.state, forward=outward == track.from_inside)
        if track.expires > now and not reopens:
            return track
        mapped = self._owners[track.outside]
        del self._tracks[inside, peer], mapped.tracks[peer]
        if self.kind.mapping is Mapping.PER_PORT and not mapped.tracks:
            self._release(mapped)  # the next connection between the two gets another port
        return None

    def _open(self, mapped: Mapped, peer: Address, kind: str, *, from_inside: bool) -> Track:
        # A connection that is met in mid-stream is taken for established (Linux: nf_conntrack_tcp_loose).
        state = State.SYN_SENT if kind == SYN else State.ESTABLISHED
        track = Track(mapped.inside, mapped.outside, peer, from_inside, state, 0.0)
        self._tracks[mapped.inside, peer] = mapped.tracks[peer] = track
        self.opened += 1
        return track

    def _admit(self, packet: Packet, now: float, *, filtered: bool) -> Mapped | None:
        """Whom a new connection from outside goes to, None where it may not come in."""
        mapped = self._owners.get(packet.target)
        if mapped is None or mapped.expires <= now:
            return None
        if self._known(mapped.inside, packet.source, packet.kind, now, outward=False) is not None:
            return None  # the same two speak through another port: answers could not be told apart
        if not filtered or self.kind.filter is Filter.ANYBODY:
            return mapped
        if self.kind.filter is Filter.ADDRESS and mapped.written_to.get(packet.source[0], 0.0) > now:
            return mapped
        return None

    def _map(self, inside: Address, peer: Address, now: float) -> Mapped | None:
        """The port outside for a new connection, None where all are taken."""
        key = self.kind.key(inside, peer)
        mapped = self._mapped.get(key)
        if mapped is not None:
            if mapped.expires > now:
                return mapped
            self._release(mapped)
        outside = self._free(inside, now) if self.kind.translates else inside
        if outside is None:
            return None
        mapped = Mapped(key, inside, outside, now + self.kind.keep_s)
        self._mapped[key] = self._owners[outside] = mapped
        return mapped

    def _release(self, mapped: Mapped) -> None:
        """A port outside is free again; its connections, if any are left, are over."""
        del self._mapped[mapped.key], self._owners[mapped.outside]
        for peer in mapped.tracks:
            del self._tracks[mapped.inside, peer]

    def _free(self, inside: Address, now: float) -> Address | None:
        """A port outside that nobody has, beginning where the kind of box says."""
        if self.kind.ports is Ports.KEPT:
            first = inside[1]
        elif self.kind.ports is Ports.OTHER:
            first = OTHER_MIN + zlib.crc32(f"{inside[0]}:{inside[1]}".encode()) % OTHER_COUNT
        else:
            first = self._rng.randint(PORT_MIN, PORT_MAX)
        count = PORT_MAX + 1 - PORT_MIN
        for step in range(count):
            outside = (self.ip, first if not step else PORT_MIN + (first - PORT_MIN + step) % count)
            owner = self._owners.get(outside)
            if owner is not None and owner.expires <= now:
                self._release(owner)
                owner = None
            if owner is None:
                return outside
        return None
