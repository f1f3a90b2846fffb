"""Scenario "nat": what it tells, and that it can tell what went wrong."""

from __future__ import annotations

import json

import pytest

from mycel.node.reach.punch import Puncher
from mycel.protocol.punch import PunchFailed
from mycel.simnet import clock
from mycel.simnet.__main__ import main
from mycel.simnet.nat import KINDS
from mycel.simnet.reachability import ReachabilityOptions, reachability
from mycel.simnet.table import table

FEW = ("open", "port", "symmetric")


def run(seed=5):
    return clock.run(lambda: reachability(ReachabilityOptions(seed, kinds=FEW)), seed)


def by_pair(report):
    return {frozenset(one.pair): one for one in report.outcomes if one.pair[0] in KINDS}


def test_some_kinds_call_each_other():
    report = run()
    assert report.went_well
    assert (report.pairs, report.call_ok) == (6, 6)
    assert (report.direct_ok, report.direct_possible, report.direct_impossible) == (4, 4, 0)
    outcomes = by_pair(report)
    for pair in (("port", "symmetric"), ("symmetric",)):
        assert (outcomes[frozenset(pair)].possible, outcomes[frozenset(pair)].last) == (False, "relayed")
    punched = outcomes[frozenset(["port"])]
    assert (punched.first, punched.last) == ("relayed", "direct")
    assert 0 < punched.upgrade_s < 0.5
    shared = {one.pair: (one.last, one.possible) for one in report.outcomes if one.pair[0] not in KINDS}
    assert shared == {
        ("one home", "hairpin on"): ("direct", True),
        ("one home", "hairpin off"): ("direct", True),
        ("one carrier", "hairpin on"): ("direct", True),
        ("one carrier", "hairpin off"): ("relayed", False),
    }
    words = "\n".join(table([report]))
    assert "calls 6/6, direct 4/4 possible, 0 impossible" in words
    assert report.trace_hash in words


def test_nodes_that_cannot_punch_do_not_do_well(monkeypatch):
    async def punch(self, peer):
        raise PunchFailed("not today", reason="failed")

    monkeypatch.setattr(Puncher, "punch", punch)
    report = run()
    assert not report.went_well
    assert report.call_ok == 6
    assert report.direct_ok < report.direct_possible == 4
    assert by_pair(report)[frozenset(["port"])].last == "relayed"
    words = "\n".join(table([report]))
    assert "RELAYED" in words
    assert "seed 5: port - port: first relayed, last relayed" in words


@pytest.mark.parametrize("wrong", [["nat", "--seeds", "0"], ["nat", "--rtt-ms", "0"]])
def test_a_wrong_command_line_is_said_to_be_one(wrong, capsys):
    with pytest.raises(SystemExit) as caught:
        main(wrong)
    assert caught.value.code == 2
    assert "usage: mycel sim" in capsys.readouterr().err


def test_the_command_tells_all_seeds_and_fails_when_one_did(monkeypatch, capsys):
    report = run()

    async def known(options):
        return report

    monkeypatch.setattr("mycel.simnet.reachability.reachability", known)
    assert main(["nat", "--seeds", "2", "--json"]) == 0
    assert [one["call_ok"] for one in json.loads(capsys.readouterr().out)] == [6, 6]
    assert main(["nat", "--seeds", "1"]) == 0
    assert "real time" in capsys.readouterr().out
    object.__setattr__(report.outcomes[0], "call_ok", False)
    assert main(["nat", "--seeds", "1"]) == 1
    assert "FAILED" in capsys.readouterr().out
