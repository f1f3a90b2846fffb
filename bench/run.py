"""Run one benchmark: python bench/run.py [--save] NAME (or `make bench NAME=rpc SAVE=1`).

A benchmark is a file bench/NAME.py that prints what it finds and ends with one JSON object on a line
(bench/measure.py's `report`). This runner shows its output as it comes, holds it to that last line, passes
its exit status on, and with --save keeps the object in bench/results/NAME.json with date and commit.
What NAME needs at the other end of a wire is in bench/NAME_far.py.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).resolve().parent
NOT_BENCHES = (
    "run",
    "measure",
    "member",
    "traps",
    "crowd",
    "deaths",
    "daemons",
    "digits",
    "federated_jobs",
    "flower",
    "flower_digits",
)


def main() -> None:
    """Run the benchmark that the command line names; exits non-zero when it fails or says nothing."""
    parser = argparse.ArgumentParser(description="Run one benchmark; its last line is one JSON object.")
    parser.add_argument("name", nargs="?", help="one of: " + ", ".join(names()))
    parser.add_argument("--save", action="store_true", help="keep the result in bench/results/NAME.json")
    options, rest = parser.parse_known_args()
    if options.name not in names():
        parser.exit(2, f"which one? make bench NAME=... with one of: {', '.join(names())}\n")
    last = run(options.name, rest)
    result = parse(options.name, last)
    if options.save:
        save(options.name, result)


def names() -> list[str]:
    """The benchmarks there are."""
    stems = [path.stem for path in BENCH.glob("*.py") if path.stem not in NOT_BENCHES]
    return sorted(stem for stem in stems if not stem.endswith("_far"))


def run(name: str, arguments: list[str]) -> str:
    """Run bench/NAME.py, echo all but the last line that is not empty, and return that."""
    last = ""
    command = [sys.executable, "-u", str(BENCH / f"{name}.py"), *arguments]
    with subprocess.Popen(command, cwd=BENCH.parent, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in filter(str.strip, process.stdout):
            if last:
                print(last, flush=True)
            last = line.rstrip("\n")
    if process.returncode:
        print(last, flush=True)
        sys.exit(f"bench {name} failed with exit status {process.returncode}")
    return last


def parse(name: str, last: str) -> dict[str, object]:
    """The result on the benchmark's last line, printed as the last line of all."""
    try:
        result = json.loads(last)
    except ValueError:
        result = None
    if not isinstance(result, dict):
        print(last)
        sys.exit(f"bench {name} must end with one JSON object on a line (bench/measure.py: report)")
    print(last, flush=True)
    return result


def save(name: str, result: dict[str, object]) -> None:
    """Keep `result` beside the benchmark, with when and of which commit."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=BENCH
    )
    kept = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit.stdout.strip(),
        **result,
    }
    path = BENCH / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(kept, indent=1) + "\n")
    print(f"kept in {path.relative_to(BENCH.parent)}", file=sys.stderr)


if __name__ == "__main__":
    main()
