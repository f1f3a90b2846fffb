"""Run a gated model over any part of the span it holds, for one session or for several at once.

The model's forward is called as transformers itself would call it; only the layer list it finds is laid out
for the span at hand (own layers, gates around them), and the cache it is given is a session's.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from mycel.compute.engine import ModelUnsupported, Span
from mycel.compute.model.blocks import use_blocks
from mycel.compute.model.cache import LayerPlan, SessionCache
from mycel.compute.model.gates import Entry, Exit, Gate, LayerList, StopForward, replace_module
from mycel.compute.model.packed import PackedCache, Way, attention_configs, packing
from mycel.compute.model.survey import Anatomy

LAYOUTS_MAX = 64
"""Layer lists kept ready: one per sub-span in use."""


class Forward:
    """A gated model that can be run. `torch.inference_mode` is the caller's to set."""

    def __init__(self, model: PreTrainedModel, anatomy: Anatomy, plans: Sequence[LayerPlan]) -> None:
        self.anatomy = anatomy
        self.plans = plans
        self.device = next(model.parameters()).device
        self.dtype: torch.dtype = model.dtype
        self._model = model
        layers = model.get_submodule(anatomy.layers_path)
        assert isinstance(layers, nn.ModuleList)
        self._layers: list[nn.Module] = list(layers)
        self._layouts: dict[Span, tuple[nn.ModuleList, Entry | None]] = {}
        self._laid: Span | None = None
        self._configs = attention_configs(model)
        self._blocks = use_blocks(model)
        self.threads = 0
        """Threads for the next steps (alone: for reading weights, which shows in no bit); 0: all."""
        text = model.config.get_text_config(decoder=True)
        self.has_windows = any("window" in name and value for name, value in text.to_dict().items())
        """Whether some layers see less than the whole past."""
        self._usual_attention: str = text._attn_implementation
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters

    def is_last(self, span: Span) -> bool:
        """Whether `span` ends the model."""
        return span.end == self.anatomy.n_layers

    def alone(self, span: Span, inputs: torch.Tensor, cache: SessionCache) -> torch.Tensor:
        """One session's rows, by the model's own path.

        `inputs`: ids [1, rows] at layer 0, else hidden states [1, rows, hidden]. Returns hidden states
        [rows, hidden], or at the model's end the last row's logits [1, vocab].
        """
        more: dict[str, Any] = {}
        if self.is_last(span) and self._keeps_logits:
            more["logits_to_keep"] = 1
        with self._blocks.alone(self.threads):
            out = self._call(span, inputs, cache, more)[0]
        cache.length += inputs.shape[1]
        return out[-1:] if self.is_last(span) else out

    def packed(
        self,
        span: Span,
        inputs: torch.Tensor,
        caches: Sequence[SessionCache],
        counts: Sequence[int],
        way: Way,
    ) -> list[torch.Tensor]:
        """Several sessions' rows, one after another in `inputs`; per session as from `alone`.

        Raises `ModelUnsupported` when the model's attention does not go that way.
        """
        cache = PackedCache(self.plans, caches, counts, way, self._usual_attention)
        positions = [
            held.length + row for held, rows in zip(caches, counts, strict=True) for row in range(rows)
        ]
        more: dict[str, Any] = {"position_ids": torch.tensor([positions], device=self.device)}
        ends = torch.tensor(counts, device=self.device).cumsum(0) - 1
        if self.is_last(span) and self._keeps_logits:
            more["logits_to_keep"] = ends
        if way == "masked":
            more["attention_mask"] = cache.joint_mask(self.dtype, self.device)
        with packing(self._configs, cache), self._blocks.together(self.threads):
            out = self._call(span, inputs, cache, more)[0]
        if cache.attended != span.end - span.start:
            raise ModelUnsupported(f"its attention cannot be packed ({way}): not every layer came through")
        for held, rows in zip(caches, counts, strict=True):
            held.length += rows
        if not self.is_last(span):
            return list(out.split(list(counts)))
        kept = out if self._keeps_logits else out[ends]
        return [kept[index : index + 1] for index in range(len(counts))]

    @contextlib.contextmanager
    def watching_dtype(self, span: Span) -> Iterator[list[torch.dtype]]:
        """The dtypes that the last layer of `span` hands on, as it runs; some models keep them in float32."""
        seen: list[torch.dtype] = []

        def note(module: nn.Module, args: Any, out: Any) -> None:
            seen.append((out[0] if isinstance(out, tuple) else out).dtype)

        hook = self._layers[span.end - 1].register_forward_hook(note)
        try:
            yield seen
        finally:
            hook.remove()

    def _call(self, span: Span, inputs: torch.Tensor, cache: Any, more: dict[str, Any]) -> torch.Tensor:
        """The model's forward over `span`: hidden states [1, rows, hidden], or logits [1, kept, vocab]."""
        entry = self._lay_out(span)
        more[self.anatomy.cache_argument] = cache
        if entry is not None:
            entry.hidden = inputs
            more["inputs_embeds"] = inputs.to(
                self.dtype
            )  # what masks and rotary tables take their dtype from
        else:
            more["input_ids"] = inputs
        try:
            out = self._model(use_cache=True, **more)
        except StopForward as stop:
            return stop.hidden
        finally:
            if entry is not None:
                entry.hidden = None
        logits: torch.Tensor = out.logits
        return logits

    def _lay_out(self, span: Span) -> Entry | None:
        """Show the model the layer list for `span`; returns the gate that hands in hidden states, if any."""
        if span not in self._layouts:
            if len(self._layouts) == LAYOUTS_MAX:
                self._layouts.pop(next(iter(self._layouts)))
            self._layouts[span] = self._make_layout(span)
        layout, entry = self._layouts[span]
        if self._laid != span:
            replace_module(self._model, self.anatomy.layers_path, layout)
            self._laid = span
        return entry

    def _make_layout(self, span: Span) -> tuple[nn.ModuleList, Entry | None]:
        size = self.anatomy.tuple_size
        modules: list[nn.Module] = [
            module if span.start <= index < span.end else Gate(module, size)
            for index, module in enumerate(self._layers)
        ]
        entry = None
        if span.start > 0:
            entry = Entry(self._layers[span.start - 1], size)
            modules[span.start - 1] = entry
        if span.end < len(modules):
            modules[span.end] = Exit(self._layers[span.end], size)
        layout = LayerList(modules)
        layout.training = False
        return layout, entry
