"""What this machine has to lend: cores, memory, accelerators. Asked of the system, never of torch.

The daemon needs this before any worker runs, to say what it offers and to choose how many layers it takes.
Container limits count: what a cgroup (v2, or v1's memory controller) allows is what there is. GPUs come
from `nvidia-smi` for NVIDIA's and from sysfs for AMD's. A worker, once it runs, says what torch itself can
use (`mycel.compute.pipe.Hello`), which is the last word.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec
import psutil
import trio

SMI_TIMEOUT_S = 5.0
"""nvidia-smi takes 0.1-2 s when the driver is asleep; one that hangs means a GPU that cannot be used."""
SMI_QUERY = ("nvidia-smi", "--query-gpu=index,name,memory.total,memory.free", "--format=csv,noheader,nounits")
CPU_SHARE = 0.5
"""Share of the free main memory that a stage may take unasked: the machine belongs to somebody."""
GPU_SHARE = 0.9
KV_SHARE = 0.2
"""Of a budget, what is set aside for key-value caches."""
MIB = 1024 * 1024


class Accelerator(msgspec.Struct, frozen=True):
    """One GPU. `device` is its name for `StageSpec.device`."""

    device: str
    name: str
    memory_bytes: int
    memory_free_bytes: int


class Machine(msgspec.Struct, frozen=True):
    """What there is, within this process's limits."""

    cores: int
    memory_bytes: int
    memory_free_bytes: int
    accelerators: tuple[Accelerator, ...] = ()


class Budget(msgspec.Struct, frozen=True):
    """What a stage may take, and where."""

    device: str
    weight_bytes: int
    kv_bytes: int


def plan_budget(machine: Machine, *, device: str = "auto", bytes_max: int | None = None) -> Budget:
    """The largest budget that leaves the machine usable, on `device` as `StageSpec.device` names it.

    auto is the first GPU, else the CPU, as for stages. `bytes_max` is what the owner allows for weights and
    caches together.
    """
    chosen, free = "cpu", int(machine.memory_free_bytes * CPU_SHARE)
    for gpu in machine.accelerators:
        if device in ("auto", gpu.device) or (device == "cuda" and gpu.device == "cuda:0"):
            chosen, free = gpu.device, int(gpu.memory_free_bytes * GPU_SHARE)
            break
    if bytes_max is not None:
        free = min(free, bytes_max)
    kv = int(free * KV_SHARE)
    return Budget(chosen, free - kv, kv)


async def probe_machine() -> Machine:
    """Ask the system. Takes up to `SMI_TIMEOUT_S`; a tool that is missing or fails means no such GPU."""
    memory = psutil.virtual_memory()
    limit, used = read_cgroup_memory(Path("/sys/fs/cgroup"))
    total, free = memory.total, memory.available
    if limit is not None:
        total, free = min(total, limit), min(free, max(0, limit - used))
    gpus = [*await _probe_nvidia(), *read_amd(Path("/sys/class/drm"))] if has_gpu_torch() else []
    return Machine(count_cores(Path("/sys/fs/cgroup")), total, free, tuple(gpus))


def has_gpu_torch() -> bool:
    """Whether the installed torch may use a GPU: builds for the CPU alone say so in their version."""
    try:
        return not version("torch").endswith("+cpu")
    except PackageNotFoundError:
        return False


def count_cores(cgroup: Path) -> int:
    """Cores this process may keep busy: its affinity mask, cut by the cgroup's CPU quota; at least 1."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    quota, _, period = _read_text(cgroup / "cpu.max").partition(" ")
    if quota.isdecimal() and period.isdecimal() and int(period):
        cores = min(cores, -(-int(quota) // int(period)))
    return max(1, cores)


def read_cgroup_memory(cgroup: Path) -> tuple[int | None, int]:
    """(limit, used) in bytes of the cgroup mounted at `cgroup`; the limit is None where there is none."""
    for limit_file, used_file in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        limit, used = _read_text(cgroup / limit_file), _read_text(cgroup / used_file)
        if limit.isdecimal() and int(limit) < 1 << 60:  # version 1 says "none" by a huge number
            return int(limit), int(used) if used.isdecimal() else 0
    return None, 0


def read_nvidia(output: str) -> list[Accelerator]:
    """GPUs from nvidia-smi's csv (see `SMI_QUERY`); lines that make no sense are left out."""
    found = []
    for line in output.splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) >= 4 and all(field.isdecimal() for field in (fields[0], *fields[-2:])):
            total, free = (int(field) * MIB for field in fields[-2:])
            found.append(Accelerator(f"cuda:{fields[0]}", ", ".join(fields[1:-2]), total, free))
    return found


def read_amd(drm: Path) -> list[Accelerator]:
    """AMD GPUs as the amdgpu driver shows them in sysfs; torch's ROCm builds call them cuda:N too."""
    found: list[Accelerator] = []
    for card in sorted(drm.glob("card[0-9]*")):
        total = _read_text(card / "device" / "mem_info_vram_total")
        used = _read_text(card / "device" / "mem_info_vram_used")
        if total.isdecimal() and used.isdecimal():
            name = _read_text(card / "device" / "product_name") or "AMD GPU"
            free = max(0, int(total) - int(used))
            found.append(Accelerator(f"cuda:{len(found)}", name, int(total), free))
    return found


async def _probe_nvidia(command: Sequence[str] = SMI_QUERY) -> list[Accelerator]:
    with trio.move_on_after(SMI_TIMEOUT_S):
        try:
            done = await trio.run_process(command, capture_stdout=True, capture_stderr=True, check=False)
        except OSError:  # no such tool
            return []
        if done.returncode == 0:
            return read_nvidia(done.stdout.decode("utf-8", "replace"))
    return []


def _read_text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
