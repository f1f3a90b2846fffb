"""Every kind with every kind: who gets through, directly or over a relay, and how soon.

A `Stage` is a lab with three public hosts (the hub that founds the swarm, and two more), two sites of each
kind, and pairs of homes that share a box. `possible` finds out by raw punches which pairs can be connected
directly at all. Then a player stands at every site, joins by ticket, and `calls` lets one of each pair call
the other by the addresses that it tells.

In one round every site is in at most one call; the 66 pairs of 11 kinds take six rounds: round r pairs kind i
with kind i + r.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import trio

from netlab.boxes import KINDS, Box, Kind
from netlab.cast import PlayerFailed, Voice
from netlab.lab import Lab, Site
from netlab.probe import knock, posts, punch, tcp
from netlab.space import Space

PUBLIC = ("hub", "second", "third")
READY_S = 30.0
"""How long sites may take to be callable after they have joined."""
POLL_S = 0.1
JOINS_AT_ONCE = 8
DIRECT_S = 20.0
"""How long a connection that can become direct is waited for."""
RELAYED_S = 3.0
"""How long one that cannot is watched all the same: several times what an upgrade takes."""

Pair = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one call."""

    pair: Pair
    """Kinds of the two ends; either may have called."""
    call_ok: bool
    first: str = "none"
    last: str = "none"
    direct_s: float | None = None
    """Seconds from the first connection to the direct one."""
    trouble: str = ""

    @property
    def is_direct(self) -> bool:
        """Whether the pair ended up connected directly."""
        return self.last == "direct"

    @property
    def upgrade_s(self) -> float | None:
        """Seconds from relayed to direct; None where it was not relayed first or did not become direct."""
        return self.direct_s if self.first == "relayed" and self.is_direct else None


