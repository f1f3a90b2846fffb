"""The same seed gives the same world, in every process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial

from mycel.simnet import clock
from mycel.simnet.storm import StormOptions, storm


def start(hash_seed, *arguments):
    """`python -m mycel.simnet ...` in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "mycel.simnet", *arguments, "--json"],
        env={**os.environ, "PYTHONHASHSEED": str(hash_seed)},
        stdout=subprocess.PIPE,
        text=True,
    )


def finish(process):
    out, _ = process.communicate(timeout=100)
    assert process.returncode == 0
    return json.loads(out)


def test_a_storm_is_the_same_in_two_processes_with_different_string_hashes():
    runs = [start(hash_seed, "storm", "--seed", "5") for hash_seed in (1, 2)]
    first, second = (finish(run) for run in runs)
    assert first == second
    assert first["events"]["data"] > 1000
    assert min(first["events"][kind] for kind in ("cut", "silence", "pause", "stall")) > 0
    here = clock.run(lambda: storm(StormOptions(5)), 5)
    assert here.trace_hash == first["trace_hash"]


def test_another_seed_is_another_storm():
    options = [StormOptions(seed, nodes=5, seconds=10) for seed in range(4)]
    hashes = {clock.run(partial(storm, one), one.seed).trace_hash for one in options}
    assert len(hashes) == 4
