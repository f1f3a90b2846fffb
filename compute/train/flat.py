"""A torch module's weights as one row of float32, there and back.

Collectives and the outer optimizer work on rows; what a row means is its layout, which all peers must share
to the last name and shape. Its fingerprint says so before anything is added up.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch

from mycel.compute.train.layout import Entry, Layout
from mycel.compute.train.outer import Flat
from mycel.protocol.errors import LocalProtocolError


class FlatModule:
    """The trained weights of a module, in the order of their names; a weight tied to two names counts
    once."""

    def __init__(self, module: torch.nn.Module) -> None:
        """Raises `LocalProtocolError` for a module without trained weights."""
        named = [(name, weight) for name, weight in module.named_parameters() if weight.requires_grad]
        if not named:
            raise LocalProtocolError(
                "the module has no weights that require gradients: nothing can be trained"
            )
        self._named = sorted(named, key=lambda pair: pair[0])
        self.count = sum(weight.numel() for _, weight in self._named)
        """Numbers in the row."""

    @property
    def layout(self) -> Layout:
        """How they lie in the row."""
        return Layout(tuple(Entry(name, tuple(weight.shape)) for name, weight in self._named))

    def fingerprint(self) -> str:
        """A short name of the layout: names and shapes of the weights, in order."""
        told = ";".join(f"{name}:{tuple(weight.shape)}" for name, weight in self._named)
        return hashlib.sha256(told.encode()).hexdigest()[:16]

    def read(self) -> Flat:
        """The weights now, shape [count], a copy."""
        return self._gather([weight.detach() for _, weight in self._named])

    def read_gradients(self) -> Flat:
        """The gradients now, shape [count], a copy; zeros for a weight that has none."""
        return self._gather(
            [torch.zeros_like(weight) if weight.grad is None else weight.grad for _, weight in self._named]
        )

    def write(self, row: Flat) -> None:
        """Set the weights to `row`, shape [count]."""
        for (_, weight), part in zip(self._named, self._split(row), strict=True):
            with torch.no_grad():
                weight.copy_(part.view(weight.shape))

    def write_gradients(self, row: Flat) -> None:
        """Set the gradients to `row`, shape [count]."""
        for (_, weight), part in zip(self._named, self._split(row), strict=True):
            weight.grad = part.view(weight.shape).to(weight.device, weight.dtype, copy=True)

    def _gather(self, tensors: list[torch.Tensor]) -> Flat:
        row = np.empty(self.count, np.float32)
        for tensor, part in zip(tensors, self._split(row), strict=True):
            part.copy_(tensor.reshape(-1))
        return row

    def _split(self, row: Flat) -> list[torch.Tensor]:
        if row.shape != (self.count,):
            raise LocalProtocolError(f"a row of shape {row.shape} for a module of {self.count} weights")
        return list(torch.split(torch.from_numpy(row), [weight.numel() for _, weight in self._named]))
