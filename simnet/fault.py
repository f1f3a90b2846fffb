"""What goes wrong, when: faults drawn from a seed.

`plan_faults` is pure: options, machine names and a random stream in, a list of faults out. `schedule` puts
them on the internet's timeline. Rates are means of exponential waits over the whole world, so that twice the
machines do not mean twice the trouble unless asked for.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mycel.simnet.internet import Internet
from mycel.simnet.machine import Machine


@dataclass(frozen=True, slots=True)
class FaultOptions:
    """How rough the world is. A wait of infinity means never."""

    from_s: float = 0.0
    until_s: float = 60.0
    """Faults begin in this span of virtual time; those that last are over at its end, too."""
    stall_every_s: float = math.inf
    """A line carries nothing for a while, and then all of it: a mobile link, a congested router."""
    stall_s_max: float = 2.0
    silence_every_s: float = math.inf
    """A machine's packets vanish both ways for a while: a pulled cable."""
    silence_s_max: float = 20.0
    pause_every_s: float = math.inf
    """A machine's programs stand still for a while: a closed lid, a debugger, swapping."""
    pause_s_max: float = 10.0
    cut_every_s: float = math.inf
    """The world falls in two halves for a while; the next cut waits until this one healed."""
    cut_s_max: float = 20.0
    crash_every_s: float = math.inf
    """A machine's programs die for good."""
    vanish_every_s: float = math.inf
    """A machine loses power for good."""
    deaths_max: int = 0
    """Crashes and vanishings together end here."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong at `at` for `seconds` with these machines (a cut: with one side of it)."""

    at: float
    kind: str
    machines: tuple[str, ...]
    seconds: float = 0.0


def plan_faults(options: FaultOptions, machines: Sequence[str], rng: random.Random) -> list[Fault]:
    """All faults of a run, ordered by time. Dead machines get no further faults."""
    lasting = {
        "stall": (options.stall_every_s, options.stall_s_max),
        "silence": (options.silence_every_s, options.silence_s_max),
        "pause": (options.pause_every_s, options.pause_s_max),
        "cut": (options.cut_every_s, options.cut_s_max),
        "crash": (options.crash_every_s, 0.0),
        "vanish": (options.vanish_every_s, 0.0),
    }
    moments = sorted(
        (at, kind)
        for kind, (every_s, _) in lasting.items()
        for at in _moments(options.from_s, options.until_s, every_s, rng)
    )
    alive = list(machines)
    busy_until = dict.fromkeys(machines, 0.0)
    cut_until = 0.0
    plan: list[Fault] = []
    for at, kind in moments:
        seconds = min(rng.random() * lasting[kind][1], options.until_s - at)
        if kind == "cut":
            if at >= cut_until and len(alive) > 1:
                cut_until = at + seconds
                side = sorted(rng.sample(alive, rng.randint(1, len(alive) - 1)))
                plan.append(Fault(at, kind, tuple(side), seconds))
            continue
        free = [name for name in alive if busy_until[name] <= at]
        if kind in ("crash", "vanish"):
            if len(machines) - len(alive) >= options.deaths_max:
                continue
            free = [name for name in free if len(alive) > 1]
        if not free:
            continue
        name = rng.choice(free)
        busy_until[name] = at + seconds
        if kind in ("crash", "vanish"):
            alive.remove(name)
        plan.append(Fault(at, kind, (name,), seconds))
    return plan


def _moments(from_s: float, until_s: float, every_s: float, rng: random.Random) -> Iterator[float]:
    at = from_s
    while every_s < math.inf:
        at += rng.expovariate(1.0 / every_s)
        if at >= until_s:
            return
        yield at


def schedule(net: Internet, plan: Sequence[Fault]) -> None:
    """Let the plan's faults happen, counted from the beginning of trio's clock."""
    for fault in plan:
        machines = [net.machines[name] for name in fault.machines]
        net.timeline.at(fault.at, _begin, net, fault, machines)


def _begin(net: Internet, fault: Fault, machines: list[Machine]) -> None:
    machine = machines[0]
    ends = fault.at + fault.seconds
    if fault.kind == "stall":
        net.trace.note("stall", machine.name, machine.name)
        machine.uplink.stall(fault.seconds)
    elif fault.kind == "silence":
        machine.silence()
        net.timeline.at(ends, machine.silence, False)
    elif fault.kind == "pause":
        machine.pause()
        net.timeline.at(ends, machine.resume)
    elif fault.kind == "cut":
        net.cut(machines, [other for other in net.machines.values() if other not in machines])
        net.timeline.at(ends, net.heal)
    elif fault.kind == "crash":
        machine.crash()
    else:
        machine.vanish()
