"""When to punch and when to go back over a relay: how connections become and stay as good as can be.

Pure: what connections there are and the time come in, steps come out. A peer that is connected over a relay
is punched at once by the one of the two whose turn it is; the other waits a moment for that and then tries
itself. A punch that failed is tried again after a wait that grows fourfold; one that cannot work (two
NATs that leave no address to aim at) waits the longest. A change of this node's network makes all due again.

A peer whose connection died and that is known behind relays is dialled there at once, and again for a few
seconds: whoever has a stream to reopen finds it connected. Then it is a contact like any other. One that said
goodbye is let go.

Everything is bounded by the host's connections: a peer is forgotten when it is gone and no way back is left.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from mycel.protocol.limits_reach import PunchLimits
from mycel.protocol.mesh import PathKind, PeerId

GROWTH = 4.0
FOR_GOOD = ("impossible", "protocol")
"""Failures after which only another network promises better."""


@dataclass(slots=True)
class Standing:
    """How this node stands with a peer. Times are trio's."""

    peer: PeerId
    path: PathKind | None = None
    circuits: tuple[str, ...] = ()
    """Where the peer is reached over relays."""
    leads: bool = True
    """Whether it is this side's turn to punch."""
    punch_s: float = math.inf
    failures: int = 0
    not_before_s: float = -math.inf
    """Also where the relayed connection goes and comes again meanwhile."""
    trouble: str = ""
    """Why the last punch failed."""
    is_punching: bool = False
    return_s: float = math.inf
    returns: int = 0
    is_returning: bool = False


@dataclass(frozen=True, slots=True)
class Punch:
    """Try to get a direct connection to this peer."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class Return:
    """Dial this peer over a relay."""

    peer: PeerId
    circuits: tuple[str, ...]


class UpgradePlan:
    """The table of peers that are, or might be, reached over relays."""

    def __init__(self, limits: PunchLimits) -> None:
        self._limits = limits
        self._table: dict[PeerId, Standing] = {}

    def on_path(
        self, peer: PeerId, path: PathKind, circuits: Iterable[str], now: float, *, leads: bool
    ) -> None:
        """`peer` is connected so; `circuits` are its relayed addresses as far as known now.

        `leads` says whether it is this side's turn to punch; the other one waits for a moment.
        """
        known = tuple(dict.fromkeys(circuits))
        standing = self._table.get(peer)
        if standing is None:
            if path is PathKind.DIRECT and not known:
                return
            standing = self._table[peer] = Standing(peer)
        standing.circuits = known or standing.circuits
        standing.leads = leads
        standing.return_s, standing.returns = math.inf, 0
        if standing.path is path:
            return
        standing.path = path
        if path is PathKind.DIRECT:
            standing.punch_s, standing.not_before_s = math.inf, -math.inf
            standing.failures, standing.trouble = 0, ""
        else:
            turn = 0.0 if leads else self._limits.yield_s
            standing.punch_s = max(now + turn, standing.not_before_s)

    def on_goodbye(self, peer: PeerId) -> None:
        """`peer` went and does not want to be fetched back: it stopped in order, or refused this node."""
        standing = self._table.get(peer)
        if standing is not None:
            standing.path, standing.circuits = None, ()
            standing.punch_s = standing.return_s = math.inf
            self._tidy(standing)

    def on_present(self, peers: Iterable[PeerId], now: float) -> None:
        """Only these are connected now."""
        here = dict.fromkeys(peers)
        for standing in list(self._table.values()):
            if standing.path is not None and standing.peer not in here:
                self._on_down(standing, now)

    def plan(self, now: float) -> list[Punch | Return]:
        """Steps to take now; each stays marked until its end is told."""
        steps: list[Punch | Return] = []
        for standing in self._table.values():
            if standing.punch_s <= now and not standing.is_punching:
                standing.is_punching = True
                steps.append(Punch(standing.peer))
            if standing.return_s <= now and not standing.is_returning:
                standing.is_returning = True
                steps.append(Return(standing.peer, standing.circuits))
        return steps

    def next_s(self) -> float:
        """When `plan` will have something; infinity where an event must come first."""
        due = [one.punch_s for one in self._table.values() if not one.is_punching]
        due += [one.return_s for one in self._table.values() if not one.is_returning]
        return min(due, default=math.inf)

    def on_punched(self, peer: PeerId, now: float) -> None:
        """The punch has succeeded; `on_path` tells the direct path, unless it is lost again already."""
        standing = self._table.get(peer)
        if standing is not None:
            standing.is_punching = False
            relayed = standing.path is PathKind.RELAYED
            standing.punch_s = now + self._limits.again_s if relayed else math.inf

    def on_failed(self, peer: PeerId, reason: str, text: str, now: float, spread: float) -> None:
        """This side's punch failed; `spread` is a random number in [0, 1)."""
        standing = self._table.get(peer)
        if standing is not None:
            standing.is_punching = False
            self._put_off(standing, reason, text, now, spread)

    def on_answered(self, peer: PeerId, reason: str, text: str, now: float, spread: float) -> None:
        """The peer's punch failed; as good as one of this side's."""
        standing = self._table.get(peer)
        if standing is not None and not standing.is_punching:
            self._put_off(standing, reason, text, now, spread)

    def _put_off(self, standing: Standing, reason: str, text: str, now: float, spread: float) -> None:
        standing.trouble = text
        if standing.path is PathKind.DIRECT:
            return
        most = self._limits.again_max_s
        if reason == "busy":
            wait = self._limits.yield_s
        elif reason in FOR_GOOD:
            wait = most
        else:
            wait = min(self._limits.again_s * GROWTH ** min(standing.failures, 16), most)
            standing.failures += 1
        turn = 0.0 if standing.leads else self._limits.yield_s
        standing.not_before_s = now + wait * (0.75 + 0.5 * spread) + turn
        standing.punch_s = standing.not_before_s if standing.path is not None else math.inf
        self._tidy(standing)

    def on_returned(self, peer: PeerId) -> None:
        """The dial over the relay succeeded; the path is told by `on_path`."""
        standing = self._table.get(peer)
        if standing is not None:
            standing.is_returning, standing.return_s = False, math.inf

    def on_not_returned(self, peer: PeerId, now: float, *, refused: bool) -> None:
        """The dial over the relay failed; `refused` where the peer itself said no."""
        standing = self._table.get(peer)
        if standing is None:
            return
        standing.is_returning = False
        standing.returns += 1
        if standing.path is not None:
            standing.return_s = math.inf
        elif refused or standing.returns >= self._limits.returns:
            standing.circuits, standing.return_s = (), math.inf
            self._tidy(standing)
        else:
            standing.return_s = now + self._limits.return_s * 2.0 ** (standing.returns - 1)

    def on_network_changed(self, now: float) -> None:
        """This node's addresses or NAT are others than before: what failed may work now."""
        for standing in self._table.values():
            standing.failures, standing.not_before_s = 0, -math.inf
            if standing.path is PathKind.RELAYED:
                standing.punch_s = now

    def standings(self) -> list[Standing]:
        """All, ordered by peer id. Do not change them."""
        return sorted(self._table.values(), key=lambda one: one.peer)

    def _on_down(self, standing: Standing, now: float) -> None:
        standing.path = None
        standing.punch_s = math.inf
        if standing.circuits:
            standing.return_s, standing.returns = now, 0
        self._tidy(standing)

    def _tidy(self, standing: Standing) -> None:
        """Forget a peer that is gone, with no way back and nothing under way."""
        busy = standing.is_punching or standing.is_returning
        if standing.path is None and not standing.circuits and not busy:
            del self._table[standing.peer]
