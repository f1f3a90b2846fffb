"""`mycel sim` and `python -m mycel.simnet`: a scenario from one seed, and what happened in it.

The same seed gives the same trace hash in every process; a failure found with one seed is found again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mycel.simnet import clock
from mycel.simnet.storm import StormOptions, StormReport, storm

if TYPE_CHECKING:
    from mycel.simnet.dieoff import DieoffReport
    from mycel.simnet.lookups import LookupsReport

LAYERS = 8


def main(arguments: Sequence[str]) -> int:
    """Run what the command line asks for; returns the exit status (1: the scenario did not end well).

    Raises `SystemExit` where the command line itself is wrong.
    """
    parser = _parser()
    asked = parser.parse_args(list(arguments))
    began = time.monotonic()
    if asked.scenario == "dht":
        if (
            asked.nodes < 3
            or asked.records < 1
            or asked.reads < 1
            or asked.churn_s < 0
            or asked.churn_nodes < 3
        ):
            parser.error("there must be 3 nodes, a record to put, and a read")
        return _dht(asked, began)
    if asked.scenario == "nat":
        if asked.seeds < 1 or asked.rtt_ms <= 0:
            parser.error("there must be a seed, and a distance: without one nothing can cross on the way")
        return _nat(asked, began)
    report: DieoffReport | StormReport
    if asked.scenario == "swarm":
        asked.deaths = asked.nodes // 3 if asked.deaths is None else asked.deaths
        if asked.nodes < 6 or asked.tokens < 6 or not 0 < asked.deaths < asked.nodes - 1:
            parser.error("a swarm needs at least 6 nodes, 6 tokens, and two nodes that live on")
        report = _swarm(asked)
    else:
        report = clock.run(lambda: storm(StormOptions(asked.seed, asked.nodes, asked.seconds)), asked.seed)
    if asked.json:
        print(json.dumps(dataclasses.asdict(report), indent=1))
    else:
        print("\n".join(_lines(report)))
        print(f"real time      {time.monotonic() - began:.1f} s")
    return 0 if report.went_well else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mycel sim", description=__doc__)
    scenarios = parser.add_subparsers(dest="scenario", required=True)
    swarm = scenarios.add_parser(
        "swarm", help="daemons join, run a generation, and lose a third of themselves in the middle"
    )
    swarm.add_argument("--nodes", type=int, default=30, help="daemons in all (default 30)")
    swarm.add_argument("--deaths", type=int, help="how many die (default: a third)")
    swarm.add_argument(
        "--last-copies",
        action="store_true",
        help="who dies is the only holder of its layers; survivors take them",
    )
    swarm.add_argument("--tokens", type=int, default=24, help="tokens to generate (default 24)")
    rough = scenarios.add_parser("storm", help="bare machines chat while everything goes wrong")
    rough.add_argument("--nodes", type=int, default=12, help="machines (default 12)")
    rough.add_argument("--seconds", type=float, default=60.0, help="virtual seconds (default 60)")
    nat = scenarios.add_parser(
        "nat", help="nodes behind every kind of NAT call each other; who gets through, how soon directly"
    )
    nat.add_argument("--seeds", type=int, default=3, help="how many seeds, from --seed on (default 3)")
    nat.add_argument(
        "--rtt-ms", type=float, default=40.0, help="round trip between any two sites (default 40)"
    )
    dht = scenarios.add_parser(
        "dht", help="Kademlia nodes put and get records, lose a third of themselves at once, and churn"
    )
    dht.add_argument("--nodes", type=int, default=200, help="nodes (default 200)")
    dht.add_argument("--records", type=int, default=50, help="records put (default 50)")
    dht.add_argument("--reads", type=int, default=200, help="reads in each part (default 200)")
    dht.add_argument(
        "--churn-s",
        type=float,
        default=0.0,
        help="virtual seconds in which nodes come and go, ten minutes each (default 0: none)",
    )
    dht.add_argument("--churn-nodes", type=int, default=60, help="how many come and go (default 60)")
    for scenario in (swarm, rough, nat, dht):
        scenario.add_argument("--seed", type=int, default=0, help="what everything is drawn from (default 0)")
        scenario.add_argument("--json", action="store_true", help="print the report as JSON")
    return parser


def _swarm(asked: argparse.Namespace) -> DieoffReport:
    # These bring torch, which takes seconds to load; a storm and --help should not wait for it.
    from mycel.compute.model.tiny import tiny_llama
    from mycel.simnet.dieoff import DieoffOptions, dieoff

    with tempfile.TemporaryDirectory() as folder:
        layers = asked.nodes - 1 if asked.last_copies else LAYERS
        model = tiny_llama(Path(folder) / "tiny", num_hidden_layers=layers)
        options = DieoffOptions(model, asked.seed, asked.nodes, asked.deaths, asked.tokens)
        if asked.last_copies:  # each node has a layer, and memory for two more
            options = dataclasses.replace(options, layers_per_node=3, last_copies=True)
        return clock.run(lambda: dieoff(options), asked.seed)


def _nat(asked: argparse.Namespace, began: float) -> int:
    from mycel.simnet.reachability import ReachabilityOptions, reachability
    from mycel.simnet.table import table

    reports = []
    for seed in range(asked.seed, asked.seed + asked.seeds):
        options = ReachabilityOptions(seed, asked.rtt_ms / 1000)
        reports.append(clock.run(partial(reachability, options), seed))
    if asked.json:
        print(json.dumps([dataclasses.asdict(report) for report in reports], indent=1))
    else:
        print("\n".join(table(reports)))
        print(f"real time {time.monotonic() - began:.1f} s")
    return 0 if all(report.went_well for report in reports) else 1


def _dht(asked: argparse.Namespace, began: float) -> int:
    from mycel.simnet.lookups import LookupsOptions, lookups, restless

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:5.0f} s  {text}", file=sys.stderr, flush=True)

    options = LookupsOptions(
        asked.seed, asked.nodes, asked.records, asked.reads, asked.churn_s, asked.churn_nodes, say=say
    )
    report = clock.run(partial(lookups, options), asked.seed)
    if options.churn_s:
        reads, deaths = clock.run(partial(restless, options), asked.seed)
        report = dataclasses.replace(report, restless=reads, deaths=deaths)
    if asked.json:
        print(json.dumps(dataclasses.asdict(report), indent=1))
    else:
        print("\n".join(_lines(report)))
        print(f"real time      {time.monotonic() - began:.1f} s")
    return 0 if report.went_well else 1


def _lines(report: DieoffReport | StormReport | LookupsReport) -> list[str]:
    lines = []
    for name, value in dataclasses.asdict(report).items():
        if isinstance(value, dict):
            value = ", ".join(f"{kind.replace('_', ' ')} {count:.6g}" for kind, count in value.items())
        elif isinstance(value, tuple | list):
            value = " ".join(map(str, value))
        elif isinstance(value, float):
            value = f"{value:.3f}"
        lines.append(f"{name.replace('_', ' '):<14} {value}")
    return lines


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
