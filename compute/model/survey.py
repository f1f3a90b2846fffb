"""Find out how a model is built, without knowing its family and without its weights.

The class is built without memory (torch's meta device), every module with weights is replaced by a gate that
writes down its turn, and one forward is run through the gates: the **survey**. It tells which modules work
before, between and after the layers, and whether a layer hands on anything but the hidden state: every gate's
output is tracked by autograd, so a tensor that reaches a layer beside the hidden state and stems from the
embeddings or another layer is seen. A model that does so (keys and values shared between layers, residuals
from the first layer, per-layer embeddings) cannot be cut, and the error says why.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DummyLayer, DynamicCache

from mycel.compute.engine import ModelUnsupported
from mycel.compute.model.gates import EdgeGate, Gate, first_tensor, replace_module
from mycel.compute.model.quiet import quiet_transformers


@dataclass(frozen=True)
class Anatomy:
    """What the survey found: module paths, in the model's own names."""

    layers_path: str
    n_layers: int
    before: tuple[str, ...]
    """Modules with weights that work before the first layer (embeddings)."""
    after: tuple[str, ...]
    """Modules with weights that work after the last layer (norm, head)."""
    idle: tuple[str, ...]
    """Modules with weights that text does not pass (a vision tower)."""
    tied: tuple[tuple[str, str], ...]
    """(target, source) parameter names that share one tensor."""
    tuple_size: int
    """What a layer returns: 0 a tensor, else a tuple of this many."""
    cache_argument: str
    layer_bytes: int
    """Largest layer's parameters and buffers in the checkpoint's dtype."""
    edge_bytes: int
    """All other weights that text passes."""
    split_refusal: str | None
    """Why this model can only be served whole; None when it can be cut."""


def causal_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The `*ForCausalLM` class that transformers registers for this config; `ModelUnsupported` if none."""
    mapping = AutoModelForCausalLM._model_mapping
    if type(config) not in mapping:
        raise ModelUnsupported(
            f"{config.model_type}: transformers has no causal language model for this config; "
            "Mycel serves what AutoModelForCausalLM knows (custom code of a repository is never run)"
        )
    found = mapping[type(config)]
    chosen: Any = found[0] if isinstance(found, (list, tuple)) else found
    return cast(type[PreTrainedModel], chosen)


def text_part(config: PretrainedConfig) -> PretrainedConfig:
    """The config that the causal class is built from: a composite model's text part where it takes that."""
    wanted = causal_class(config).config_class
    parts = getattr(config, "sub_configs", None) or {}
    if wanted is not None and not isinstance(config, wanted) and parts.get("text_config") is wanted:
        part: PretrainedConfig = config.get_text_config(decoder=True)
        return part
    return config


def find_layers(model: PreTrainedModel, config: PretrainedConfig) -> str:
    """Path of the module list that holds the decoder layers."""
    wanted: int = config.get_text_config(decoder=True).num_hidden_layers
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == wanted
    ]
    if not found:
        raise ModelUnsupported(
            f"{type(model).__name__}: no list of {wanted} decoder layers was found in the model; "
            "it cannot be cut into stages"
        )
    textual = [
        name for name in found if "vision" not in name and "audio" not in name and "encoder" not in name
    ]
    shallow: str = min(textual or found, key=lambda name: (name.count("."), name))
    return shallow


def edge_modules(model: nn.Module, layers_path: str) -> list[str]:
    """Modules with weights of their own that neither hold the layer list nor lie in it."""
    found: list[str] = []

    def holds(path: str) -> bool:
        return layers_path.startswith(path + ".")

    def walk(path: str) -> None:
        for name, child in model.get_submodule(path).named_children():
            child_path = f"{path}.{name}" if path else name
            if child_path == layers_path:
                continue
            if next(child.parameters(recurse=False), None) is not None and not holds(child_path):
                found.append(child_path)
            elif next(child.parameters(), None) is not None:
                walk(child_path)

    walk("")
    return found


