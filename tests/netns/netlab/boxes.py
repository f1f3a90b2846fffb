"""The boxes that stand between a home and the internet, as nft rules.

Two questions tell them apart (RFC 4787, RFC 5382). *Mapping*: does a port inside get one port outside, the
same towards everybody, or another one for each destination? *Filtering*: who may answer: anybody, an
address that was written to, or just the address and port that was written to?

    open              no box at all
    full cone         one port outside, anybody may answer
    address           one port outside, addresses that were written to may answer
    port              one port outside, only who was written to may answer; the port outside is the one inside
    renumbering       the same, and the port outside is another one
    rejecting         as `port`, and who may not answer is told so by a TCP reset
    symmetric         another port outside for each destination
    carrier           a `port` box at home behind a `port` box of the provider
    carrier symmetric a `port` box at home behind a symmetric box of the provider
    udp blocked       as `port`, and UDP is dropped
    firewall          no translation: the home has a public address, and only who was written to may answer

A kernel's `masquerade` keeps the port where it can, and lets in what belongs to a connection that it knows:
that is `port`. A cone adds a map, filled by what goes out, of who may come in and to whom it belongs.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Filter(StrEnum):
    """Who may send to a port outside that somebody inside has used."""

    ANYBODY = "anybody"
    ADDRESS = "address"
    PORT = "port"


@dataclass(frozen=True, slots=True)
class Box:
    """One box: between `lan`, where homes are, and `wan`."""

    filter: Filter = Filter.PORT
    is_symmetric: bool = False
    keeps_port: bool = True
    rejects: bool = False
    passes_udp: bool = True
    translates: bool = True
    hairpin: bool = False
    """Whether homes behind this box reach each other by its outer address."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A way to be connected."""

    name: str
    boxes: tuple[Box, ...]
    """From the home outwards."""

    @property
    def is_symmetric(self) -> bool:
        """Whether any box on the way out gives each destination a port of its own."""
        return any(box.is_symmetric for box in self.boxes)


KINDS = (
    Kind("open", ()),
    Kind("full cone", (Box(Filter.ANYBODY),)),
    Kind("address", (Box(Filter.ADDRESS),)),
    Kind("port", (Box(),)),
    Kind("renumbering", (Box(keeps_port=False),)),
    Kind("rejecting", (Box(rejects=True),)),
    Kind("symmetric", (Box(is_symmetric=True),)),
    Kind("carrier", (Box(), Box())),
    Kind("carrier symmetric", (Box(), Box(is_symmetric=True))),
    Kind("udp blocked", (Box(passes_udp=False),)),
    Kind("firewall", (Box(translates=False),)),
)

RENUMBERED = (32768, 28000)
"""First port, and how many, that a renumbering box draws from. (On a little-endian machine the kernel takes
the number's bytes the other way round: another port, and one that serves as well.)"""

_KEYS = {Filter.ANYBODY: "inet_service", Filter.ADDRESS: "ipv4_addr . inet_service"}


def rules(box: Box, outer: str) -> str:
    """The nft script of `box`, whose outer address is `outer`."""
    lines = ["table ip box {", *_maps(box), *_filtering(box)]
    if box.translates:
        lines += [*_incoming(box, outer), *_outgoing(box, outer)]
    return "\n".join([*lines, "}"]) + "\n"


def _maps(box: Box) -> list[str]:
    """Which home a port outside belongs to, as learnt from what went out."""
    lines = []
    if box.filter in _KEYS:
        lines.append(
            f"  map answers {{ type {_KEYS[box.filter]} : ipv4_addr; size 65535; flags dynamic,timeout; "
            "timeout 1h; }"
        )
    if box.hairpin:
        lines.append(
            "  map homes { type inet_service : ipv4_addr; size 65535; flags dynamic,timeout; timeout 1h; }"
        )
    return lines


def _filtering(box: Box) -> list[str]:
    """What may come in: to the box itself (whatever no rule has translated), and through it."""
    refuse = ["meta l4proto tcp reject with tcp reset", "drop"] if box.rejects else ["drop"]
    through = ["iifname lan accept", "ct state established,related accept", "ct status dnat accept"]
    if not box.passes_udp:
        through.insert(0, "meta l4proto udp drop")
    if not box.hairpin and box.translates:
        through.insert(0, "iifname lan oifname lan drop")
    own = ["iifname lo accept", "ct state established,related accept"]
    return [
        *_chain("self", "type filter hook input priority filter", [*own, *refuse]),
        *_chain("through", "type filter hook forward priority filter", [*through, *refuse]),
    ]


def _incoming(box: Box, outer: str) -> list[str]:
    """To whom a new connection from outside goes."""
    statements = []
    if box.filter is Filter.ANYBODY:
        statements.append("iifname wan dnat to tcp dport map @answers")
    elif box.filter is Filter.ADDRESS:
        statements.append("iifname wan dnat to ip saddr . tcp dport map @answers")
    if box.hairpin:
        statements.append(f"iifname lan ip daddr {outer} dnat to tcp dport map @homes")
    return _chain("incoming", "type nat hook prerouting priority dstnat", statements)


def _outgoing(box: Box, outer: str) -> list[str]:
    """What a new connection from inside looks like outside, and what is learnt from it."""
    statements = []
    if box.filter is Filter.ANYBODY:
        statements.append("oifname wan meta l4proto tcp update @answers { tcp sport : ip saddr }")
    elif box.filter is Filter.ADDRESS:
        statements.append("oifname wan meta l4proto tcp update @answers { ip daddr . tcp sport : ip saddr }")
    if box.hairpin:
        statements += [
            "iifname lan meta l4proto tcp update @homes { tcp sport : ip saddr }",
            f"iifname lan oifname lan ct status dnat snat to {outer}",
        ]
    first, count = RENUMBERED
    if box.is_symmetric:
        statements.append("oifname wan masquerade random,fully-random")
    elif box.keeps_port:
        statements.append("oifname wan masquerade")
    else:
        port = f"jhash ip saddr . tcp sport mod {count} offset {first}"
        statements.append(f"oifname wan meta l4proto tcp masquerade to :{port}")
        statements.append("oifname wan masquerade")
    return _chain("outgoing", "type nat hook postrouting priority srcnat", statements)


def _chain(name: str, hook: str, statements: list[str]) -> list[str]:
    return [f"  chain {name} {{", f"    {hook};", *(f"    {one}" for one in statements), "  }"]
