"""Several sessions in one forward: their rows packed into one long row, attention done session by session.

Theory of operation. Everything in a decoder but attention works on rows alone, so the rows of many sessions
can pass it as one sequence [1, rows, hidden] with their own position ids; that is where the weights are read,
and reading them once for all is the gain (continuous batching, Orca, OSDI 2022, "selective batching"). In
attention each session's rows meet only that session's keys and values. transformers lets a model's attention
be swapped by name; ours takes the packed queries apart, calls the model's usual attention function once per
session on that session's own cache, and puts the results together. No cache is copied or padded, sessions of
any length and any number of rows mix freely, and per session the arithmetic of attention is that of a step alone.

A family whose attention is not swappable, or that touches keys after caching them, would compute nonsense.
So a stage tries it out when it is loaded (`mycel.compute.model.stage`), and packs only if that came out right.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from mycel.compute.model.cache import LayerPlan, SessionCache

PACKED = "mycel_packed"
"""The name our attention is registered under."""

_current = threading.local()
"""`.cache`: the `PackedCache` of the forward that runs in this thread."""


class PackedCache(DynamicCache):  # type: ignore[misc]
    """What the model sees as the cache of one packed sequence: hands each session's rows to its own cache."""

    def __init__(
        self, plans: Sequence[LayerPlan], caches: Sequence[SessionCache], counts: Sequence[int], usual: str
    ) -> None:
        Cache.__init__(self, layers=list(caches[0].layers))
        self.plans = plans
        self.caches = caches
        self.counts = counts
        self.usual = usual
        self.parts: list[tuple[torch.Tensor, torch.Tensor]] = []
        """Keys and values of each session, of the layer that updated last."""
        self.layer = 0
        self.calls = 0
        """How many layers' attention came through here."""
        self._masks: dict[tuple[int, str, int | None], torch.Tensor | None] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append each session's rows of [1, heads, rows, width]; returns the new states as they came."""
        self.layer = layer_idx
        keys = key_states.split(self.counts, dim=-2)
        values = value_states.split(self.counts, dim=-2)
        self.parts = [
            cache.layers[layer_idx].update(key, value)
            for cache, key, value in zip(self.caches, keys, values, strict=True)
        ]
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions are given to the model; a packed sequence has no past of its own."""
        return 0

    def mask(self, index: int, visible: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor | None:
        """[1, 1, rows, visible] of what session `index`'s new rows may see; None if everything, causally."""
        plan, cache, rows = self.plans[self.layer], self.caches[index], self.counts[index]
        chunked = plan.kind == "chunked_attention"
        if not chunked and (rows == 1 or (plan.window is None and visible == rows)):
            return None
        key = (index, plan.kind, plan.window)
        if key not in self._masks:
            self._masks[key] = self._make_mask(plan, cache.length, rows, visible, dtype, device)
        return self._masks[key]

    def _make_mask(
        self, plan: LayerPlan, start: int, rows: int, visible: int, dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        last = start + rows
        query = torch.arange(start, last, device=device)[:, None]
        key = torch.arange(last - visible, last, device=device)[None, :]
        seen = key <= query
        if plan.kind == "chunked_attention":
            seen &= key // plan.window == query // plan.window
        elif plan.window is not None:
            seen &= key > query - plan.window
        if self.usual != "sdpa":
            hidden = torch.finfo(dtype).min
            return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, hidden)[None, None]
        return seen[None, None]


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention over a packed sequence: query [1, heads, rows, width] -> [1, rows, heads, width]."""
    cache: PackedCache = _current.cache
    cache.calls += 1
    attend = usual_attention(module, cache.usual)
    results = []
    for index, part in enumerate(query.split(cache.counts, dim=2)):
        keys, values = cache.parts[index]
        mask = cache.mask(index, keys.shape[-2], part.dtype, part.device)
        results.append(attend(module, part, keys, values, mask, **kwargs)[0])
    return torch.cat(results, dim=1), None


def usual_attention(module: torch.nn.Module, name: str) -> Callable[..., Any]:
    """The attention function that `module` would call were it not for ours."""
    if name in ALL_ATTENTION_FUNCTIONS:
        found: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS[name]
        return found
    own: Callable[..., Any] = sys.modules[type(module).__module__].eager_attention_forward  # type: ignore[attr-defined]
    return own


AttentionInterface.register(PACKED, packed_attention)


def attention_configs(model: PreTrainedModel) -> list[Any]:
    """The config objects by which the model's modules choose their attention."""
    found: dict[int, Any] = {id(model.config): model.config}
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_attn_implementation_internal"):
            found[id(config)] = config
    return list(found.values())


@contextlib.contextmanager
def packing(configs: Sequence[Any], cache: PackedCache) -> Iterator[None]:
    """Have the model whose `configs` these are attend by `packed_attention` over `cache`, in this thread.

    transformers makes no masks for an attention it does not know: ours brings its own.
    """
    usual = [config._attn_implementation_internal for config in configs]
    for config in configs:
        config._attn_implementation_internal = PACKED
    _current.cache = cache
    try:
        yield
    finally:
        _current.cache = None
        for config, name in zip(configs, usual, strict=True):
            config._attn_implementation_internal = name
