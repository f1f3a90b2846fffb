"""How figures are taken here, so that all benchmarks mean the same by "median" and "ratio".

A machine's speed drifts by the minute, so only ratios between things measured in one run are to be trusted.
`compare` therefore interleaves what it compares, a b c a b c a b c, and takes each one's median; a ratio of
two medians of one `Comparison` is what a README may quote. Absolute figures go with the `machine` line.

Every benchmark prints its findings as it goes and, last, one line of JSON (`report`).
"""

from __future__ import annotations

import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

ROUNDS = 5

Measure = Callable[[], Awaitable[float]]
"""Does the thing once and returns its figure (seconds, bytes per second, ...)."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """The figures of several ways, round by round."""

    figures: Mapping[str, Sequence[float]]

    def median(self, way: str) -> float:
        """The median figure of `way`."""
        return statistics.median(self.figures[way])

    def ratio(self, way: str, base: str) -> float:
        """Median of `way` over median of `base`."""
        return self.median(way) / self.median(base)

    def spread(self, way: str) -> float:
        """(Largest - smallest) / median: how far to trust the median."""
        return (max(self.figures[way]) - min(self.figures[way])) / self.median(way)

    def table(self, unit: str, scale: float = 1.0) -> str:
        """One line per way for people: median, spread; figures are multiplied by `scale` to be in `unit`."""
        width = max(len(way) for way in self.figures)
        return "\n".join(
            f"  {way:{width}}  {self.median(way) * scale:12.4g} {unit}  (spread {self.spread(way):.0%})"
            for way in self.figures
        )


async def compare(ways: Mapping[str, Measure], *, rounds: int = ROUNDS, warmup: int = 1) -> Comparison:
    """Measure every way `rounds` times, in turns, after `warmup` rounds that do not count.

    Garbage is collected before and not during a measurement.
    """
    figures: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(-warmup, rounds):
        for way, measure in ways.items():
            with no_garbage_collection():
                figure = await measure()
            if number >= 0:
                figures[way].append(figure)
    return Comparison(figures)


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Keep the garbage collector out of a measurement."""
    gc.collect()
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@contextmanager
def stopwatch() -> Iterator[Callable[[], float]]:
    """Wall seconds since entering: `with stopwatch() as seconds: ...; seconds()`."""
    began = time.perf_counter()
    yield lambda: time.perf_counter() - began


@contextmanager
def cpu_stopwatch() -> Iterator[Callable[[], float]]:
    """CPU seconds (user and system) of this process since entering, all threads together."""
    began = time.process_time()
    yield lambda: time.process_time() - began


def machine() -> dict[str, str | int]:
    """What the figures were taken on."""
    import psutil

    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 0,
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


Figure = float | int | str | bool | None | Sequence["Figure"]
"""What a result may hold: a number, a word, or a row of them."""


def report(name: str, figures: Mapping[str, Figure]) -> None:
    """Print the benchmark's last line: one JSON object with `bench`, the figures, and the machine."""
    rounded = {key: _rounded(value) for key, value in figures.items()}
    print(json.dumps({"bench": name, **rounded, "machine": machine()}), flush=True)


def _rounded(value: Figure) -> Figure:
    if isinstance(value, list | tuple):
        return [_rounded(one) for one in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