class Stage:
    """A lab with places for all players. Use `stage()`."""

    def __init__(self, lab: Lab, kinds: Sequence[Kind], shared: Sequence[tuple[str, bool]]) -> None:
        self.lab = lab
        self.kinds = kinds
        self.can_be_direct: dict[Pair, bool] = {}
        """What `find_possible` found."""
        self.places: dict[str, Space] = {}
        """Where players stand, by name."""
        self.sites: dict[str, Site] = {}
        """The same, as sites."""
        self.shared = [f"{what} hairpin {'on' if hairpin else 'off'}" for what, hairpin in shared]
        for name in PUBLIC:
            self._add(name, lab.public(name))
        for kind in kinds:
            for number in (0, 1):
                self._add(f"{kind.name} {number}", lab.site(f"{kind.name} {number}", kind))
        for name, (what, hairpin) in zip(self.shared, shared, strict=True):
            if what == "one home":
                site = lab.site(name, Kind(name, (Box(hairpin=hairpin),)), homes=2)
                for number, home in enumerate(site.homes):
                    self._add(f"{name} {number}", site, home)
            else:
                for number, site in enumerate(
                    lab.neighbours((f"{name} 0", f"{name} 1"), Box(), Box(hairpin=hairpin))
                ):
                    self._add(f"{name} {number}", site)

    def _add(self, name: str, site: Site, home: Space | None = None) -> None:
        self.sites[name], self.places[name] = site, home or site.home

    def pairs(self) -> list[Pair]:
        """Every unordered pair of kinds, a kind with itself included, in rounds."""
        names = [kind.name for kind in self.kinds]
        count = len(names)
        rounds = [
            [(names[i], names[(i + step) % count]) for i in range(count)] for step in range(count // 2 + 1)
        ]
        if count % 2 == 0:
            rounds[-1] = rounds[-1][: count // 2]
        return [pair for one in rounds for pair in one]

    async def find_possible(self) -> None:
        """Find out by raw punches which pairs can be connected directly (in one home: by its own network)."""
        found = self.can_be_direct
        known, other = self.sites["hub"], self.sites["second"]

        async def ask(pair: Pair) -> None:
            one, two = (self.places[f"{kind} {number}"] for number, kind in enumerate(pair))
            found[pair] = await punch(one, two, (known.addr, 1)) is not None

        async def ask_shared(name: str) -> None:
            await ask((name, name))
            site = self.sites[f"{name} 1"]
            with tcp(self.places[f"{name} 1"]) as listener:
                listener.listen(1)
                inside = (site.addrs[-1], listener.getsockname()[1])
                if len(site.homes) > 1 and await knock(self.places[f"{name} 0"], inside) == "in":
                    found[name, name] = True

        async with posts(known, other), trio.open_nursery() as nursery:
            for pair in self.pairs():
                nursery.start_soon(ask, pair)
            for name in self.shared:
                nursery.start_soon(ask_shared, name)


@contextmanager
def stage(
    kinds: Sequence[Kind] = KINDS, shared: Sequence[tuple[str, bool]] = (), rtt_s: float = 0.040
) -> Iterator[Stage]:
    """A stage, open. `shared`: ("one home" or "one carrier", whether its box turns packets around)."""
    with Lab(rtt_s) as lab:
        built = Stage(lab, kinds, shared)
        lab.open()
        yield built


async def assemble(players: dict[str, Voice], stage: Stage) -> None:
    """Found a swarm, have everybody join it by ticket, and wait until everybody can be called.

    Raises `PlayerFailed`.
    """
    ticket = (await players["hub"].ask("found"))["ticket"]

    async def join(name: str) -> None:
        async with limiter:
            await players[name].ask("join", ticket=ticket)
            await players[name].ask("meet", addrs=met)

    limiter = trio.CapacityLimiter(JOINS_AT_ONCE)

    await players["second"].ask("join", ticket=ticket)
    met = (await players["second"].ask("told"))["addrs"]
    async with trio.open_nursery() as nursery:
        for name in players:
            if name not in PUBLIC[:2]:
                nursery.start_soon(join, name)
    # Somebody whom it never wrote to calls each public host, as happens in a swarm by itself: so it knows.
    home = next(name for name in players if stage.sites[name].kind.boxes)
    for name, player in players.items():
        if name not in PUBLIC[:2] and not stage.sites[name].kind.boxes:
            caller = players[home if name == "third" else "third"]
            await caller.ask("meet", addrs=(await player.ask("told"))["addrs"])
    async with trio.open_nursery() as nursery:
        for name, player in players.items():
            nursery.start_soon(_callable, player, not stage.sites[name].kind.boxes)


async def _callable(player: Voice, is_public: bool) -> None:
    """Return once the player knows that it is public, or tells a relayed address."""
    with trio.move_on_after(READY_S):
        while True:
            told = await player.ask("told")
            is_relayed = any("/p2p-circuit" in addr for addr in told["addrs"])
            if told["kind"] == "public" if is_public else is_relayed:
                return
            await trio.sleep(POLL_S)
    raise PlayerFailed(f"{player.name} is not callable after {READY_S:g} s: {told}; see {player.log}")


async def calls(
    players: dict[str, Voice],
    stage: Stage,
    seed: int,
    *,
    at_once: int,
    heard: Callable[[Outcome], None] = print,
) -> list[Outcome]:
    """Let every pair call, `at_once` pairs at a time; `seed` draws who calls whom and in which order.

    `Stage.find_possible` and `assemble` come before.
    """
    rng = random.Random(seed)
    pairs = [*stage.pairs(), *((name, name) for name in stage.shared)]
    rounds = [pairs[at : at + len(stage.kinds)] for at in range(0, len(pairs), len(stage.kinds))]
    rng.shuffle(rounds)
    outcomes: list[Outcome] = []

    async def one(pair: Pair, flipped: bool) -> None:
        ends = [players[f"{kind} {number}"] for number, kind in enumerate(pair)]
        caller, callee = reversed(ends) if flipped else ends
        async with limiter:
            outcome = await call(pair, caller, callee, DIRECT_S if stage.can_be_direct[pair] else RELAYED_S)
        outcomes.append(outcome)
        heard(outcome)

    limiter = trio.CapacityLimiter(at_once)
    for pairs in rounds:
        async with trio.open_nursery() as nursery:
            for pair in pairs:
                # The first of a pair stands at its kind's site 0, the second at site 1; either may call.
                nursery.start_soon(one, pair, rng.random() < 0.5)
    return outcomes


async def call(pair: Pair, caller: Voice, callee: Voice, watch_s: float) -> Outcome:
    """One call, watched so long for becoming direct; both ends must agree on the path that it ends up on."""
    try:
        told = await callee.ask("told")
        answer = await caller.ask("call", addrs=told["addrs"], watch_s=watch_s)
        there = await callee.ask("path", peer=(await caller.ask("told"))["peer"])
    except PlayerFailed as error:
        return Outcome(pair, False, trouble=str(error))
    last = answer["last"]
    trouble = "" if there["path"] == last else f"{last} for the caller, {there['path']} for the other"
    return Outcome(
        pair, answer["call_ok"] and not trouble, answer["first"], last, answer["direct_s"], trouble
    )
