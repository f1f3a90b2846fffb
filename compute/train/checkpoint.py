"""Checkpoints of a course: a safetensors file with the model's tensors and the outer momentum.

Anybody's safetensors reader finds the weights in it under their names. A later course goes on from it on any
number of peers: nothing in it depends on how many there were.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from mycel.compute.train.border import Border, BorderOptions
from mycel.compute.train.layout import Entry, Layout
from mycel.compute.train.outer import Flat
from mycel.compute.train.rows import flatten, from_safetensors, to_safetensors, unflatten
from mycel.protocol.errors import UsageProblem

MOMENTUM = "outer.momentum"
"""The tensor behind the model's, of as many numbers as all of those together."""
STEPS = "steps"
"""The metadata that says how many outer steps there were."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What to begin with."""

    layout: Layout
    weights: Flat
    momentum: Flat | None = None
    """None: the weights of a model that was in no course."""
    steps: int = 0

    def laid_out(self, layout: Layout) -> Checkpoint:
        """The same tensors in the order of `layout`; others are left out.

        Raises `UsageProblem` where one is lacking or of another shape.
        """
        if layout == self.layout:
            return self

        def ordered(row: Flat) -> Flat:
            held = unflatten(row, self.layout)
            for entry in layout.entries:
                if entry.name not in held or held[entry.name].shape != entry.shape:
                    raise UsageProblem(f"this checkpoint has no {entry.name!r} of shape {entry.shape}")
            return flatten({entry.name: held[entry.name] for entry in layout.entries}, layout)

        momentum = None if self.momentum is None else ordered(self.momentum)
        return Checkpoint(layout, ordered(self.weights), momentum, self.steps)

    def border(self, options: BorderOptions) -> Border:
        """The state to go on from."""
        border = Border(self.weights, options)
        if self.momentum is not None:
            border.state()["momentum"][:] = self.momentum
        border.state()["steps"][0] = self.steps
        return border


def write_checkpoint(border: Border, layout: Layout) -> bytes:
    """The state of a course whose model lies as `layout` says."""
    state = border.state()
    both = np.concatenate([border.weights, state["momentum"].astype(np.float32, copy=False)])
    entries = (*layout.entries, Entry(MOMENTUM, (layout.size,)))
    return to_safetensors(both, Layout(entries), {STEPS: str(border.steps)})


def read_checkpoint(content: bytes) -> Checkpoint:
    """A checkpoint, or a plain model, of float32 tensors. Raises `UsageProblem`."""
    flat, layout, extra = from_safetensors(content)
    last = layout.entries[-1] if layout.entries else None
    if last is None or last.name != MOMENTUM:
        return Checkpoint(layout, flat)
    layout = msgspec.structs.replace(layout, entries=layout.entries[:-1])
    if last.shape != (layout.size,):
        raise UsageProblem(f"a checkpoint of {layout.size} weights with a momentum of shape {last.shape}")
    steps = extra.get(STEPS, "")
    if not steps.isdecimal():
        raise UsageProblem(f"a checkpoint's {STEPS} are a number, not {steps[:20]!r}")
    return Checkpoint(layout, flat[: layout.size], flat[layout.size :], int(steps))


def load_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in a file. Raises `UsageProblem`."""
    try:
        return read_checkpoint(path.read_bytes())
    except OSError as error:
        raise UsageProblem(f"{path} cannot be read: {error.strerror}") from error
