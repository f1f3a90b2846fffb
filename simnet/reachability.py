"""Scenario "nat": every way to be connected with every other; who gets through, and how soon directly.

Two sites of each of the eleven kinds (`mycel.simnet.nat.KINDS`), three public machines, and pairs of machines
that share a box: two of one home, two homes of one carrier, each where the box turns packets around (hairpin)
and where it does not. A `Caller` stands at each and joins by ticket; then each of the 66 pairs of kinds
calls once, and each pair that shares a box.

What is possible is not read from a table: before the nodes start, a raw punch that knows both true mappings
tries to get through the same boxes (`mycel.simnet.rawpunch`). It went well when every call came back and just
those pairs ended up directly connected for which that is possible.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

import trio

from mycel.protocol.errors import MycelError
from mycel.protocol.mesh import PathKind
from mycel.simnet.box import CARRIER_NET
from mycel.simnet.caller import Caller
from mycel.simnet.internet import Internet, InternetOptions, internet
from mycel.simnet.link import LinkOptions
from mycel.simnet.machine import Machine
from mycel.simnet.nat import KINDS, PORT_RESTRICTED
from mycel.simnet.network import SimNetwork
from mycel.simnet.rawpunch import echoes, punch

PUBLIC = ("hub", "second", "third")
READY_S = 60.0
"""How long it may take until all sites can be called."""
WATCH_S = 5.0
"""How long a connection is watched for becoming direct: many times what an upgrade takes."""
POLL_S = 0.1

Pair = tuple[str, str]


@dataclass(frozen=True, slots=True)
class ReachabilityOptions:
    """How far apart, and from which seed."""

    seed: int = 0
    rtt_s: float = 0.040
    """Round trip between any two sites; zero would hide every race."""
    kinds: tuple[str, ...] = tuple(KINDS)
    """Which of `KINDS` call each other."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one pair's call."""

    pair: Pair
    call_ok: bool
    first: str
    last: str
    possible: bool
    """Whether they can be connected directly at all."""
    upgrade_s: float | None
    """From the relayed connection to the direct one; None where it was direct at once, or never."""

    @property
    def is_right(self) -> bool:
        """Whether the call came back, and over the best path there is."""
        return self.call_ok and (self.last == PathKind.DIRECT.value) == self.possible


@dataclass(frozen=True, slots=True)
class ReachabilityReport:
    """What happened. Times are virtual seconds."""

    seed: int
    pairs: int
    call_ok: int
    direct_ok: int
    direct_possible: int
    direct_impossible: int
    """Pairs that were connected directly though no raw punch got through: the yardstick would be wrong."""
    upgrade_median_s: float | None
    upgrade_max_s: float | None
    shared_call_ok: int
    shared_direct_ok: int
    shared_direct_possible: int
    outcomes: tuple[Outcome, ...]
    virtual_s: float
    events: dict[str, int]
    trace_hash: str

    @property
    def went_well(self) -> bool:
        """Whether every call came back, over the best path there is."""
        return all(one.is_right for one in self.outcomes)


async def reachability(options: ReachabilityOptions) -> ReachabilityReport:
    """Run it on this trio loop. Raises `trio.TooSlowError` where sites do not become callable."""
    line = LinkOptions(latency_s=options.rtt_s / 4)
    async with internet(InternetOptions(seed=options.seed, link=line)) as net:
        hub, *_ = [net.add(name) for name in PUBLIC]
        pairs = {**_pairs_of_kinds(net, options.kinds), **_pairs_that_share(net)}
        async with echoes(hub) as server:
            possible = await _try_raw(pairs, server)
        async with trio.open_nursery() as nursery:
            callers = await _assemble(net, pairs, nursery)
            outcomes = await _call_all(callers, pairs, possible, options)
            nursery.cancel_scope.cancel()
        return _report(options, net, outcomes)


