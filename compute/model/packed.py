"""Several sessions in one forward: their rows packed into one long row, attention kept apart by session.

Theory of operation. Everything in a decoder but attention works on rows alone, so the rows of many sessions
can pass it as one sequence [1, rows, hidden] with their own position ids; that is where the weights are read,
and reading them once for all is the gain (selective batching: Orca, OSDI 2022, section 3.2). In attention
each session's rows must meet only that session's keys and values. There are three ways, best first:

- **direct**: transformers lets a model's attention be swapped by name. Ours takes the packed queries apart
  and calls the model's usual attention once per session, on views of that session's own cache. Nothing is
  copied or padded, and per session the arithmetic is that of a step alone.
- **joined**: the same, but the caches' rows are handed to the model as one long tensor first, and taken apart
  in attention: for models that work on cached rows before attending (latent attention expands them).
- **masked**: for models whose attention cannot be swapped: joined rows and a mask that keeps sessions apart.

Which way is right for a model is not read off its name: a stage tries them when it is loaded
(`mycel.compute.model.trial`) and packs only if one gave what steps alone give.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from mycel.compute.model.cache import LayerPlan, SessionCache

Way = Literal["direct", "joined", "masked"]
WAYS: tuple[Way, ...] = ("direct", "joined", "masked")
PACKED = "mycel_packed"
"""The name our attention is registered under."""

_current = threading.local()
"""`.cache`: the `PackedCache` of the forward that runs in this thread."""


class PackedCache(DynamicCache):
    """What the model sees as the cache of one packed sequence: hands each session's rows to its own cache."""

    def __init__(
        self,
        plans: Sequence[LayerPlan],
        caches: Sequence[SessionCache],
        counts: Sequence[int],
        way: Way,
        usual: str,
    ) -> None:
        Cache.__init__(self, layers=list(caches[0].layers))
        self.plans = plans
        self.caches = caches
        self.counts = list(counts)
        self.way = way
        self.usual = usual
        """The attention the model is configured with: "sdpa" takes boolean masks, "eager" adds them."""
        self.parts: list[tuple[torch.Tensor, torch.Tensor]] = []
        """Keys and values of each session, of the layer that updated last."""
        self.layer = 0
        self.attended = 0
        """How many layers' attention came through here."""
        self._masks: dict[tuple[int, str, int | None], torch.Tensor | None] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append each session's rows of [1, heads, rows, width].

        Direct: returns the new states as they came, nobody looks at them; else all sessions' cached rows.
        """
        self.layer = layer_idx
        keys = key_states.split(self.counts, dim=-2)
        values = value_states.split(self.counts, dim=-2)
        self.parts = [
            cache.own_layer(layer_idx).update(key, value)
            for cache, key, value in zip(self.caches, keys, values, strict=True)
        ]
        if self.way == "direct":
            return key_states, value_states
        if self.way == "masked":
            self.attended += 1
        return (
            torch.cat([key for key, _ in self.parts], dim=-2),
            torch.cat([value for _, value in self.parts], dim=-2),
        )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions are given to the model; a packed sequence has no past of its own."""
        return 0

    def attend(
        self,
        function: Callable[..., Any],
        module: torch.nn.Module,
        states: Sequence[torch.Tensor],
        **kwargs: Any,
    ) -> torch.Tensor:
        """Attention session by session; `states`: query, key, value as the model passes them to attention."""
        self.attended += 1
        query, key, value = states
        parts = self.parts
        if self.way == "joined":
            seen = [part.shape[-2] for part, _ in parts]
            parts = list(zip(key.split(seen, dim=-2), value.split(seen, dim=-2), strict=True))
        results = []
        for index, part in enumerate(query.split(self.counts, dim=2)):
            keys, values = parts[index]
            mask = self.mask(index, keys.shape[-2], part)
            results.append(function(module, part, keys, values, mask, **kwargs)[0])
        return torch.cat(results, dim=1)

    def mask(self, index: int, visible: int, query: torch.Tensor) -> torch.Tensor | None:
        """[1, 1, rows, visible] of what session `index`'s new rows may see; None if that needs no mask.

        One row sees all its cache holds, save in chunked attention; sdpa without a mask is causal by itself.
        """
        plan, rows = self.plans[self.layer], self.counts[index]
        first_rows = plan.window is None and visible == rows and self.usual == "sdpa"
        if plan.kind != "chunked_attention" and (rows == 1 or first_rows):
            return None
        key = (index, plan.kind, plan.window)
        if key not in self._masks:
            seen = self._seen(plan, self.caches[index].length, rows, visible).to(query.device)
            self._masks[key] = self._in_form(seen, query.dtype)[None, None]
        return self._masks[key]

    def joint_mask(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """[1, 1, rows of all, cached rows of all]: each session sees its own rows, causally."""
        full = LayerPlan("full_attention", None, ())
        blocks = [
            self._seen(full, cache.length, rows, cache.length + rows)
            for cache, rows in zip(self.caches, self.counts, strict=True)
        ]
        return self._in_form(torch.block_diag(*blocks).bool().to(device), dtype)[None, None]

    def _seen(self, plan: LayerPlan, start: int, rows: int, visible: int) -> torch.Tensor:
        """[rows, visible]: which of the last cached rows each new row from position `start` on sees."""
        last = start + rows
        query = torch.arange(start, last)[:, None]
        key = torch.arange(last - visible, last)[None, :]
        seen = key <= query
        if plan.window is not None and plan.kind == "chunked_attention":
            seen &= key // plan.window == query // plan.window
        elif plan.window is not None:
            seen &= key > query - plan.window
        return seen

    def _in_form(self, seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """A boolean mask in the form the model's usual attention takes."""
        if self.usual == "sdpa":
            return seen
        zeros = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
        return zeros.masked_fill_(~seen, torch.finfo(dtype).min)


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
    function = usual_attention(module, cache.usual)
    return cache.attend(function, module, (query, key, value), **kwargs), None


def usual_attention(module: torch.nn.Module, name: str) -> Callable[..., Any]:
    """The attention function that `module` would call were it not for ours."""
    if name in ALL_ATTENTION_FUNCTIONS:
        found: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS[name]
        return found
    own: Callable[..., Any] = vars(sys.modules[type(module).__module__])["eager_attention_forward"]
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
    """Have the model whose `configs` these are attend over `cache`, in this thread.

    transformers makes no masks for an attention it does not know: ours brings its own.
    """
    if cache.way == "masked":
        yield
        return
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
