"""The report of scenario "nat" in words: a table of kinds, and what it comes to.

A cell holds the median seconds, over all seeds, from the relayed connection to the direct one; "once" where
it was direct from the start, "relay" where nothing else is possible, and what went wrong in capitals.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from mycel.simnet.nat import KINDS
from mycel.simnet.reachability import Outcome, Pair, ReachabilityReport


def table(reports: Sequence[ReachabilityReport]) -> list[str]:
    """The lines of the table and its summary."""
    tries: dict[Pair, list[Outcome]] = {}
    for report in reports:
        for outcome in report.outcomes:
            tries.setdefault(outcome.pair, []).append(outcome)
    names = list(dict.fromkeys(kind for pair in tries if pair[0] in KINDS for kind in pair))
    width = max(map(len, names)) + 2
    lines = [" " * width + "".join(f"{_short(name):>8}" for name in names)]
    for row, one in enumerate(names):
        cells = ["" if column < row else _cell(tries, one, two) for column, two in enumerate(names)]
        lines.append(f"{one:<{width}}" + "".join(f"{cell:>8}" for cell in cells))
    lines.append("")
    lines += [
        f"{', '.join(pair):<{2 * width}}{_word(outcomes)}"
        for pair, outcomes in tries.items()
        if pair[0] not in KINDS
    ]
    lines += ["", *_summary(reports)]
    wrong = [
        f"seed {report.seed}: {' - '.join(outcome.pair)}: first {outcome.first}, last {outcome.last}"
        for report in reports
        for outcome in report.outcomes
        if not outcome.is_right
    ]
    return lines + wrong


def _short(name: str) -> str:
    """A column's head: "carrier symmetric" is c. symm."""
    first, _, rest = name.partition(" ")
    return f"{first[0]}. {rest[:4]}" if rest else name[:7]


def _cell(tries: dict[Pair, list[Outcome]], one: str, two: str) -> str:
    return _word(tries.get((one, two)) or tries[two, one])


def _word(outcomes: Sequence[Outcome]) -> str:
    if not all(one.call_ok for one in outcomes):
        return "FAILED"
    if not all(one.is_right for one in outcomes):
        return "DIRECT" if not all(one.possible for one in outcomes) else "RELAYED"
    if not outcomes[0].possible:
        return "relay"
    upgrades = [one.upgrade_s for one in outcomes if one.upgrade_s is not None]
    return f"{statistics.median(upgrades):.2f}" if upgrades else "once"


def _summary(reports: Sequence[ReachabilityReport]) -> list[str]:
    lines = []
    for report in reports:
        median = "none" if report.upgrade_median_s is None else f"{report.upgrade_median_s:.3f} s"
        lines.append(
            f"seed {report.seed}: calls {report.call_ok}/{report.pairs}, direct {report.direct_ok}"
            f"/{report.direct_possible} possible, {report.direct_impossible} impossible; "
            f"upgrade {median} median; trace {report.trace_hash}"
        )
    return lines