def _pairs_of_kinds(net: Internet, kinds: Sequence[str]) -> dict[Pair, tuple[Machine, Machine]]:
    """Every unordered pair, a kind with itself included: who of the first's site 0 calls whom of site 1."""
    sites = {(kind, number): net.add_site(f"{kind} {number}", kind)[0] for kind in kinds for number in (0, 1)}
    count = len(kinds)
    pairs: dict[Pair, tuple[Machine, Machine]] = {}
    # Round r pairs kind i with kind i + r, so that in one round every site is in one call.
    for step in range(count // 2 + 1):
        for place in range(count):
            one, two = kinds[place], kinds[(place + step) % count]
            if (two, one) not in pairs:
                pairs[one, two] = sites[one, 0], sites[two, 1]
    return pairs


def _pairs_that_share(net: Internet) -> dict[Pair, tuple[Machine, Machine]]:
    pairs = {}
    for hairpin in (True, False):
        turns = f"hairpin {'on' if hairpin else 'off'}"
        one, two = net.add_site(f"one home, {turns}", "port", homes=2, hairpin=hairpin)
        pairs["one home", turns] = one, two
        carrier = net.add_nat(f"carrier, {turns}", replace(PORT_RESTRICTED, hairpin=hairpin), net=CARRIER_NET)
        homes = []
        for number in (0, 1):
            name = f"one carrier, {turns} {number}"
            homes.append(net.add(name, behind=net.add_nat(name, PORT_RESTRICTED, behind=carrier)))
        pairs["one carrier", turns] = homes[0], homes[1]
    return pairs


async def _try_raw(pairs: dict[Pair, tuple[Machine, Machine]], server: tuple[str, int]) -> dict[Pair, bool]:
    found: dict[Pair, bool] = {}

    async def try_one(pair: Pair, one: Machine, two: Machine) -> None:
        took = await punch(SimNetwork(one), SimNetwork(two), server, inside=True)
        found[pair] = took is not None

    async with trio.open_nursery() as nursery:
        for pair, ends in pairs.items():
            nursery.start_soon(try_one, pair, *ends)
    return found


async def _assemble(
    net: Internet, pairs: dict[Pair, tuple[Machine, Machine]], nursery: trio.Nursery
) -> dict[str, Caller]:
    """All nodes by machine, members of one swarm, each knowing the public ones and callable."""
    homes = dict.fromkeys(machine for ends in pairs.values() for machine in ends)
    callers = {machine.name: Caller(machine, nursery) for machine in net.machines.values()}
    hub, *others = (callers[name] for name in PUBLIC)
    ticket = await hub.found()
    for number, other in enumerate(others):
        await other.join(ticket)
        for before in others[:number]:
            await other.host.connect(before.told)

    async def join(caller: Caller) -> None:
        await caller.join(ticket)
        for other in others:
            await caller.host.connect(other.told)
        if caller.machine.lan is not net.public:
            await _callable(caller)

    with trio.fail_after(READY_S):
        async with trio.open_nursery() as joining:
            for machine in homes:
                joining.start_soon(join, callers[machine.name])
    return callers


async def _callable(caller: Caller) -> None:
    while True:
        if caller.is_callable:
            return
        await trio.sleep(POLL_S)


async def _call_all(
    callers: dict[str, Caller],
    pairs: dict[Pair, tuple[Machine, Machine]],
    possible: dict[Pair, bool],
    options: ReachabilityOptions,
) -> list[Outcome]:
    """Round by round; the seed draws who of a pair calls."""
    rng = random.Random(f"calls {options.seed}")
    outcomes: dict[Pair, Outcome] = {}

    async def call(pair: Pair, ends: Sequence[Caller]) -> None:
        outcomes[pair] = await _call(pair, ends[0], ends[1], possible[pair])

    order = list(pairs)
    for at in range(0, len(order), len(options.kinds)):
        async with trio.open_nursery() as nursery:
            for pair in order[at : at + len(options.kinds)]:
                ends = [callers[machine.name] for machine in pairs[pair]]
                rng.shuffle(ends)
                nursery.start_soon(call, pair, ends)
    return [outcomes[pair] for pair in order]


async def _call(pair: Pair, caller: Caller, callee: Caller, possible: bool) -> Outcome:
    peer = callee.peer_id
    first = "none"
    calls_ok = []
    upgrade_s = None
    try:
        await caller.host.connect(callee.told)
        began = trio.current_time()
        path = caller.path(peer)
        first = "none" if path is None else path.value
        calls_ok.append(await caller.call(peer))
        with trio.move_on_after(WATCH_S):
            while caller.path(peer) is not PathKind.DIRECT:
                await caller.host.links_changed()
            if path is PathKind.RELAYED:
                upgrade_s = trio.current_time() - began
        calls_ok.append(await caller.call(peer))
        calls_ok.append(await callee.call(caller.peer_id))
    except MycelError as error:
        first = f"{first}: {error}"
        calls_ok.append(False)
    last = caller.path(peer)
    agree = last is not None and last is callee.path(caller.peer_id)
    last_name = last.value if agree and last is not None else "none"
    return Outcome(pair, all(calls_ok) and agree, first, last_name, possible, upgrade_s)


def _report(options: ReachabilityOptions, net: Internet, outcomes: Sequence[Outcome]) -> ReachabilityReport:
    kinds = [one for one in outcomes if one.pair[0] in KINDS]
    shared = [one for one in outcomes if one.pair[0] not in KINDS]
    upgrades = [one.upgrade_s for one in kinds if one.upgrade_s is not None]
    direct = PathKind.DIRECT.value
    return ReachabilityReport(
        seed=options.seed,
        pairs=len(kinds),
        call_ok=sum(one.call_ok for one in kinds),
        direct_ok=sum(one.last == direct and one.possible for one in kinds),
        direct_possible=sum(one.possible for one in kinds),
        direct_impossible=sum(one.last == direct and not one.possible for one in outcomes),
        upgrade_median_s=statistics.median(upgrades) if upgrades else None,
        upgrade_max_s=max(upgrades) if upgrades else None,
        shared_call_ok=sum(one.call_ok for one in shared),
        shared_direct_ok=sum(one.last == direct and one.possible for one in shared),
        shared_direct_possible=sum(one.possible for one in shared),
        outcomes=tuple(outcomes),
        virtual_s=trio.current_time(),
        events=dict(sorted(net.trace.counts.items())),
        trace_hash=net.trace.hash,
    )
