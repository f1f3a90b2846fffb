"""Runs of `mycel sim` in processes of their own, for worlds that must be the same whatever the hash seed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest


@pytest.fixture
def sim() -> Callable[..., list[Any]]:
    """`sim("swarm", [hash_seed, *arguments], ...)`: what each run reports, all of them at the same time."""

    def run(story: str, *runs: Sequence[object]) -> list[Any]:
        return [finish(process) for process in [start(story, *one) for one in runs]]

    return run


def start(story: str, hash_seed: int, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "mycel.simnet", story, *arguments, "--json"],
        env={**os.environ, "PYTHONHASHSEED": str(hash_seed)},
        stdout=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> Any:
    out, _ = process.communicate()
    assert process.returncode == 0, out
    return json.loads(out)