def build_empty(model_class: type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    """The model without memory: all parameters on torch's meta device."""
    with quiet_transformers(), torch.device("meta"), default_dtype(torch.float32):
        return model_class(config)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """torch's default dtype for a while."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@dataclass
class Survey:
    """The dry run's notebook."""

    tuple_size: int
    calls: list[tuple[str, str]] = field(default_factory=list)
    """(kind, path): kind is "layer" or "edge"."""
    expected: torch.Tensor | None = None
    changed_between: bool = False
    strays: list[str] = field(default_factory=list)


def tracked(shape: Sequence[int]) -> torch.Tensor:
    """Zeros that autograd follows, and that a model may write into."""
    return torch.zeros(*shape, requires_grad=True) + 0.0


class SurveyLayer(Gate):
    """A layer gate that writes down what the layer would have been given."""

    def __init__(self, replaced: nn.Module, survey: Survey, index: int) -> None:
        super().__init__(replaced, survey.tuple_size)
        self.survey = survey
        self.index = index

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = first_tensor(args, kwargs)
        survey = self.survey
        if self.index > 0 and hidden is not survey.expected:
            survey.changed_between = True
        survey.calls.append(("layer", str(self.index)))
        for name, value in [*((f"argument {i}", a) for i, a in enumerate(args)), *kwargs.items()]:
            self._note_stray(name, value, hidden)
        out = tracked(hidden.shape)
        survey.expected = out
        return out if self.tuple_size == 0 else (out,) + (None,) * (self.tuple_size - 1)

    def _note_stray(self, name: str, value: Any, hidden: torch.Tensor) -> None:
        if value is hidden:
            return
        if isinstance(value, torch.Tensor):
            if value.requires_grad or name == "input_ids":
                self.survey.strays.append(name)
        elif isinstance(value, (tuple, list)):
            for part in value:
                self._note_stray(name, part, hidden)
        elif isinstance(value, MutableMapping):
            self.survey.strays.append(name)


class SurveyEdge(EdgeGate):
    """An edge gate that writes down its turn."""

    def __init__(self, replaced: nn.Module, survey: Survey, path: str) -> None:
        super().__init__(replaced)
        self.survey = survey
        self.path = path

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.survey.calls.append(("edge", self.path))
        if not self.width:
            return super().forward(*args, **kwargs)
        return tracked((1, 2, self.width))


class SurveyCache(DynamicCache):
    """A cache of nothing, for the dry run."""

    def __init__(self, n_layers: int) -> None:
        super().__init__()
        self.layer_class_to_replicate = None
        self.layers = [DummyLayer() for _ in range(n_layers)]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return query_length, 0

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return False


def cache_argument(model_class: type[PreTrainedModel]) -> str:
    """How this model's forward calls its cache."""
    names = model_class.forward.__code__.co_varnames
    wrapped = getattr(model_class.forward, "__wrapped__", None)
    while wrapped is not None:
        names = wrapped.__code__.co_varnames
        wrapped = getattr(wrapped, "__wrapped__", None)
    return "cache_params" if "cache_params" in names else "past_key_values"


def run_survey(
    model_class: type[PreTrainedModel], config: PretrainedConfig, layers_path: str, tuple_size: int
) -> Survey:
    """One dry run, with layers that return a tensor (0) or a tuple of `tuple_size`."""
    model = build_empty(model_class, config)
    survey = Survey(tuple_size)
    layers = model.get_submodule(layers_path)
    assert isinstance(layers, nn.ModuleList)
    for path in edge_modules(model, layers_path):
        replace_module(model, path, SurveyEdge(model.get_submodule(path), survey, path))
    for index, layer in enumerate(list(layers)):
        layers[index] = SurveyLayer(layer, survey, index)
    model.to_empty(device="cpu")
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.detach().zero_()
    model.eval()
    cache = {cache_argument(model_class): SurveyCache(len(layers))}
    with torch.enable_grad():
        model(input_ids=torch.zeros(1, 2, dtype=torch.long), use_cache=True, **cache)
    return survey


def try_survey(
    model_class: type[PreTrainedModel], config: PretrainedConfig, layers_path: str
) -> tuple[Survey | None, str]:
    """The first dry run in which every layer is given just what the one before returned, or why none was."""
    why = ""
    for tuple_size in (0, 1, 2, 3):
        try:
            with quiet_transformers():
                survey = run_survey(model_class, config, layers_path, tuple_size)
        except (ModelUnsupported, ValueError, TypeError, IndexError, RuntimeError, AttributeError) as error:
            why = why or f"its forward cannot run around its layers ({type(error).__name__}: {error})"
            continue
        if not survey.changed_between:
            return survey, ""
        why = why or "the hidden state is changed between layers"
    return None, why


def refusal(survey: Survey, config: PretrainedConfig, n_layers: int) -> str | None:
    """Why a surveyed model cannot be cut, or None."""
    text = config.get_text_config(decoder=True)
    sharing = getattr(text, "num_kv_shared_layers", 0) or getattr(text, "kv_sharing_modes", None)
    if sharing:
        return "layers share key-value caches across the cut"
    order = [int(path) for kind, path in survey.calls if kind == "layer"]
    if order != list(range(n_layers)):
        return "its forward does not run the layers once each, in order"
    if survey.strays:
        return f"layers are handed more than the hidden state ({', '.join(sorted(set(survey.strays)))})"
    kinds = [kind for kind, _ in survey.calls]
    first, last = kinds.index("layer"), len(kinds) - 1 - kinds[::-1].index("layer")
    between = [path for kind, path in survey.calls[first:last] if kind == "edge"]
    if between:
        return f"{between[0]} works between the layers"
    return None


def module_bytes(module: nn.Module, itemsize: int) -> int:
    """Bytes of a module's parameters and saved buffers, floating ones at `itemsize`."""
    return sum(
        tensor.numel() * (itemsize if tensor.is_floating_point() else tensor.element_size())
        for tensor in module.state_dict().values()
    )


def whole_branches(paths: Sequence[str], used: Collection[str], layers_path: str) -> tuple[str, ...]:
    """The topmost modules that hold `paths` and nothing used, nor the layers: a whole vision tower."""
    tops: list[str] = []
    for path in paths:
        parent = path.rpartition(".")[0]
        while parent and not any(f"{other}.".startswith(f"{parent}.") for other in (*used, layers_path)):
            path, parent = parent, parent.rpartition(".")[0]
        if path not in tops:
            tops.append(path)
    return tuple(tops)


def examine(config: PretrainedConfig, itemsize: int) -> Anatomy:
    """Find out how this model is built. `itemsize`: bytes per weight in the checkpoint.

    Raises `ModelUnsupported` when transformers has no causal model for the config or no layers are found.
    """
    model_class = causal_class(config)
    try:
        model = build_empty(model_class, config)
    except Exception as error:  # boundary: a config decides what a model's constructor does
        raise ModelUnsupported(
            f"{model_class.__name__} cannot be built from its config.json "
            f"({type(error).__name__}: {error}); check the file, or update transformers"
        ) from error
    layers_path = find_layers(model, config)
    layers = model.get_submodule(layers_path)
    assert isinstance(layers, nn.ModuleList)
    edges = edge_modules(model, layers_path)
    survey, why = try_survey(model_class, config, layers_path)
    before: list[str] = []
    after: list[str] = []
    if survey is not None:
        why = refusal(survey, config, len(layers)) or ""
        seen_layer = False
        for kind, path in survey.calls:
            seen_layer = seen_layer or kind == "layer"
            if kind == "edge" and path not in before and path not in after:
                (after if seen_layer else before).append(path)
    used = {*before, *after} if survey is not None else set(edges)
    tied = tuple(sorted((model.all_tied_weights_keys or {}).items()))
    tied_targets = {target for target, _ in tied}
    edge_bytes = sum(
        tensor.numel() * itemsize
        for path in sorted(used)
        for name, tensor in model.get_submodule(path).state_dict().items()
        if f"{path}.{name}" not in tied_targets
    )
    return Anatomy(
        layers_path=layers_path,
        n_layers=len(layers),
        before=tuple(before),
        after=tuple(after),
        idle=whole_branches([path for path in edges if path not in used], used, layers_path),
        tied=tied,
        tuple_size=survey.tuple_size if survey is not None else 0,
        cache_argument=cache_argument(model_class),
        layer_bytes=max(module_bytes(layer, itemsize) for layer in layers),
        edge_bytes=edge_bytes,
        split_refusal=why or None,
    )
