"""The examples run, as a reader would run them, and say what they promise."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.mark.parametrize("arguments", [[], ["--simulated"]])
def test_call_runs_in_both_worlds(arguments: list[str]) -> None:
    command = [sys.executable, "-W", "error", str(EXAMPLES / "call.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "7 words, says" in done.stdout
    assert "turned away: wrong_swarm" in done.stdout


def test_scripts_train_together_and_another_number_of_them_goes_on(
    machine: Callable[[str], Any], tmp_path: Path
) -> None:
    machine("founder").start("up")
    ticket = machine("founder").json("ticket")["text"]
    saved = [tmp_path / f"{number}.safetensors" for number in range(3)]

    def train(count: int, outer: int, *more: str) -> list[list[str]]:
        command = [sys.executable, str(EXAMPLES / "diloco.py"), ticket, "--preset", "local", *more]
        command += ["--least", str(count), "--outer", str(outer)]
        scripts = [
            subprocess.Popen([*command, "--save", str(path)], stdout=subprocess.PIPE, text=True)
            for path in saved[:count]
        ]
        try:
            said = [script.communicate(timeout=120)[0].splitlines() for script in scripts]
            assert [script.returncode for script in scripts] == [0] * count
        finally:
            for script in scripts:
                script.kill()
        return said

    said = train(2, 6)
    assert said[0][-1] == said[1][-1]
    assert said[0][-1].startswith("weights ")
    assert [line.split(", loss")[0] for line in said[0][:-1]] == [
        f"outer step {number}: 2 peers" for number in range(1, 7)
    ]
    (tmp_path / "last.safetensors").write_bytes(saved[1].read_bytes())
    again = train(3, 8, "--resume", str(tmp_path / "last.safetensors"))
    assert len(dict.fromkeys(lines[-1] for lines in again)) == 1
    assert [line.split(", loss")[0] for line in again[0][:-1]] == [
        "outer step 7: 3 peers",
        "outer step 8: 3 peers",
    ]
