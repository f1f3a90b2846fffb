"""Weightless stand-ins for the parts of a model that a stage does not serve."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mycel.compute.engine import ModelUnsupported


class StopForward(BaseException):
    """Carries the hidden state out of a forward that has gone far enough. Not an error."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.hidden = hidden


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The hidden state among a layer's arguments: by position, or by its name."""
    found = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(found, torch.Tensor):
        raise ModelUnsupported("a decoder layer is called without its hidden state as first argument")
    return found


def plain_attributes(module: nn.Module) -> dict[str, Any]:
    """Settings that a model's forward may read from its layers (`layer.attention_type` and the like)."""
    return {
        name: value
        for name, value in module.__dict__.items()
        if not name.startswith("_") and name != "training" and isinstance(value, (str, int, float, bool))
    }


class Gate(nn.Module):
    """Stands where a foreign layer was: passes the hidden state along in the form that layers here return."""

    def __init__(self, replaced: nn.Module | None, tuple_size: int) -> None:
        super().__init__()
        self.tuple_size = tuple_size
        if replaced is not None:
            self.__dict__.update(plain_attributes(replaced))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = first_tensor(args, kwargs)
        return hidden if self.tuple_size == 0 else (hidden,) + (None,) * (self.tuple_size - 1)


class Exit(Gate):
    """The gate behind a stage's last layer: ends the forward with what that layer gave."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise StopForward(first_tensor(args, kwargs))


class EdgeGate(nn.Module):
    """Stands where a module outside the layers was; what it returns never reaches an own layer.

    For embeddings and projections it is zeros that broadcast over whatever they are added to, else the first
    argument.
    """

    def __init__(self, replaced: nn.Module) -> None:
        super().__init__()
        self.width = 0
        if isinstance(replaced, nn.Embedding):
            self.width = replaced.embedding_dim
        elif isinstance(replaced, nn.Linear):
            self.width = replaced.out_features
        self.__dict__.update(plain_attributes(replaced))

    @property
    def weight(self) -> torch.Tensor:
        """For models that ask their embedding where it is."""
        return torch.empty(0)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = args[0] if args else next(iter(kwargs.values()))
        if self.width:
            return torch.zeros(1, 1, self.width, device=given.device)
        return given


class Entry(Gate):
    """The gate before a stage's first layer: hands it the hidden state that was received."""

    hidden: torch.Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(self.hidden)


class LayerList(nn.ModuleList):
    """A layer list whose slices are plain lists: models slice theirs in every forward, to loop over it."""

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return list(self._modules.values())[index]
        return super().__getitem__(index)


def replace_module(root: nn.Module, path: str, new: nn.Module) -> None:
    """Put `new` at `path`, in place of what is there."""
    parent_path, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent_path), name, new)
