"""The tools of the benchmarks: medians are medians, and the runner holds a bench to its last line."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import ModuleType

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture(scope="module")
def measure() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_measure", BENCH / "measure.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


async def test_comparison_interleaves_and_takes_medians(measure: ModuleType) -> None:
    order: list[str] = []
    figures = {"fast": iter([99.0, 1.0, 2.0, 9.0]), "slow": iter([99.0, 4.0, 8.0, 6.0])}

    def way(name: str) -> Callable[[], Awaitable[float]]:
        async def once() -> float:
            order.append(name)
            return next(figures[name])

        return once

    comparison = await measure.compare({name: way(name) for name in figures}, rounds=3)
    assert order == ["fast", "slow"] * 4
    assert comparison.median("fast") == 2.0
    assert comparison.ratio("slow", "fast") == 3.0
    assert comparison.spread("fast") == 4.0


def test_report_is_one_line_of_json_with_the_machine(
    measure: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    measure.report("demo", {"ratio": 1.23456, "failed": 0})
    (line,) = capsys.readouterr().out.splitlines()
    said = json.loads(line)
    assert said["bench"] == "demo"
    assert said["ratio"] == 1.235
    assert said["machine"]["cores"] > 0


@pytest.fixture
def bench(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a script as the benchmark "demo" through a copy of the runner."""
    folder = tmp_path / "bench"
    folder.mkdir()
    for name in ("run.py", "measure.py"):
        shutil.copy(BENCH / name, folder)

    def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        (folder / "demo.py").write_text(script)
        command = [sys.executable, str(folder / "run.py"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    return run


def test_runner_shows_all_and_ends_with_the_result(
    bench: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    script = "from measure import report\nprint('working')\nreport('demo', {'x': 1})\nprint()"
    done = bench(script, "--save", "demo")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "working"
    assert json.loads(done.stdout.splitlines()[-1])["x"] == 1
    kept = json.loads((tmp_path / "bench" / "results" / "demo.json").read_text())
    assert kept["x"] == 1
    assert kept["date"][:2] == "20"


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("print('{\"x\": 1}')\nprint('done')", "must end with one JSON object"),
        ("raise SystemExit(3)", "status 3"),
    ],
)
def test_runner_fails_where_the_bench_does(
    bench: Callable[..., subprocess.CompletedProcess[str]], script: str, words: str
) -> None:
    done = bench(script, "demo")
    assert done.returncode != 0
    assert words in done.stderr


def test_runner_names_the_benchmarks_there_are(
    bench: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    done = bench("", "nonsense")
    assert done.returncode == 2
    assert done.stderr.rstrip().endswith("one of: demo")


@pytest.mark.parametrize("path", sorted((BENCH / "results").glob("*.json")), ids=lambda path: path.stem)
def test_kept_results_say_when_and_where(path: Path) -> None:
    kept = json.loads(path.read_text())
    assert kept["bench"] == path.stem
    assert {"date", "commit", "machine"} <= set(kept)
