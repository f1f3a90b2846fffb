"""Kademlia in simulated meshes of growing size: how many reads succeed, how far they go, and what they cost.

The nodes run the daemon's own services over the light mesh of `mycel.simnet`. Latencies are virtual (5 to
80 ms one way, drawn for each pair of nodes), so the figures do not depend on the machine, and one seed gives
the same ones anywhere. For each size: the nodes join, each through a random one, a quarter as many at a time
as there are; records are put, read by others, and read again within the minute after a third of the nodes
fell silent at once (`silent_third_success`, and `silent_third_p99_ratio`: its p99 over the calm one). After
1000 nodes `churn_nodes` others come and go for two virtual hours with sessions of ten minutes (median), half
of them ending in a crash, half in silence (`churn_success`).

`daemons_agree` says whether 50 whole daemons, of which each is connected with all, read like as many nodes of
the light mesh (`mycel.simnet.agreement`); `daemons_...` and `twins_...` are what either world told.

Figures without a number are those of 1000 nodes, others end in theirs (`success_5000`). `curves` holds a row
for each size, its columns are `curves_of`; `law_...` are least-squares lines against log2 of the nodes. All
of it takes a quarter of an hour on one core; --nodes and --churn-s make it shorter. The exit status is 0
only if every promise was kept. `python -m mycel.simnet.curves bench/results/dht.json docs` draws what
docs/scale.md shows.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial

from measure import Figure, report, stopwatch

from mycel.simnet import clock
from mycel.simnet.agreement import AgreementOptions, Told, agreement
from mycel.simnet.curves import law
from mycel.simnet.lookups import LookupsOptions, LookupsReport, lookups, restless

SIZES = (60, 250, 1000, 5000)
MAIN = 1000
READS = 400
RECORDS = 50
CHURN_S = 7200.0
CHURN_NODES = 60
SUCCESS_MIN, SILENT_MIN, CHURN_MIN, RATIO_MAX = 1.0, 0.995, 0.99, 4.0

Figures = dict[str, Figure]

COLUMNS = (
    "nodes",
    "hops_mean",
    "hops_p99",
    "latency_p50_s",
    "latency_p99_s",
    "questions_per_read",
    "bytes_per_read",
    "questions_per_join",
    "bytes_per_join",
    "known",
)


def main() -> None:
    """Run all sizes and the churn; exits 1 where a promise was not kept."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, nargs="+", default=SIZES, help="sizes (default %(default)s)")
    parser.add_argument("--reads", type=int, default=READS, help="in each part (default %(default)s)")
    parser.add_argument(
        "--churn-s", type=float, default=CHURN_S, help="virtual seconds (default %(default)s)"
    )
    parser.add_argument("--churn-nodes", type=int, default=CHURN_NODES, help="default %(default)s")
    parser.add_argument("--daemons", type=int, default=50, help="whole ones; 0: none (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    reports = [_one(asked.seed, size, asked.reads) for size in sorted(asked.nodes) if size <= MAIN]
    with stopwatch() as seconds:
        options = LookupsOptions(
            asked.seed, 0, RECORDS, asked.reads, asked.churn_s, asked.churn_nodes, say=partial(_say, seconds)
        )
        churn, deaths = clock.run(partial(restless, options), asked.seed)
        print(
            f"  churn: {churn.found} of {churn.tried} found, {deaths} deaths ({seconds():.0f} s)", flush=True
        )
    figures: Figures = {
        "churn_success": churn.success,
        "churn_nodes": asked.churn_nodes,
        "churn_reads": churn.tried,
        "churn_deaths": deaths,
        "churn_latency_p99_s": churn.p99_s,
    }
    if asked.daemons:
        figures |= _agree(AgreementOptions(asked.seed, asked.daemons))
    for size in sorted(asked.nodes):
        if size > MAIN:
            report("dht", figures | _all(reports))  # what is known so far: the next size takes a while
            reports.append(_one(asked.seed, size, asked.reads))
    report("dht", figures | _all(reports))
    good = all(_kept(told) for told in reports)
    good = good and figures.get("daemons_agree", True) is True
    sys.exit(0 if good and churn.success >= CHURN_MIN else 1)


def _all(reports: Sequence[LookupsReport]) -> Figures:
    figures: Figures = {}
    for told in reports:
        ending = "" if told.nodes == MAIN else f"_{told.nodes}"
        figures |= {f"{name}{ending}": value for name, value in _figures(told).items()}
    for column in ("hops_mean", "questions_per_read", "questions_per_join"):
        base, slope = law([(told.nodes, _figures(told)[column]) for told in reports])
        figures[f"law_{column}"] = f"{base:.2f} + {slope:.2f} log2 N"
    rows = [[_figures(told)[name] for name in COLUMNS] for told in reports]
    return figures | {"curves_of": list(COLUMNS), "curves": rows}


def _one(seed: int, size: int, reads: int) -> LookupsReport:
    with stopwatch() as seconds:
        options = LookupsOptions(seed, size, RECORDS, reads, say=partial(_say, seconds))
        told = clock.run(partial(lookups, options), seed)
        calm, silent = told.calm, told.silent
        print(
            f"  {told.nodes:5} nodes  calm {calm.found}/{calm.tried} "
            f"hops {calm.hops_p50:g}/{calm.hops_p99:g} "
            f"{calm.p50_s:.2f}/{calm.p99_s:.2f} s  a third silent {silent.found}/{silent.tried} "
            f"{silent.p50_s:.2f}/{silent.p99_s:.2f} s  {calm.questions:.1f} questions a read, "
            f"{told.questions_per_join:.0f} a join, {told.known:.0f} known  ({seconds():.0f} s)",
            flush=True,
        )
    return told


def _agree(options: AgreementOptions) -> Figures:
    """What whole daemons and the light mesh tell of one story."""
    with stopwatch() as seconds:
        told = agreement(options)
        print(f"  {told.nodes} daemons agree: {told.agrees}  ({seconds():.0f} s)", flush=True)
    figures: Figures = {"daemons": told.nodes, "daemons_agree": told.agrees}
    for name, world in (("daemons", told.daemons), ("twins", told.mesh)):
        figures |= {f"{name}_{key}": value for key, value in _world(world).items()}
    return figures


def _world(told: Told) -> dict[str, float]:
    return {
        "success": told.calm.success,
        "hops_mean": told.calm.hops_mean,
        "latency_p50_s": told.calm.p50_s,
        "latency_p99_s": told.calm.p99_s,
        "silent_third_success": told.silent.success,
        "silent_third_p99_s": told.silent.p99_s,
    }


def _say(seconds: Callable[[], float], text: str) -> None:
    print(f"    {text}  ({seconds():.0f} s)", flush=True)


def _figures(told: LookupsReport) -> dict[str, float]:
    calm, silent = told.calm, told.silent
    return {
        "nodes": told.nodes,
        "success": calm.success,
        "hops_mean": calm.hops_mean,
        "hops_p50": calm.hops_p50,
        "hops_p99": calm.hops_p99,
        "latency_p50_s": calm.p50_s,
        "latency_p99_s": calm.p99_s,
        "silent_third_success": silent.success,
        "silent_third_p99_s": silent.p99_s,
        "silent_third_p99_ratio": silent.p99_s / calm.p99_s,
        "questions_per_read": calm.questions,
        "bytes_per_read": calm.bytes,
        "questions_per_join": told.questions_per_join,
        "bytes_per_join": told.bytes_per_join,
        "known": told.known,
        "replicas_min": told.replicas_min,
    }


def _kept(told: LookupsReport) -> bool:
    ratio = told.silent.p99_s / told.calm.p99_s
    return told.calm.success >= SUCCESS_MIN and told.silent.success >= SILENT_MIN and ratio < RATIO_MAX


if __name__ == "__main__":
    main()
