"""What a stage remembers of a session: keys and values of its own layers, and how many rows it has seen.

Theory of operation. The model's own code drives a transformers `Cache`; ours looks to it like the cache of
the whole model. Foreign layers hold nothing. The length is counted here, because a middle stage has no layer
0 to ask for it. Full-attention layers write into buffers that grow by an eighth, sliding ones into a buffer
of their window and some slack, so that a decode step copies one row and not the whole past; what they hand
to attention are views with exactly the rows transformers' own layers would hand out, in the same order.

Growing is done before a forward (`reserve`), for all layers at once: a session that finds no memory is
refused with its cache unharmed. Layers of other kinds (recurrent states, indexed attention) keep
transformers' classes; they have a fixed size or one that is only measured, and cannot be rewound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    Cache,
    CacheLayerMixin,
    DummyLayer,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
    get_layer_types_and_kwargs,
)

from mycel.compute.engine import ModelUnsupported, Span

REWIND_ROWS = 64
"""How far back a sliding-window layer can always be cut: more than any speculation drafts."""
GROW_ROWS_MIN = 64
"""A full-attention buffer grows by at least this many rows."""


def grown_capacity(held: int, needed: int) -> int:
    """Rows of a full-attention buffer that holds `held` rows' worth and has to take `needed`."""
    if needed <= held:
        return held
    step = max(GROW_ROWS_MIN, needed // 8)
    return (needed + step + 7) // 8 * 8


@dataclass(frozen=True)
class RowShape:
    """What one row of one layer's cache looks like: key [heads, width], value [heads, width]."""

    key: tuple[int, int]
    value: tuple[int, int]
    dtype: torch.dtype
    device: torch.device

    @property
    def nbytes(self) -> int:
        """Bytes of one row, key and value."""
        return (self.key[0] * self.key[1] + self.value[0] * self.value[1]) * self.dtype.itemsize

    def buffers(self, capacity: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Key and value memory for `capacity` rows, uninitialised: [1, heads, capacity, width]."""
        return (
            torch.empty(1, self.key[0], capacity, self.key[1], dtype=self.dtype, device=self.device),
            torch.empty(1, self.value[0], capacity, self.value[1], dtype=self.dtype, device=self.device),
        )


class GrowingLayer(DynamicLayer):
    """`DynamicLayer` over buffers [1, heads, capacity, width] that are appended to in place."""

    def __init__(self) -> None:
        super().__init__()
        self.length = 0
        self.capacity = 0
        self.shape: RowShape | None = None
        self.key_buffer = torch.empty(0)
        self.value_buffer = torch.empty(0)

    def planned(self, rows: int) -> int:
        """The capacity this layer will have once `rows` more are in."""
        return grown_capacity(self.capacity, self.length + rows)

    def reserve(self, rows: int, shape: RowShape) -> None:
        """Make room for `rows` more rows of `shape`."""
        self.shape = self.shape or shape
        capacity = self.planned(rows)
        if capacity > self.capacity:
            self._resize(capacity)

    def _resize(self, capacity: int) -> None:
        shape = self.shape
        assert shape is not None
        key, value = shape.buffers(capacity)
        if self.length:
            key[:, :, : self.length] = self.key_buffer[:, :, : self.length]
            value[:, :, : self.length] = self.value_buffer[:, :, : self.length]
        self.key_buffer, self.value_buffer, self.capacity = key, value, capacity
        self.dtype, self.device, self.is_initialized = shape.dtype, shape.device, True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append [1, heads, rows, width]; return views of all rows."""
        start, rows = self.length, key_states.shape[-2]
        if self.shape is None:
            self.shape = row_shape(key_states, value_states)
        if start + rows > self.capacity:
            self._resize(self.planned(rows))
        end = start + rows
        self.key_buffer[:, :, start:end] = key_states
        self.value_buffer[:, :, start:end] = value_states
        self.length = end
        self.keys, self.values = self.key_buffer[:, :, :end], self.value_buffer[:, :, :end]
        return self.keys, self.values

    def room(self) -> int:
        """Rows that fit, in all."""
        return self.capacity

    def get_seq_length(self) -> int:
        """Rows held."""
        return self.length

    def rewind(self, rows: int) -> None:
        """Drop the last `rows` rows."""
        self.length -= rows

    def can_rewind(self, rows: int) -> bool:
        """Always, up to the beginning."""
        return rows <= self.length

    def nbytes(self) -> int:
        """Bytes allocated."""
        return self.capacity * self.shape.nbytes if self.shape else 0

    def bytes_after(self, rows: int, shape: RowShape) -> int:
        """Bytes allocated once `rows` more are in."""
        return self.planned(rows) * shape.nbytes


class WindowLayer(DynamicSlidingWindowLayer):
    """`DynamicSlidingWindowLayer` over a buffer of the window and some slack.

    Rows are appended in place until the slack is used up, then the rows still needed move to the front.
    Attention gets the last `sliding_window - 1` rows and the new ones, as from transformers' own class.
    """

    def __init__(self, sliding_window: int, **kwargs: Any) -> None:
        super().__init__(sliding_window)
        self.start = 0
        """Position of the first row in the buffer."""
        self.capacity = 0
        self.shape: RowShape | None = None
        self.key_buffer = torch.empty(0)
        self.value_buffer = torch.empty(0)

    @property
    def kept(self) -> int:
        """Rows that must survive a move: the window, and what a rewind may uncover."""
        return self.sliding_window - 1 + REWIND_ROWS

    def planned(self, rows: int) -> int:
        """The capacity this layer will have once `rows` more are in."""
        held = self.cumulative_length - self.start
        if held + rows <= self.capacity:
            return self.capacity
        needed = min(held, self.kept) + rows
        full = self.kept + max(GROW_ROWS_MIN, self.sliding_window // 4)
        return max(needed, min(full, grown_capacity(self.capacity, needed)))

    def reserve(self, rows: int, shape: RowShape) -> None:
        """Make room for `rows` more rows of `shape`: move what is needed to the front, of a larger buffer."""
        self.shape = self.shape or shape
        held = self.cumulative_length - self.start
        if held + rows <= self.capacity:
            return
        capacity = self.planned(rows)
        moved = min(held, self.kept)
        key, value = self.shape.buffers(capacity)
        if moved:
            key[:, :, :moved] = self.key_buffer[:, :, held - moved : held]
            value[:, :, :moved] = self.value_buffer[:, :, held - moved : held]
        self.key_buffer, self.value_buffer, self.capacity = key, value, capacity
        self.start = self.cumulative_length - moved
        self.dtype, self.device, self.is_initialized = self.shape.dtype, self.shape.device, True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append [1, heads, rows, width]; return views of what the new rows may see."""
        rows = key_states.shape[-2]
        self.reserve(rows, self.shape or row_shape(key_states, value_states))
        first = self.cumulative_length - self.start
        end = first + rows
        self.key_buffer[:, :, first:end] = key_states
        self.value_buffer[:, :, first:end] = value_states
        self.cumulative_length += rows
        seen = max(0, end - rows - (self.sliding_window - 1))
        self.keys, self.values = self.key_buffer[:, :, seen:end], self.value_buffer[:, :, seen:end]
        return self.keys, self.values

    def room(self) -> int:
        """Rows that fit, in all, before those still needed have to move."""
        return self.start + self.capacity

    def rewind(self, rows: int) -> None:
        """Drop the last `rows` rows."""
        self.cumulative_length -= rows

    def can_rewind(self, rows: int) -> bool:
        """Whether the window before the cut is still held."""
        length = self.cumulative_length - rows
        return length >= 0 and self.start <= max(0, length - (self.sliding_window - 1))

    def nbytes(self) -> int:
        """Bytes allocated."""
        return self.capacity * self.shape.nbytes if self.shape else 0

    def bytes_after(self, rows: int, shape: RowShape) -> int:
        """Bytes allocated once `rows` more are in."""
        return self.planned(rows) * shape.nbytes


def row_shape(key_states: torch.Tensor, value_states: torch.Tensor) -> RowShape:
    """Read a row's shape off the first states."""
    return RowShape(
        (key_states.shape[1], key_states.shape[-1]),
        (value_states.shape[1], value_states.shape[-1]),
        key_states.dtype,
        key_states.device,
    )


def measured_bytes(layer: Any) -> int:
    """Bytes of a layer of a kind that transformers keeps: keys, values and recurrent states."""
    total = 0
    for name in ("keys", "values", "indexer_keys"):
        tensor = getattr(layer, name, None)
        total += tensor.nbytes if isinstance(tensor, torch.Tensor) else 0
    for name in ("conv_states", "recurrent_states"):
        for tensor in (getattr(layer, name, None) or {}).values():
            total += tensor.nbytes if isinstance(tensor, torch.Tensor) else 0
    return total


@dataclass(frozen=True)
class LayerPlan:
    """How a layer caches, by the config: transformers' layer type and its window, if it has one."""

    kind: str
    window: int | None
    arguments: tuple[tuple[str, Any], ...]

    @property
    def is_recurrent(self) -> bool:
        """Whether the layer carries a state that cannot be rolled back."""
        return issubclass(DYNAMIC_LAYER_TYPE_MAPPING[self.kind], LinearAttentionCacheLayerMixin)

    @property
    def is_plain(self) -> bool:
        """Whether our own buffers can hold it: full attention, sliding windows and chunks, or nothing."""
        return DYNAMIC_LAYER_TYPE_MAPPING[self.kind] in (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer)

    def make(self) -> Any:
        """A fresh cache for the layer."""
        known = DYNAMIC_LAYER_TYPE_MAPPING[self.kind]
        if known is DynamicLayer:
            return GrowingLayer()
        if known is DynamicSlidingWindowLayer:
            return WindowLayer(**dict(self.arguments))
        return known(**dict(self.arguments))


def plan_layers(config: PretrainedConfig) -> tuple[LayerPlan, ...]:
    """How each layer of the model caches. Raises `ModelUnsupported` for a kind transformers does not list."""
    kinds, arguments = get_layer_types_and_kwargs(config.get_text_config(decoder=True))
    for kind in kinds:
        if kind not in DYNAMIC_LAYER_TYPE_MAPPING:
            raise ModelUnsupported(f"{config.model_type}: no cache is known for layers of type {kind!r}")
    return tuple(
        LayerPlan(kind, known.get("sliding_window"), tuple(known.items()))
        for kind, known in zip(kinds, arguments, strict=True)
    )


def no_layer() -> Any:
    """Where a foreign layer's cache would be."""
    untyped: Any = DummyLayer
    return untyped()


class SessionCache(DynamicCache):
    """One session's cache over the layers of `span`; to the model it looks like that of all layers."""

    def __init__(self, plans: Sequence[LayerPlan], span: Span) -> None:
        Cache.__init__(
            self,
            layers=[
                plan.make() if span.start <= i < span.end else no_layer() for i, plan in enumerate(plans)
            ],
        )
        self.span = span
        self.length = 0
        """Rows all own layers have taken in."""

    def own_layer(self, index: int) -> Any:
        """The cache of the model's layer `index`."""
        return self.layers[index]

    @property
    def own(self) -> list[Any]:
        """The own layers' caches."""
        return list(self.layers[self.span.start : self.span.end])

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Rows before this step; an own attention layer answers for itself, as its model expects."""
        layer = self.layers[layer_idx] if layer_idx < len(self.layers) else None
        return int(layer.get_seq_length()) if isinstance(layer, CacheLayerMixin) else self.length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """(rows a mask must cover, position of the first); a foreign layer's mask is never used."""
        layer = self.layers[layer_idx]
        if isinstance(layer, CacheLayerMixin):
            sizes: tuple[int, int] = layer.get_mask_sizes(query_length)
            return sizes
        return self.length + query_length, 0

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """Whether the session has rows behind it."""
        own_linear = any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in self.layers)
        return bool(super().has_previous_state(layer_idx, state_idx)) if own_linear else self.length > 0

    def nbytes(self) -> int:
        """Bytes allocated for the session."""
        return sum(
            layer.nbytes() if isinstance(layer, (GrowingLayer, WindowLayer)) else measured_bytes(layer)
            for layer in self.own
        )

    def bytes_after(self, rows: int, shapes: Sequence[RowShape | int]) -> int:
        """Bytes allocated once `rows` more are in; `shapes` per own layer, as `shapes()` of a used cache."""
        total = 0
        for layer, shape in zip(self.own, shapes, strict=True):
            if isinstance(layer, (GrowingLayer, WindowLayer)) and isinstance(shape, RowShape):
                total += layer.bytes_after(rows, shape)
            elif isinstance(shape, int):
                total += measured_bytes(layer) or shape
        return total

    def reserve(self, rows: int, shapes: Sequence[RowShape | int]) -> None:
        """Allocate what `rows` more rows need, before any layer computes."""
        for layer, shape in zip(self.own, shapes, strict=True):
            if isinstance(layer, (GrowingLayer, WindowLayer)) and isinstance(shape, RowShape):
                layer.reserve(rows, shape)

    def room(self) -> int:
        """How many rows, in all, fit into what is allocated; 0 where only a layer's own class can tell."""
        if not all(isinstance(layer, (GrowingLayer, WindowLayer)) for layer in self.own):
            return 0
        return min(int(layer.room()) for layer in self.own)

    def shapes(self) -> tuple[RowShape | int, ...]:
        """Per own layer: what its rows look like, or the bytes of a state of fixed size."""
        return tuple(
            layer.shape or 0 if isinstance(layer, (GrowingLayer, WindowLayer)) else measured_bytes(layer)
            for layer in self.own
        )

    def check_rewind(self, position: int) -> None:
        """Raise `ValueError` for a position there is not, `ModelUnsupported` where a layer cannot go."""
        rows = self.length - position
        if not 0 <= rows <= self.length:
            raise ValueError(f"cannot rewind to position {position}: the session has {self.length} rows")
        for index, layer in enumerate(self.own, self.span.start):
            if rows == 0 or isinstance(layer, DummyLayer):
                continue
            if not isinstance(layer, (GrowingLayer, WindowLayer)):
                raise ModelUnsupported(
                    f"layer {index} keeps a state ({type(layer).__name__}) that cannot be rewound; "
                    "begin the session again from position 0"
                )
            if not layer.can_rewind(rows):
                raise ModelUnsupported(
                    f"layer {index} has a sliding window and no longer holds what stood before position "
                    f"{position}; begin the session again from position 0"
                )

    def rewind(self, position: int) -> None:
        """Cut back to rows [0:position). Raises as `check_rewind`, with nothing changed."""
        self.check_rewind(position)
        for layer in self.own:
            if isinstance(layer, (GrowingLayer, WindowLayer)):
                layer.rewind(self.length - position)
        self.length = position
