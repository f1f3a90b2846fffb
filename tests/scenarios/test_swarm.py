"""Whole daemons in virtual time: join by ticket, generate, lose a third, go on; the same in every process."""

from __future__ import annotations

import json

import pytest

from mycel.simnet.__main__ import main


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_thirty_daemons_survive_the_death_of_a_third_and_replay_from_their_seed(sim):
    arguments = ("--nodes", "30", "--seed", "1")
    first, second = sim("swarm", (1, *arguments), (2, *arguments))
    assert first == second
    assert len(first["died"]) == 10
    assert first["events"]["crash"] == first["events"]["vanish"] == 5
    assert first["holders"] == 29
    assert first["same_tokens"]
    assert len(first["tokens"]) == 24
    assert first["stages_died"] >= 1
    assert first["failovers"] >= 1
    assert first["longest_gap_s"] < 3.0
    assert first["settled_s"] < 6.0


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", [2, 3, 4])
def test_nine_daemons_survive_whatever_the_seed_takes(seed, capsys):
    assert main(["swarm", "--nodes", "9", "--seed", str(seed), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["same_tokens"]
    assert len(report["died"]) >= 3
    assert report["failovers"] >= 1
    assert report["longest_gap_s"] < 3.0


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_survivors_take_the_layers_of_a_third_that_held_the_only_copies(sim):
    """Nine daemons with a layer each, memory for two more; the same in every process."""
    arguments = ("--nodes", "10", "--seed", "1", "--last-copies")
    first, second = sim("swarm", (1, *arguments), (2, *arguments))
    assert first == second
    assert (
        first["events"]["crash"] + first["events"]["vanish"]
        == len(first["died"])
        == first["stages_died"]
        == 3
    )
    assert first["same_tokens"]
    assert len(first["tokens"]) == 24
    assert 1 <= first["taken"] <= 3
    assert first["longest_gap_s"] < 8.0
