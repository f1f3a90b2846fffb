"""What this node is to others, judged from evidence: public, punchable, symmetric or relay-only.

Pure: findings come in, a `Verdict` with its evidence in plain words comes out. Nothing is guessed:

public      somebody connected to this node from an address that it never sent a packet to; or, since in a
            full mesh nobody is left whom it did not, members at different addresses got through from fresh
            ports to a port that this node never dials from, so that no NAT and no firewall knows them there
punchable   nobody unasked gets through, but every destination sees the same port of this node: that can be
            told to a peer, and both dial at the same moment
symmetric   every destination sees another port: only peers that accept from any port can be punched to
relay-only  nobody could say how this node is seen, or not two agree
unknown     nothing is found out yet
local       nobody outside this node's own network is in sight, so there is nothing to find out

One peer can lie. How this node is seen goes by the majority of those who say so, one voice a peer; who was
outvoted is named in the evidence. That somebody connected is seen with this node's own eyes and needs no
vote. Where this node is seen over both IP versions the verdict is about IPv4, which more peers can dial.

`Judge.here` is told the listening addresses; when the public ones among them change, or the majority sees
this node elsewhere, everything found out before is forgotten and `epoch` grows.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from multiaddr import Multiaddr

from mycel.node.reach.outward import ip_of, is_outside, place_of
from mycel.protocol.echo import Mapped
from mycel.protocol.mesh import PeerId

CALLERS_MAX = 8
"""Callers that are remembered as proof."""
KNOCKS_NEEDED = 2
"""Members at different addresses that must get through to a port where nobody unknown called."""
KNOCKS_LOST = 2
"""Peers in a row that must knock in vain before a proof is given up: one may lie, or be cut off itself."""


class Kind(enum.Enum):
    """What this node is to others."""

    LOCAL = "local"
    UNKNOWN = "unknown"
    PUBLIC = "public"
    PUNCHABLE = "punchable"
    SYMMETRIC = "symmetric"
    RELAY_ONLY = "relay-only"


MEANINGS = {
    Kind.LOCAL: "those in its own network call it directly, and nobody outside is in sight",
    Kind.UNKNOWN: "not found out yet; relays make it callable meanwhile",
    Kind.PUBLIC: "others can call it from outside",
    Kind.PUNCHABLE: "others call it through relays, then directly by hole punching",
    Kind.SYMMETRIC: "others call it through relays; directly only those that accept from any port",
    Kind.RELAY_ONLY: "others call it through relays only",
}


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was judged, and why."""

    kind: Kind
    evidence: tuple[str, ...]
    ip: str = ""
    """The address at which most see this node from outside; "" where nobody says, or none has a majority."""
    addrs: tuple[Multiaddr, ...] = ()
    """Where others reach it from outside, without a peer id; only where it is public."""


