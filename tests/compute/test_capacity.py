"""Measuring this machine, in a real child process."""

from __future__ import annotations

import os

import psutil
import pytest
import trio

from mycel.compute.capacity import measure
from mycel.compute.engine import EngineLost


def children() -> list[psutil.Process]:
    """Measuring processes of this one."""
    return [one for one in psutil.Process().children() if "mycel.compute.model.probe" in one.cmdline()]


async def test_what_the_processor_does_is_measured_by_a_child_that_ends() -> None:
    with trio.fail_after(60):
        measured = await measure(os.environ, threads=1)
    cpu = measured.speeds[-1]
    assert (cpu.device, measured.cores) == ("cpu", 1)
    assert cpu.memory_bytes > cpu.memory_free_bytes > 0
    assert 0.05 < cpu.fp32_gflops < 10_000
    assert cpu.bf16_gflops > 0
    assert 0.05 < cpu.read_gb_s < 2000
    assert not children()


async def test_a_measurement_that_is_given_up_leaves_no_process() -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(measure, os.environ)
        with trio.fail_after(20):
            while not children():  # noqa: ASYNC110
                await trio.sleep(0.01)
        nursery.cancel_scope.cancel()
    assert not children()


async def test_a_child_that_dies_is_a_loss() -> None:
    async with trio.open_nursery() as nursery:

        async def expect() -> None:
            with pytest.raises(EngineLost):
                await measure(os.environ)

        nursery.start_soon(expect)
        with trio.fail_after(20):
            while not children():  # noqa: ASYNC110
                await trio.sleep(0.01)
        children()[0].kill()
