"""Kademlia in simulated meshes of growing size: how many reads succeed, how far they go, and what they cost.

Latencies are virtual (5 to 80 ms one way, drawn for each pair of nodes), so the figures do not depend on the
machine, and one seed gives the same ones anywhere. For each size: every node joins, records are put, read
by others, and read again within the minute after a third of the nodes fell silent at once
(`silent_third_success`, and `silent_third_p99_ratio`: its p99 over the calm one). Then 60 nodes come and go
for two virtual hours with sessions of ten minutes (median), half of them ending in a crash, half in silence
(`churn_success`).

`success`, hops and times are those of the largest size; `law` is the least-squares line of questions per join
against log2 of the nodes. The exit status is 0 only if every promise was kept.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from functools import partial

from measure import report, stopwatch

from mycel.simnet import clock
from mycel.simnet.lookups import LookupsOptions, LookupsReport, lookups, restless

SIZES = (60, 120, 240, 480, 960)
READS = 400
RECORDS = 50
CHURN_S = 7200.0
SUCCESS_MIN, SILENT_MIN, CHURN_MIN, RATIO_MAX = 1.0, 0.995, 0.99, 4.0


def main() -> None:
    """Run all sizes and the churn; exits 1 where a promise was not kept."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, nargs="+", default=SIZES, help="sizes (default %(default)s)")
    parser.add_argument("--reads", type=int, default=READS, help="in each part (default %(default)s)")
    parser.add_argument(
        "--churn-s", type=float, default=CHURN_S, help="virtual seconds (default %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    reports = [_one(LookupsOptions(asked.seed, size, RECORDS, asked.reads)) for size in asked.nodes]
    options = LookupsOptions(asked.seed, 0, RECORDS, asked.reads, asked.churn_s)
    with stopwatch() as seconds:
        churn, deaths = clock.run(partial(restless, options), asked.seed)
    print(f"  churn: {churn.found} of {churn.tried} found, {deaths} deaths ({seconds():.0f} s)", flush=True)
    largest = reports[-1]
    base, slope = law([one.nodes for one in reports], [one.questions_per_join for one in reports])
    ratio = largest.silent.p99_s / largest.calm.p99_s
    report(
        "dht",
        {
            "nodes": largest.nodes,
            "success": min(one.calm.success for one in reports),
            "hops_p50": largest.calm.hops_p50,
            "hops_p99": largest.calm.hops_p99,
            "p50_s": largest.calm.p50_s,
            "p99_s": largest.calm.p99_s,
            "silent_third_success": min(one.silent.success for one in reports),
            "silent_third_p99_s": largest.silent.p99_s,
            "silent_third_p99_ratio": ratio,
            "churn_success": churn.success,
            "churn_reads": churn.tried,
            "churn_deaths": deaths,
            "churn_p99_s": churn.p99_s,
            "questions_per_read": largest.questions_per_read,
            "bytes_per_read": largest.bytes_per_read,
            "questions_per_join": largest.questions_per_join,
            "law": f"{base:.1f} + {slope:.1f} log2 N" if len(reports) > 1 else None,
            "replicas_min": min(one.replicas_min for one in reports),
        },
    )
    good = all(one.calm.success >= SUCCESS_MIN and one.silent.success >= SILENT_MIN for one in reports)
    sys.exit(0 if good and churn.success >= CHURN_MIN and ratio < RATIO_MAX else 1)


def _one(options: LookupsOptions) -> LookupsReport:
    with stopwatch() as seconds:
        told = clock.run(partial(lookups, options), options.seed)
    calm, silent = told.calm, told.silent
    print(
        f"  {told.nodes:5} nodes  calm {calm.found}/{calm.tried} hops {calm.hops_p50:g}/{calm.hops_p99:g} "
        f"{calm.p50_s:.2f}/{calm.p99_s:.2f} s  a third silent {silent.found}/{silent.tried} "
        f"{silent.p50_s:.2f}/{silent.p99_s:.2f} s  {told.questions_per_read:.1f} questions a read, "
        f"{told.questions_per_join:.0f} a join, {told.known:.0f} known  ({seconds():.0f} s)",
        flush=True,
    )
    return told


def law(sizes: Sequence[int], values: Sequence[float]) -> tuple[float, float]:
    """Base and slope of the line through `values` against log2 of `sizes`."""
    logs = [math.log2(size) for size in sizes]
    middle, mean = sum(logs) / len(logs), sum(values) / len(values)
    spread = sum((log - middle) ** 2 for log in logs)
    pairs = zip(logs, values, strict=True)
    slope = sum((log - middle) * (value - mean) for log, value in pairs) / spread if spread else 0.0
    return mean - slope * middle, slope


if __name__ == "__main__":
    main()
