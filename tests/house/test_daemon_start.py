"""The daemon's process never loads torch: it starts quickly, stays small, and outlives its workers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "transformers", "numpy", "libp2p", "pytest")
TENSOR_SIDE = (
    "compute/model",
    "compute/inline.py",
    "compute/worker_main.py",
    "compute/worker_serve.py",
    "compute/train/apps/",
    "compute/train/diloco.py",
    "compute/train/flat.py",
)
ARRAY_SIDE = ("compute/collective/", "compute/train/")
"""Loaded by the first job that needs it, not at the start."""


def loaded_by(modules: list[str]) -> list[str]:
    """Which of `HEAVY` a fresh interpreter has loaded after importing `modules`."""
    code = (
        "import importlib, json, sys\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        f"print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    found: list[str] = json.loads(done.stdout.splitlines()[-1])
    return found


def daemon_modules(*, arrays: bool) -> list[str]:
    """Every module that may be loaded in a daemon's process: those that use arrays, or all others."""
    found = []
    for room in ("protocol", "dht", "compute", "node"):
        for folder, _, names in os.walk(ROOT / room):
            for name in sorted(names):
                path = (Path(folder) / name).relative_to(ROOT).as_posix()
                if not path.endswith(".py") or path.startswith(TENSOR_SIDE) or name == "__main__.py":
                    continue
                if path.startswith(ARRAY_SIDE) == arrays:
                    found.append(
                        "mycel." + path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
                    )
    return found


@pytest.mark.parametrize("module", ["mycel", "mycel.cli", "mycel.node.daemon"])
def test_importing_the_front_door_loads_nothing_heavy(module: str) -> None:
    assert loaded_by([module]) == []


def test_no_module_of_the_daemon_loads_anything_heavy() -> None:
    modules = daemon_modules(arrays=False)
    assert "mycel.protocol.ticket" in modules
    assert loaded_by(modules) == []


def test_what_adds_up_arrays_loads_numpy_and_nothing_heavier() -> None:
    assert loaded_by(daemon_modules(arrays=True)) == ["numpy"]


def test_the_check_would_notice() -> None:
    assert loaded_by(["numpy"]) == ["numpy"]
