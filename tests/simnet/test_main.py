"""`mycel sim`: what it prints and how it ends."""

from __future__ import annotations

import json

import pytest

from mycel.simnet.__main__ import main


def test_a_report_in_words_and_in_json_tell_the_same(capsys):
    storm = ["storm", "--seed", "3", "--nodes", "6", "--seconds", "8"]
    assert main(storm) == 0
    words = capsys.readouterr().out
    assert main([*storm, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["seed"] == 3
    assert report["virtual_s"] == 8.0
    assert f"trace hash     {report['trace_hash']}" in words
    assert f"echoed         {report['echoed']}" in words


@pytest.mark.parametrize(
    "wrong",
    [
        [],
        ["hurricane"],
        ["storm", "--seed", "x"],
        ["swarm", "--nodes", "3"],
        ["swarm", "--deaths", "29"],
        ["swarm", "--tokens", "1"],
        ["dht", "--nodes", "2"],
        ["dht", "--reads", "0"],
    ],
)
def test_a_wrong_command_line_is_said_to_be_one(wrong, capsys):
    with pytest.raises(SystemExit) as caught:
        main(wrong)
    assert caught.value.code == 2
    assert "usage: mycel sim" in capsys.readouterr().err


def test_a_storm_in_which_nobody_could_talk_did_not_go_well():
    assert main(["storm", "--nodes", "2", "--seconds", "0.01", "--json"]) == 1


def test_a_table_of_thirty_finds_everything_calm_and_with_a_third_silent_and_replays(capsys):
    asked = ["dht", "--nodes", "30", "--records", "5", "--reads", "20", "--seed", "4", "--json"]
    assert main(asked) == 0
    first = capsys.readouterr().out
    report = json.loads(first)
    assert report["calm"]["found"] == report["silent"]["found"] == 20
    assert report["replicas_min"] == 20
    assert report["restless"]["tried"] == 0
    assert main(asked) == 0
    assert capsys.readouterr().out == first
