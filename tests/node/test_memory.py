"""What a node remembers: the same on disk and off it, private, and never half written."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from mycel.node.memory import VALUE_BYTES_MAX, FolderMemory, Memory, VolatileMemory


@pytest.fixture(params=["folder", "volatile"])
def memory(request: pytest.FixtureRequest, tmp_path: Path) -> Memory:
    return FolderMemory(tmp_path / "home") if request.param == "folder" else VolatileMemory()


def test_what_was_put_last_is_got(memory: Memory) -> None:
    assert memory.get("ports") is None
    memory.put("ports", b"1")
    memory.put("ports", b"2")
    memory.put("other", b"")
    assert (memory.get("ports"), memory.get("other")) == (b"2", b"")


def test_files_are_private_and_nothing_else_is_left(tmp_path: Path) -> None:
    FolderMemory(tmp_path / "home").put("ports", b"x")
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["ports.json"]
    assert stat.S_IMODE((tmp_path / "home").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "home" / "ports.json").stat().st_mode) == 0o600


def test_a_file_that_grew_out_of_bounds_is_forgotten(tmp_path: Path) -> None:
    (tmp_path / "ports.json").write_bytes(b"x" * (VALUE_BYTES_MAX + 1))
    assert FolderMemory(tmp_path).get("ports") is None
