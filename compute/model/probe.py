"""Measuring devices, in a process of its own: see `mycel.compute.capacity`.

Each figure is the best of trials within a fraction of a second. Sizes fit the device: matrices large enough
that starting a product does not count, memory read that no cache holds.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable

import torch

from mycel.compute.capacity import MEASURE, Ask, Measured, Speed
from mycel.compute.model.devices import see_devices
from mycel.compute.model.memory import is_out_of_memory
from mycel.compute.parent import Connection
from mycel.compute.pipe import FAILURE, HELLO, Failure, Hello
from mycel.protocol.frame import FrameKind

TRIALS = 5
TRIAL_S = 0.15
"""Time for all trials of one figure; at least one is made."""
CPU_SIDE = 768
"""Rows and columns: a product is 0.9 GFLOP, 10 ms on a laptop."""
GPU_SIDE = 4096
CPU_READ_BYTES = 96 << 20
"""Beyond the last cache of most machines, and read in 10 ms."""
GPU_READ_BYTES = 1 << 30
SPARE_BYTES = 3 << 30
"""A GPU with less free memory than this is full of somebody's work: it is left alone."""


def measure(ask: Ask) -> Measured:
    """Every device that torch sees."""
    if ask.threads:
        torch.set_num_threads(ask.threads)
    speeds = []
    with torch.inference_mode():
        for found in see_devices():
            is_cpu = found.name == "cpu"
            fp32 = bf16 = read = 0.0
            if is_cpu or found.memory_free_bytes >= SPARE_BYTES:
                side = CPU_SIDE if is_cpu else GPU_SIDE
                fp32 = multiply(found.name, torch.float32, side)
                bf16 = multiply(found.name, torch.bfloat16, side)
                read = read_memory(found.name, CPU_READ_BYTES if is_cpu else GPU_READ_BYTES)
            name = found.description if not is_cpu else cpu_name()
            speeds.append(
                Speed(found.name, name, found.memory_bytes, found.memory_free_bytes, fp32, bf16, read)
            )
    return Measured(str(torch.__version__), torch.get_num_threads(), tuple(speeds))


def multiply(device: str, dtype: torch.dtype, side: int) -> float:
    """GFLOP/s of a product of two square matrices; 0 where there is none of that kind, or no room."""
    try:
        a = torch.ones(side, side, dtype=dtype, device=device)
        out = torch.empty_like(a)
        seconds = best(device, lambda: torch.mm(a, a, out=out))
    except RuntimeError as error:
        if is_out_of_memory(error) or "not implemented" in str(error):
            return 0.0
        raise
    return round(2 * side**3 / seconds / 1e9, 1)


def read_memory(device: str, nbytes: int) -> float:
    """GB/s of adding up what stands in memory; 0 where there is no room."""
    try:
        data = torch.ones(nbytes // 4, dtype=torch.float32, device=device)
        seconds = best(device, data.sum)
    except RuntimeError as error:
        if is_out_of_memory(error):
            return 0.0
        raise
    return round(nbytes / seconds / 1e9, 1)


def best(device: str, work: Callable[[], object]) -> float:
    """Seconds of the quickest trial; the first, which warms up, counts only where it took all the time."""
    until = time.perf_counter() + TRIAL_S
    times: list[float] = []
    while len(times) <= TRIALS and (len(times) < 2 or time.perf_counter() < until):
        began = time.perf_counter()
        work()
        if device != "cpu":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
        if times[0] > TRIAL_S:
            break
    return min(times)


def cpu_name() -> str:
    """What the processor calls itself, where the system says it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return "CPU"


def serve(sock: socket.socket, tidy: Callable[[], None]) -> int:
    """Say hello, measure as often as asked, end with the daemon's end of the socket; the exit status."""
    os.nice(19)
    connection = Connection(sock)
    hello = Hello(os.getpid(), str(torch.__version__), (), 0.0)
    try:
        connection.send(FrameKind.RESPONSE, 0, HELLO.encode(hello))
        while (request := connection.receive()) is not None:
            tidy()
            ask = MEASURE.request.decode(request.body, request.raws)
            try:
                answer = MEASURE.response.encode(measure(ask))
            except RuntimeError as error:  # what a driver makes of it
                failure = Failure("crash", f"{type(error).__name__}: {error}")
                connection.send(FrameKind.ERROR, request.call, FAILURE.encode(failure))
                return 1
            connection.send(FrameKind.RESPONSE, request.call, answer)
    except (BrokenPipeError, ConnectionResetError):
        pass  # the daemon is gone, or does not want to know any more
    return 0
