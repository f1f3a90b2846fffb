"""What this machine's devices do, measured: products in fp32 and bf16, and reading memory.

Names of devices say little: how a processor is cooled, what else runs, and which instructions torch knows
decide more. So a child process (`mycel.compute.model.probe`), at the lowest priority and for a second or two,
multiplies matrices and reads memory on each device, and ends. The best of a few short trials counts: whatever
else ran meanwhile only takes away.

A decode step reads weights, so reading memory bounds it; a prefill or a training step multiplies.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import replace

import msgspec

from mycel.compute.child import Child
from mycel.compute.pipe import Operation
from mycel.compute.process import WorkerOptions, start_process

SERVE = "mycel.compute.model.probe"
LIMIT_S = 60.0
"""For a probe on a machine that is full of other work."""


class Ask(msgspec.Struct, frozen=True):
    """Measure, with `threads` cores (0: all that this process may use)."""

    threads: int = 0


class Speed(msgspec.Struct, frozen=True):
    """What one device does."""

    device: str
    """As `StageSpec.device` names it."""
    name: str
    memory_bytes: int
    memory_free_bytes: int
    fp32_gflops: float
    """Billions of floating-point operations per second in a large product of matrices."""
    bf16_gflops: float
    """0 where torch cannot multiply in it there."""
    read_gb_s: float
    """Billions of bytes per second in reading more memory than any cache holds."""


class Measured(msgspec.Struct, frozen=True):
    """All devices, GPUs first."""

    torch: str
    """torch's version."""
    cores: int
    """Cores that were used for the CPU's figures."""
    speeds: tuple[Speed, ...]


MEASURE = Operation("measure", Ask, Measured)


async def measure(environment: Mapping[str, str], threads: int = 0) -> Measured:
    """Measure in a process that ends with this call, also where it is cancelled.

    Takes 2 to 5 s, mostly torch's import. Raises `EngineLost` where the process fails, `OSError` where it
    cannot be started.
    """
    options = replace(WorkerOptions(environment=environment), serve=SERVE, threads=threads)
    child = Child(start_process(options), options)
    try:
        return await child.ask(MEASURE, Ask(threads), limit_s=LIMIT_S)
    except BaseException:  # why: whoever is cancelled wants the machine at once, not in order; raised again
        child.kill("the measurement was given up")
        raise
    finally:
        with contextlib.suppress(OSError):
            await child.aclose()
