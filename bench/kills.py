"""Members of a group die in every phase of what they do together: real processes, sockets and signals.

Three processes (five where two die) sum arrays of 32 MB over TCP. One of them kills itself in the very phase
(bench/traps.py): when all have arrived, in mid reduce-scatter, in mid all-gather, when it holds the result,
when one of the others has its vote, when it has everybody's, while it dials after its connections broke;
or it stops (SIGSTOP), is given up, and goes on. Two of five die at once; the one that proposes the next epoch
dies as it does; newcomers die as they come in; sender and receiver of a shared state die; a group goes down
to one and comes back.

Of every case it must be true that all survivors report the same contributors and bytes, that these are
numpy's sum, and that whoever begins again begins with its input. The figures, in seconds, at each survivor:

    error     from the death (or the silence's beginning) until its attempt failed, or, where it holds the
              result already, until it missed the dead one
    retried   from then until bytes move again
    done      from the death until the operation has ended

The last line is one JSON object: per case `CASE_error_s` and so on (medians, and the slowest as `_max`), and
over all deaths by reset `error_after_reset_s`, `retried_after_s`, over silence `error_after_silence_s`. Cases
in which this process stood still for a moment, because the machine had other things to do, are judged but not
timed (`undisturbed` says how many are).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import asdict

import trio
from crowd import Crowd, NotSo, Standstill
from deaths import CASES, Finding
from measure import report

SILENT = ("silent", "silent_late")
NO_FIGURES = ("nap", "state_sender", "state_receiver", "newcomer_knocks", "newcomer_admitted")
"""Cases without a failed attempt to take the time of."""


def flat(errors: BaseException) -> list[BaseException]:
    """The errors in a group of groups."""
    if not isinstance(errors, BaseExceptionGroup):
        return [errors]
    return [error for group in errors.exceptions for error in flat(group)]


async def play(cases: list[str], rounds: int) -> list[Finding]:
    """All cases, so often, each victim in its turn. A case that does not come to its end is a wrong one."""
    findings = []
    async with trio.open_nursery() as nursery:
        crowd, still = Crowd(nursery), Standstill()
        nursery.start_soon(still.watch)
        for turn in range(rounds):
            for at, case in enumerate(cases):
                before = still.seconds
                try:
                    finding = await CASES[case](crowd, turn + at)
                except* NotSo as errors:
                    wrong = [str(error) for error in flat(errors)]
                    finding = Finding(case, [p.number for p in crowd.peers], wrong=wrong)
                finding.stood_still_s = still.seconds - before
                if finding.wrong:
                    await crowd.disperse()
                findings.append(finding)
                print(json.dumps(asdict(finding)), flush=True)
        await crowd.disperse()
        nursery.cancel_scope.cancel()
    return findings


def figures(findings: list[Finding]) -> dict[str, float | int | None]:
    """Medians and the slowest."""
    kept: dict[str, float | int | None] = {}

    def add(key: str, values: list[float]) -> None:
        kept[key] = statistics.median(values) if values else None
        kept[f"{key}_max"] = max(values, default=None)

    def all_of(what: str, cases: list[str]) -> list[float]:
        return [value for found in findings if found.case in cases for value in getattr(found, what)]

    timed = [case for case in CASES if case not in NO_FIGURES]
    resets = [case for case in timed if case not in SILENT]
    add("error_after_reset_s", all_of("error_s", resets))
    add("error_after_silence_s", all_of("error_s", list(SILENT)))
    add("retried_after_s", all_of("retried_s", timed))
    add("done_after_reset_s", all_of("done_s", resets))
    for case in dict.fromkeys(found.case for found in findings):
        for what in ("error_s", "retried_s", "done_s"):
            if values := all_of(what, [case]):
                add(f"{case}_{what}", values)
    return kept


def main() -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--list", action="store_true", help="name the cases, and play none")
    options = parser.parse_args()
    if options.list:
        print(" ".join(CASES))
        return
    findings = trio.run(play, options.cases, options.rounds)
    undisturbed = [found for found in findings if not found.stood_still_s]
    wrong = [f"{found.case}: {wrong}" for found in findings for wrong in found.wrong]
    report(
        "kills",
        {
            "cases": len(findings),
            "undisturbed": len(undisturbed),
            "wrong": len(wrong),
            **figures(undisturbed),
        },
    )
    if wrong:
        sys.exit("kills: " + wrong[0])


if __name__ == "__main__":
    main()
