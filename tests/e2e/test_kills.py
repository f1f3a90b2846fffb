"""Members of a group that die in every phase: real processes, sockets and signals (bench/kills.py plays it).

The bench runs once for all tests here, one case after the other with the same processes; each test judges
what the survivors of its case said. Times are bounded ten times as widely as they are meant to be: the
machine may be busy with other tests, and the bench keeps the exact figures.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[2] / "bench" / "kills.py"
ERROR_S_MAX = 3.0
"""0.3 s are meant, after a reset..."""
RETRIED_S_MAX = 5.0
"""...and 0.5 s from then on."""
SILENCE_S_MAX = 10.0
"""5 s are meant: nothing is heard for two, and it is asked every half."""

WITHOUT_THE_DEAD = ("arrival", "reduce_scatter", "all_gather", "re_dialling", "two_of_five", "down_to_one")
"""Who dies in these cannot have given its part: the survivors' result is theirs alone."""
WITH_OR_WITHOUT = ("before_vote", "re_connected", "proposer_proposes", "proposer_settles")
WITH_THE_DEAD = ("others_have_voted", "vote_told_to_one", "before_commit")
"""Everybody held the result when it died."""
SILENT = ("silent", "silent_late")
NEWCOMERS = ("newcomer_knocks", "newcomer_admitted")


@pytest.fixture(scope="module")
def cases() -> dict[str, Any]:
    """What was found, by case."""
    command = [sys.executable, str(BENCH), "--rounds", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert lines, done.stderr[-3000:]
    return {line["case"]: line for line in lines if "case" in line}


def survivors_of(case: dict[str, Any]) -> list[int]:
    return [member for member in case["members"] if member not in case["victims"]]


def one_result(case: dict[str, Any]) -> list[int]:
    """All survivors kept the same bytes, which are numpy's sum; returns whose sum that is."""
    assert case["wrong"] == []
    assert case["victims"]
    assert case["fell"], "nobody fell"
    kept = [result for result in case["results"] if result["peer"] not in case["victims"]]
    assert sorted(result["peer"] for result in kept) == sorted(survivors_of(case))
    assert all(result["result"] == "kept" and result["right"] for result in kept)
    assert len({result["sha256"] for result in kept}) == 1
    assert len({(result["name"], *result["of"]) for result in kept}) == 1
    contributors: list[int] = kept[0]["of"]
    return contributors


def in_time(case: dict[str, Any], error_s: float = ERROR_S_MAX) -> None:
    assert len(case["error_s"]) == len(survivors_of(case)), "somebody noticed nothing"
    assert max(case["error_s"]) < error_s
    assert max(case["retried_s"], default=0.0) < RETRIED_S_MAX
    assert max(case["done_s"]) < error_s + RETRIED_S_MAX + 5


@pytest.mark.slow
@pytest.mark.parametrize("name", WITHOUT_THE_DEAD)
def test_who_dies_before_it_has_the_result_costs_one_attempt(cases: dict[str, Any], name: str) -> None:
    case = cases[name]
    assert one_result(case) == sorted(survivors_of(case))
    assert all(result["attempts"] >= 2 for result in case["results"])
    assert len(case["retried_s"]) == len(survivors_of(case))
    in_time(case)


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_OR_WITHOUT)
def test_who_dies_between_result_and_vote_is_in_all_results_or_in_none(
    cases: dict[str, Any], name: str
) -> None:
    case = cases[name]
    assert one_result(case) in (sorted(survivors_of(case)), sorted(case["members"]))
    in_time(case)


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_THE_DEAD)
def test_what_everybody_held_is_kept_when_one_dies(cases: dict[str, Any], name: str) -> None:
    case = cases[name]
    assert one_result(case) in (sorted(case["members"]), sorted(survivors_of(case)))
    in_time(case)


@pytest.mark.slow
@pytest.mark.parametrize("name", SILENT)
def test_who_is_stopped_is_left_out_and_finds_out_when_it_goes_on(cases: dict[str, Any], name: str) -> None:
    case = cases[name]
    assert one_result(case) == sorted(survivors_of(case))
    in_time(case, SILENCE_S_MAX)
    assert min(case["error_s"]) > 1.0, "it was given up while it may have been busy"
    (zombie,) = [result for result in case["results"] if result["peer"] in case["victims"]]
    assert zombie["result"] == "Fenced"
    assert zombie["right"], "its array is not as it was"


@pytest.mark.slow
def test_who_is_stopped_for_a_second_costs_nobody_anything(cases: dict[str, Any]) -> None:
    case = cases["nap"]
    assert case["wrong"] == []
    assert all(result["of"] == sorted(case["members"]) for result in case["results"])
    assert {result["attempts"] for result in case["results"]} == {1}


@pytest.mark.slow
@pytest.mark.parametrize("name", NEWCOMERS)
def test_a_newcomer_that_dies_as_it_comes_in_holds_nobody_up(cases: dict[str, Any], name: str) -> None:
    case = cases[name]
    assert one_result(case) == sorted(case["members"])
    assert max(case["done_s"]) < RETRIED_S_MAX


@pytest.mark.slow
@pytest.mark.parametrize("name", ["state_sender", "state_receiver"])
def test_a_death_in_mid_sync_leaves_the_rest_with_one_state(cases: dict[str, Any], name: str) -> None:
    case = cases[name]
    assert case["wrong"] == []
    assert case["fell"]
    assert sorted(result["peer"] for result in case["results"]) == sorted(survivors_of(case))
    assert len({result["root"] for result in case["results"]}) == 1
    fresh = case["members"][-1]
    replaced = [result["peer"] for result in case["results"] if result["replaced"]]
    assert replaced == ([fresh] if name == "state_sender" else [])
    assert max(case["done_s"]) < 10


def test_every_case_of_the_bench_is_judged_here() -> None:
    found = subprocess.run([sys.executable, str(BENCH), "--list"], capture_output=True, text=True, check=True)
    judged = (*WITHOUT_THE_DEAD, *WITH_OR_WITHOUT, *WITH_THE_DEAD, *SILENT, *NEWCOMERS)
    assert sorted(found.stdout.split()) == sorted((*judged, "nap", "state_sender", "state_receiver"))
