"""Every kind of NAT with every other, built from real kernels: who gets through, and how soon directly.

The lab is tests/netns/netlab: network namespaces joined by a wire of 40 ms round trip, two sites of each of
the 11 kinds, three public hosts, and pairs of homes that share a box which turns packets around or does not.
A whole node (host, calls, reach) stands at each site as a process of its own and joins by ticket; then each
of the 66 pairs calls once. For each seed everything is built anew; the seed draws who of a pair calls.

`direct_possible` is not read from a table: before the nodes start, plain sockets that know both true mappings
try to punch through the same boxes. A pair counts for `direct_ok` when it became direct for every seed.

`--picture FILE` draws the table. Needs root, nft and ip; nothing leaves the namespaces.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import trio
from measure import report

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "netns"))

from netlab.boxes import KINDS  # noqa: E402
from netlab.cast import cast  # noqa: E402
from netlab.matrix import Outcome, Pair, Stage, assemble, calls, stage  # noqa: E402
from netlab.picture import Cell, draw  # noqa: E402
from netlab.space import missing  # noqa: E402

SEEDS = 3
RTT_MS = 40.0
AT_ONCE = 3
"""Calls under way at a time: more would measure two cores, not the network."""
SHARED = (("one home", True), ("one home", False), ("one carrier", True), ("one carrier", False))

Outcomes = Mapping[Pair, Sequence[Outcome]]


def main() -> None:
    """Run all seeds; exits 1 where a call failed or a pair ended up other than it could have."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=SEEDS, help="how many times (default %(default)s)")
    parser.add_argument(
        "--rtt-ms", type=float, default=RTT_MS, help="between any two sites (default %(default)s)"
    )
    parser.add_argument("--picture", type=Path, help="where to draw the table (an SVG file)")
    asked = parser.parse_args()
    if (reason := missing()) is not None:
        sys.exit(f"no network lab here: {reason}")
    possible: dict[Pair, bool] = {}
    outcomes: dict[Pair, list[Outcome]] = defaultdict(list)
    for seed in range(asked.seeds):
        with (
            stage(KINDS, SHARED, asked.rtt_ms / 1000) as built,
            tempfile.TemporaryDirectory(prefix="mycel-nat-") as folder,
        ):
            for outcome in trio.run(one_seed, built, Path(folder), seed, possible):
                outcomes[outcome.pair].append(outcome)
    told = figures(outcomes, possible)
    if asked.picture:
        asked.picture.write_text(picture(outcomes, possible, asked), "utf-8")
    report("nat", {**told, "seeds": asked.seeds, "rtt_ms": asked.rtt_ms})
    good = told["call_ok"] == told["pairs"] and told["direct_ok"] == told["direct_possible"]
    sys.exit(0 if good and told["direct_impossible"] == 0 else 1)


async def one_seed(built: Stage, folder: Path, seed: int, possible: dict[Pair, bool]) -> list[Outcome]:
    """What plain sockets can do is noted in `possible`; what the nodes did is returned."""

    def hear(outcome: Outcome) -> None:
        took = "" if outcome.upgrade_s is None else f" after {outcome.upgrade_s:.2f} s"
        could = "" if possible[outcome.pair] else ", which is all that can be"
        names = " - ".join(outcome.pair)
        print(
            f"  seed {seed}  {names:38} {outcome.first} -> {outcome.last}{took}{could} {outcome.trouble}",
            flush=True,
        )

    await built.find_possible()
    for pair, can in built.can_be_direct.items():
        possible[pair] = can or possible.get(pair, False)
    async with cast(built.places.items(), folder) as players:
        await assemble(players, built)
        return await calls(players, built, seed, at_once=AT_ONCE, heard=hear)


def figures(outcomes: Outcomes, possible: Mapping[Pair, bool]) -> dict[str, float | int | None]:
    """What is reported."""
    kinds = {pair: tries for pair, tries in outcomes.items() if not _is_shared(pair)}
    shared = {pair: tries for pair, tries in outcomes.items() if _is_shared(pair)}
    upgrades = sorted(one.upgrade_s for tries in kinds.values() for one in tries if one.upgrade_s is not None)
    return {
        "pairs": len(kinds),
        "call_ok": sum(all(one.call_ok for one in tries) for tries in kinds.values()),
        "direct_ok": sum(all(one.is_direct for one in kinds[pair]) and possible[pair] for pair in kinds),
        "direct_possible": sum(possible[pair] for pair in kinds),
        "direct_impossible": sum(any(one.is_direct for one in kinds[p]) and not possible[p] for p in kinds),
        "upgrade_median_s": statistics.median(upgrades) if upgrades else None,
        "upgrade_p90_s": upgrades[len(upgrades) * 9 // 10] if upgrades else None,
        "upgrades": len(upgrades),
        "shared_pairs": len(shared),
        "shared_call_ok": sum(all(one.call_ok for one in tries) for tries in shared.values()),
        "shared_direct_ok": sum(all(one.is_direct for one in shared[p]) and possible[p] for p in shared),
        "shared_direct_possible": sum(possible[pair] for pair in shared),
    }


def picture(outcomes: Outcomes, possible: Mapping[Pair, bool], asked: argparse.Namespace) -> str:
    """The table of the 66 pairs."""
    cells = {pair: _cell(tries, possible[pair]) for pair, tries in outcomes.items() if not _is_shared(pair)}
    caption = (
        f"Seconds from the relayed connection to the direct one, median of {asked.seeds} runs at "
        f"{asked.rtt_ms:g} ms round trip.\n"
        "“at once”: whoever was called had a public address, so no relay was needed."
    )
    return draw([kind.name for kind in KINDS], cells, caption)


def _cell(tries: Sequence[Outcome], could: bool) -> Cell:
    if not all(one.call_ok for one in tries) or any(one.is_direct != could for one in tries):
        return Cell("failed", "failed" if not all(one.call_ok for one in tries) else tries[0].last)
    if not could:
        return Cell("relayed", "relay")
    upgrades = [one.upgrade_s for one in tries if one.upgrade_s is not None]
    return Cell("direct", f"{statistics.median(upgrades):.2f}" if upgrades else "at once")


def _is_shared(pair: Pair) -> bool:
    return "hairpin" in pair[0]


if __name__ == "__main__":
    main()
