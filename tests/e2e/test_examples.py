"""The examples run, as a reader would run them, and say what they promise."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.mark.parametrize("arguments", [[], ["--simulated"]])
def test_call_runs_in_both_worlds(arguments: list[str]) -> None:
    command = [sys.executable, "-W", "error", str(EXAMPLES / "call.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "7 words, says" in done.stdout
    assert "turned away: wrong_swarm" in done.stdout
