"""What a machine has, read from what the system says."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from mycel.compute.device import (
    MIB,
    Accelerator,
    Machine,
    _probe_nvidia,
    count_cores,
    has_gpu_torch,
    plan_budget,
    probe_machine,
    read_amd,
    read_cgroup_memory,
    read_nvidia,
)

GIB = 1024 * MIB


def test_nvidia_lines() -> None:
    output = (
        "0, NVIDIA H200, 143771, 143000\n1, Odd, Name, 1000, 10\nNo devices were found\n2, x, [N/A], 5\n\n"
    )
    assert read_nvidia(output) == [
        Accelerator("cuda:0", "NVIDIA H200", 143771 * MIB, 143000 * MIB),
        Accelerator("cuda:1", "Odd, Name", 1000 * MIB, 10 * MIB),
    ]


@pytest.mark.parametrize(
    ("code", "found"),
    [("print('0, G, 100, 50')", 1), ("import sys; print('0, G, 100, 50'); sys.exit(9)", 0)],
)
async def test_nvidia_tool(code: str, found: int) -> None:
    assert len(await _probe_nvidia([sys.executable, "-S", "-c", code])) == found


async def test_missing_tool_means_no_gpu() -> None:
    assert await _probe_nvidia(["/nowhere/nvidia-smi"]) == []


def test_amd_cards(tmp_path: Path) -> None:
    for card, total in (("card0", None), ("card1", "17163091968\n")):
        (tmp_path / card / "device").mkdir(parents=True)
        if total:
            (tmp_path / card / "device" / "mem_info_vram_total").write_text(total)
            (tmp_path / card / "device" / "mem_info_vram_used").write_text("163091968\n")
    assert read_amd(tmp_path) == [Accelerator("cuda:0", "AMD GPU", 17163091968, 17_000_000_000)]


@pytest.mark.parametrize(
    ("limit", "used", "expected"),
    [("max\n", "5\n", (None, 0)), ("4294967296\n", "100\n", (4294967296, 100)), ("junk", "", (None, 0))],
)
def test_cgroup_memory(tmp_path: Path, limit: str, used: str, expected: tuple[int | None, int]) -> None:
    (tmp_path / "memory.max").write_text(limit)
    (tmp_path / "memory.current").write_text(used)
    assert read_cgroup_memory(tmp_path) == expected


def test_old_cgroup_memory(tmp_path: Path) -> None:
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert read_cgroup_memory(tmp_path) == (None, 0)
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("1073741824\n")
    assert read_cgroup_memory(tmp_path) == (1073741824, 0)


def test_cores_are_cut_by_the_quota(tmp_path: Path) -> None:
    mine = len(os.sched_getaffinity(0))
    assert count_cores(tmp_path) == mine
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert count_cores(tmp_path) == mine
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert count_cores(tmp_path) == 1


async def test_this_machine() -> None:
    machine = await probe_machine()
    assert 1 <= machine.cores <= (os.cpu_count() or 1)
    assert 0 < machine.memory_free_bytes <= machine.memory_bytes


def test_budget_is_for_the_device_that_stages_will_use() -> None:
    gpus = (Accelerator("cuda:0", "a", 80 * GIB, 10 * GIB), Accelerator("cuda:1", "b", 40 * GIB, 40 * GIB))
    machine = Machine(4, 64 * GIB, 32 * GIB, gpus)
    for device, chosen, total in (
        ("auto", "cuda:0", 9 * GIB),
        ("cuda", "cuda:0", 9 * GIB),
        ("cuda:1", "cuda:1", 36 * GIB),
        ("cpu", "cpu", 16 * GIB),
    ):
        budget = plan_budget(machine, device=device)
        assert budget.device == chosen
        assert budget.weight_bytes + budget.kv_bytes == pytest.approx(total, abs=2)
        assert budget.weight_bytes > budget.kv_bytes > 0
    small = plan_budget(Machine(4, 64 * GIB, 32 * GIB), bytes_max=GIB)
    assert (small.device, small.weight_bytes + small.kv_bytes) == ("cpu", GIB)


def test_cpu_builds_of_torch_are_known_without_importing_it() -> None:
    import torch

    assert has_gpu_torch() == (torch.version.cuda is not None or torch.version.hip is not None)
