"""A group of real processes that are killed and stopped while eight reduces are under way."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench" / "churn.py"


@pytest.mark.slow
def test_processes_that_come_die_and_stop_never_disagree() -> None:
    """The bench itself fails on a wrong sum, differing bytes, and a pause of more than 10 s. The soak of ten
    minutes is the same with another seed (`make soak`)."""
    command = [sys.executable, str(BENCH), "--seconds", "60", "--seed", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["wrong"] == 0
    assert result["kill"] > 5
    assert result["stop"] > 2
    assert sum(result.get(f"of_{size}", 0) for size in range(2, 7)) > 10
