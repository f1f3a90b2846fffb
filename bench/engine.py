"""What a worker process costs a step: the same decode steps inline and through a worker, in turns.

Prints and reports the difference of the medians, per step, for one session and for sixteen that share a step
and hand hidden states of 1024 float32 each way; and how long a worker takes from start to its hello.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import measure
import trio

from mycel.compute.engine import Engine, Span, StageSpec, Work
from mycel.compute.inline import InlineEngine
from mycel.compute.model.tiny import tiny_llama
from mycel.compute.process import WorkerOptions
from mycel.compute.worker import start_worker
from mycel.protocol.tensor import Tensor

HIDDEN = 1024
STEPS = 60
MIDDLE = Span(1, 2)


async def main() -> None:
    """Measure and report."""
    worker = start_worker(WorkerOptions(environment=dict(os.environ)))
    inline = InlineEngine()
    with tempfile.TemporaryDirectory() as folder:
        model = tiny_llama(
            Path(folder) / "model", hidden_size=HIDDEN, num_hidden_layers=3, num_attention_heads=16
        )
        spec = StageSpec(str(model), MIDDLE, device="cpu", threads=1)
        try:
            hello = await worker.hello()
            print(f"a worker is up after {hello.start_s:.2f} s")
            for engine in (inline, worker):
                await engine.load(spec)
            found = await measure.compare(
                {
                    "inline, 1 session": decode(inline, 1),
                    "worker, 1 session": decode(worker, 1),
                    "inline, 16 sessions": decode(inline, 16),
                    "worker, 16 sessions": decode(worker, 16),
                }
            )
        finally:
            await worker.aclose()
    print(found.table("ms", 1e3))
    over = {
        n: found.median(f"worker, {n}") - found.median(f"inline, {n}") for n in ("1 session", "16 sessions")
    }
    measure.report(
        "engine",
        {
            "worker_start_s": hello.start_s,
            "step_overhead_ms_1": over["1 session"] * 1e3,
            "step_overhead_ms_16": over["16 sessions"] * 1e3,
        },
    )


def decode(engine: Engine, sessions: int) -> Callable[[], Awaitable[float]]:
    """Median seconds of a decode step that `sessions` share."""
    hidden = Tensor("float32", (1, HIDDEN), bytes(4 * HIDDEN))

    async def steps() -> float:
        times = []
        for position in range(STEPS):
            works = [Work(f"{sessions}.{i}", MIDDLE, position, hidden=hidden) for i in range(sessions)]
            began = time.perf_counter()
            dones = await engine.step(works)
            times.append(time.perf_counter() - began)
            assert all(done.hidden is not None for done in dones), dones[0].error
        return statistics.median(times)

    return steps


if __name__ == "__main__":
    trio.run(main)