class Judge:
    """Findings about one node, and the verdict that follows."""

    def __init__(self) -> None:
        self._bound: tuple[Multiaddr, ...] = ()
        self._reports: dict[PeerId, str] = {}
        self._echoes: dict[PeerId, Mapped] = {}
        self._silent: dict[PeerId, str] = {}
        self._callers: dict[PeerId, str] = {}
        self._open: dict[str, dict[PeerId, str]] = {}
        self._shut: dict[str, tuple[PeerId, str]] = {}
        self._vain: list[PeerId] = []
        self._is_outside = False
        self._was = ""
        self.epoch = 0
        """Counts how often everything was forgotten."""

    # Findings

    def here(self, bound: Sequence[Multiaddr]) -> bool:
        """This node listens on `bound` now. True where its place on the internet is another: then all else is
        forgotten. Private addresses that come and go, as with containers, and IPv6 addresses that change
        within their network, are no such news.
        """
        is_first = not self._bound
        before, self._bound = self._places(), tuple(bound)
        if is_first or before == self._places():
            return False
        self._forget()
        return True

    def _places(self) -> list[str]:
        places = [place_of(ip) for ip in self._own_ips if is_outside(ip)]
        return sorted(dict.fromkeys(places))

    def reported(self, reports: Mapping[PeerId, str]) -> bool:
        """`reports` is at which IP address each connected outside peer sees this node ("" where not known).

        True where the majority moved to another address: then all else is forgotten. That cannot be where
        this node has the address itself.
        """
        self._is_outside = self._is_outside or bool(reports)
        self._was = self.ip or self._was
        self._reports = {peer: ip for peer, ip in reports.items() if ip}
        votes = Counter(ip for ip in self._reports.values() if _family(ip) == _family(self._was)).most_common(
            1
        )
        if not self._was or self._was in self._own_ips or not votes:
            return False
        if votes[0][0] == self._was or 2 * votes[0][1] <= len(self._reports):
            return False
        said = self._reports
        self._forget()
        self._is_outside, self._reports = True, said
        return True

    def called(self, peer: PeerId, ip: str) -> None:
        """`peer` connected from `ip`, an outside address that this node never contacted."""
        self._is_outside = True
        self._vain.clear()
        if peer in self._callers or len(self._callers) < CALLERS_MAX:
            self._callers[peer] = ip

    def echoed(self, server: PeerId, seen: Mapped) -> None:
        """An echo server said how it sees one port."""
        self._silent.pop(server, None)
        self._echoes[server] = seen

    def echo_failed(self, server: PeerId, why: str) -> None:
        """It said nothing, or nothing that it proved."""
        if server not in self._echoes:
            self._silent[server] = why

    def knocked(self, peer: PeerId, ip: str, addrs: Sequence[Multiaddr], reached: str, why: str) -> None:
        """`peer`, who is at `ip`, dialled `addrs` from a fresh port.

        `reached` is the one that answered, "" where none did.
        """
        asked = [str(addr) for addr in addrs]
        if reached in asked:
            by = self._open.setdefault(reached, {})
            if peer in by or len(by) < KNOCKS_NEEDED:
                by[peer] = ip
            self._shut.pop(reached, None)
            self._vain.clear()
            return
        for addr in asked:
            if addr not in self._open:
                self._shut[addr] = (peer, why)
        if peer not in self._vain:
            self._vain.append(peer)
        if len(self._vain) >= KNOCKS_LOST:
            self._callers.clear()
            self._open.clear()
            self._vain.clear()

    def closed(self, gone: Sequence[Multiaddr]) -> None:
        """A router does not promise any more that calls to `gone` arrive here."""
        for addr in map(str, gone):
            self._open.pop(addr, None)
            self._shut.pop(addr, None)

    def _forget(self) -> None:
        self.epoch += 1
        self._is_outside, self._was, self._reports = False, "", {}
        for table in (self._echoes, self._silent, self._callers, self._open, self._shut):
            table.clear()
        self._vain.clear()

    # What follows

    @property
    def is_outside(self) -> bool:
        """Whether anybody outside this node's own network is in sight."""
        return self._is_outside

    @property
    def ip(self) -> str:
        """The address at which most see this node from outside; "" where none has a majority."""
        return self._majority()[0]

    @property
    def is_natted(self) -> bool:
        """Whether most see this node at an address that it does not have."""
        ip = self.ip
        return bool(ip) and ip not in self._own_ips

    @property
    def is_proven(self) -> bool:
        """Whether others can call this node, over any IP version."""
        return bool(self._callers) or any(map(self._is_through, self._open))

    @property
    def doubts(self) -> int:
        """Peers in a row that knocked in vain."""
        return len(self._vain)

    @property
    def answers(self) -> int:
        """Echo servers that answered."""
        return len(self._echoes)

    def public_addrs(self) -> list[Multiaddr]:
        """Addresses of this node that lead to it from outside, if anything does."""
        bound = [addr for addr in self._bound if is_outside(ip_of(addr))]
        return [*bound, *(Multiaddr(addr) for addr in self._open if Multiaddr(addr) not in bound)]

    def verdict(self) -> Verdict:
        """What all of this amounts to."""
        ip, outvoted = self._majority()
        evidence = [*self._words_of_calls(), *self._words_of_place(ip, outvoted)]
        family = _family(ip)
        addrs = tuple(addr for addr in self.public_addrs() if not ip or _family(ip_of(addr)) == family)
        called = any(not ip or _family(caller) == family for caller in self._callers.values())
        called = called or any(self._is_through(str(addr)) for addr in addrs)
        if not self._bound:
            return Verdict(Kind.RELAY_ONLY, ("it listens on no address", *evidence), ip)
        if not self._is_outside:
            return Verdict(Kind.LOCAL, ("nobody from outside has connected yet, so nothing was tried",), ip)
        if called and addrs:
            return Verdict(Kind.PUBLIC, tuple(evidence), ip, addrs)
        mapping, words = self._mapping()
        evidence.extend(words)
        if not ip and len(self._reports) + len(self._echoes) > 1:
            return Verdict(Kind.RELAY_ONLY, tuple(evidence), ip)
        return Verdict(mapping, tuple(evidence), ip)

    def _is_through(self, addr: str) -> bool:
        """Whether members at enough different addresses got through to `addr`."""
        return len(set(self._open.get(addr, {}).values())) >= KNOCKS_NEEDED

    @property
    def _own_ips(self) -> Sequence[str]:
        return [ip_of(addr) for addr in self._bound]

    def _voices(self, reports: Mapping[PeerId, str]) -> dict[PeerId, str]:
        """Who says at which address this node is seen: those about IPv4, else those about IPv6."""
        said = {**reports, **{peer: ip_of(seen.first) for peer, seen in self._echoes.items()}}
        return {peer: ip for peer, ip in said.items() if _family(ip) == 4} or said

    def _majority(self) -> tuple[str, Sequence[PeerId]]:
        """Where most see this node, and who says otherwise. An address that this node has wins a draw."""
        voices = self._voices(self._reports)
        votes = Counter(voices.values()).most_common()
        best = [ip for ip, count in votes if count == votes[0][1]]
        winner = next((ip for ip in best if ip in self._own_ips), best[0] if len(best) == 1 else "")
        return winner, [peer for peer, ip in sorted(voices.items()) if winner and ip != winner]

    def _mapping(self) -> tuple[Kind, list[str]]:
        """By the echoes: does every destination see the same port?"""
        ip = self.ip
        good = {peer: seen for peer, seen in self._echoes.items() if not ip or ip_of(seen.first) == ip}
        same = [peer for peer, seen in good.items() if seen.first == seen.second]
        differ = [peer for peer, seen in good.items() if seen.first != seen.second]
        places = Counter(good[peer].first for peer in same).most_common()
        words = [f"two ports of {peer} see it at {good[peer].first}" for peer in same]
        words += [
            f"two ports of {peer} see it at {good[peer].first} and {good[peer].second}" for peer in differ
        ]
        if len(differ) > len(same) or (len(places) > 1 and places[0][1] == 1):
            return Kind.SYMMETRIC, words
        if same:
            return Kind.PUNCHABLE, words
        words += [f"no echo: {why}" for why in self._silent.values()]
        return (Kind.RELAY_ONLY if self._silent else Kind.UNKNOWN), words

    def _words_of_calls(self) -> list[str]:
        words = [
            f"{peer} connected from {ip}, which this node had never contacted"
            for peer, ip in list(self._callers.items())[:2]
        ]
        for addr, by in self._open.items():
            words += [f"{addr} answered {peer}, who dialled it from a fresh port" for peer in by]
        words += [f"{addr} did not answer {peer}: {why}" for addr, (peer, why) in self._shut.items()]
        if self._vain and self.is_proven:
            words.append(f"{self._vain[0]} could not reach it any more; another one is asked")
        return words

    def _words_of_place(self, ip: str, outvoted: Sequence[PeerId]) -> list[str]:
        if not ip:
            if len(self._reports) + len(self._echoes) < 2:
                return []
            said = ", ".join(f"{seen} by {peer}" for peer, seen in sorted(self._reports.items())[:4])
            return [f"peers do not agree where it is seen: {said}; a third public member would decide"]
        where = "has that address itself" if not self.is_natted else "stands behind a NAT"
        words = [f"others see it at {ip}, and it {where}"]
        return [*words, *(f"{peer} says otherwise and is outvoted" for peer in outvoted[:3])]


def _family(ip: str) -> int:
    """The IP version of an address."""
    return 6 if ":" in ip else 4
