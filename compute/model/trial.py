"""Try a freshly loaded stage out: what a cached row looks like, and which way of packing is right for it.

A few rows of made-up input are run. They also page the weights in, so that the first real step is not the one
that waits for the disk.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mycel.compute.engine import ModelUnsupported, Span
from mycel.compute.model.cache import RowShape, SessionCache
from mycel.compute.model.forward import Forward
from mycel.compute.model.packed import WAYS, Way

SEEDS = (1, 2, 3)
"""A way of packing is right if one of these shows it: a near tie in a router may spoil another."""


@dataclass(frozen=True)
class Trial:
    """What was learned."""

    shapes: tuple[RowShape | int, ...]
    """Per own layer: a cached row's shape, or the bytes of a state of fixed size."""
    hidden_dtype: torch.dtype
    """Of the hidden states between layers."""
    way: Way | None
    """How sessions can share a forward; None: they cannot."""


def try_out(forward: Forward, span: Span, width: int, vocab: int) -> Trial:
    """Run the stage over `span` of a model `width` wide. Raises `ModelUnsupported` if it cannot run."""
    probe = Probe(forward, span, width, vocab)
    cache = SessionCache(forward.plans, span)
    try:
        with forward.watching_dtype(span) as hidden_dtypes:
            probe.alone(cache, 3, seed=0)
        steps = any(probe.runs_in_steps(seed) for seed in SEEDS)
    except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
        raise ModelUnsupported(
            f"layers {span.start}:{span.end} do not run by themselves ({type(error).__name__}: {error})"
        ) from error
    if not steps:
        raise ModelUnsupported(
            "running rows in steps does not give what running them at once gives: "
            "its attention looks ahead, or it keeps no cache; only causal models can be served"
        )
    return Trial(cache.shapes(), hidden_dtypes[-1], find_way(probe))


def find_way(probe: Probe) -> Way | None:
    """The first way of packing that comes out right. A short trial cannot judge what only shows behind a
    window, so layers must be of kinds whose masks are known, and a joint mask needs a model without windows.
    """
    span, forward = probe.span, probe.forward
    if not all(plan.is_plain for plan in forward.plans[span.start : span.end]):
        return None
    for way in WAYS:
        if way == "masked" and forward.has_windows:
            continue
        if any(probe.packs(way, seed) for seed in SEEDS):
            return way
    return None


class Probe:
    """Made-up input for one stage."""

    def __init__(self, forward: Forward, span: Span, width: int, vocab: int) -> None:
        self.forward = forward
        self.span = span
        self.width = width
        self.vocab = vocab

    def inputs(self, rows: int, seed: int) -> torch.Tensor:
        """`rows` rows, the same for the same seed."""
        random = torch.Generator().manual_seed(seed)
        if self.span.start == 0:
            return torch.randint(self.vocab, (1, rows), generator=random).to(self.forward.device)
        hidden = torch.randn(1, rows, self.width, generator=random)
        return hidden.to(device=self.forward.device, dtype=self.forward.dtype)

    def alone(self, cache: SessionCache, rows: int, seed: int) -> torch.Tensor:
        """A step alone; its last row."""
        return self.forward.alone(self.span, self.inputs(rows, seed), cache)[-1]

    def runs_in_steps(self, seed: int) -> bool:
        """Whether rows one after another give what they give at once, up to rounding."""
        rows = self.inputs(4, seed)
        whole, steps = (SessionCache(self.forward.plans, self.span) for _ in range(2))
        expected = self.forward.alone(self.span, rows, whole)[-1]
        self.forward.alone(self.span, rows[:, :2], steps)
        self.forward.alone(self.span, rows[:, 2:3], steps)
        return self.close(self.forward.alone(self.span, rows[:, 3:], steps)[-1], expected)

    def close(self, got: torch.Tensor, wanted: torch.Tensor) -> bool:
        """Whether two rows are the same up to rounding."""
        tolerance = 1e-3 if self.forward.dtype == torch.float32 else 5e-2
        return bool((got - wanted).float().norm() <= tolerance * wanted.float().norm())

    def packs(self, way: Way, seed: int) -> bool:
        """Whether three sessions, packed that way, get what each gets alone, up to rounding."""
        past, new = (5, 0, 2), (1, 2, 3)
        seeds = (seed * 100, seed * 100 + 30, seed * 100 + 60)
        alone = [SessionCache(self.forward.plans, self.span) for _ in past]
        together = [SessionCache(self.forward.plans, self.span) for _ in past]
        expected = []
        for index, own_seed in enumerate(seeds):
            if past[index]:
                self.alone(alone[index], past[index], own_seed)
                self.alone(together[index], past[index], own_seed)
            expected.append(self.alone(alone[index], new[index], own_seed + 1))
        rows = torch.cat([self.inputs(new[index], seeds[index] + 1) for index in range(len(past))], dim=1)
        try:
            outs = self.forward.packed(self.span, rows, together, new, way)
        except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError, ModelUnsupported):
            return False
        return all(self.close(out[-1], wanted) for out, wanted in zip(outs, expected, strict=True))
