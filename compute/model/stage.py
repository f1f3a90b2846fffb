"""A loaded stage: runs steps, keeps sessions' caches within their bound, and draws tokens at the model's end.

Theory of operation. `step` takes works in rounds, so that a session has one work at a time; in a round each
work is checked and its cache grown before anything computes, then works over the same layers run together
(`mycel.compute.model.packed`) where the model allows, else one by one. A work alone takes the model's own path
and gives the very bits of the unsplit model. What fails, fails by session: the others go on.

`Done.error` begins with one word for machines: `gap:` (position does not follow), `full:` (no cache memory),
`input:` (the work makes no sense) or `failed:` (the computation broke; the session is gone and is to be replayed).
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import torch
from torch import nn
from transformers import PreTrainedModel

from mycel.compute.engine import Done, EngineStats, ModelUnsupported, Span, StageInfo, Work
from mycel.compute.model import sample, split
from mycel.compute.model.cache import LayerPlan, RowShape, SessionCache
from mycel.compute.model.packed import PackedCache, attention_configs, packing
from mycel.compute.model.wire import tensor_from_wire, tensor_to_wire

PACKED_ROWS_MAX = 512
"""Rows of one packed forward: beyond this a forward is bound by arithmetic and packing gains nothing."""
PACKED_WORK_ROWS_MAX = 64
"""A work with more rows than this (a prefill) runs alone, for the same reason, and bit for bit."""


@dataclass
class Held:
    """What a stage holds of one session over one span."""

    cache: SessionCache
    nbytes: int = 0
    context: list[int] = field(default_factory=list)
    """Token ids so far, for the repetition penalty; empty while nobody asked for one."""


class WorkRefused(Exception):
    """A work that cannot run; the text is its `Done.error`."""


class Stage:
    """Layers of one model on one device. Not thread-safe: one thread at a time steps it."""

    def __init__(
        self,
        model: PreTrainedModel,
        info: StageInfo,
        anatomy: split.Anatomy,
        plans: Sequence[LayerPlan],
        kv_bytes_max: int,
    ) -> None:
        self.info = info
        self._model = model
        self._anatomy = anatomy
        self._plans = plans
        self._kv_bytes_max = kv_bytes_max
        self._device = torch.device(info.device)
        self._hidden_dtype: torch.dtype = getattr(torch, info.dtype)
        layers = model.get_submodule(anatomy.layers_path)
        assert isinstance(layers, nn.ModuleList)
        self._modules: list[nn.Module] = list(layers)
        self._layouts: dict[Span, tuple[nn.ModuleList, Entry | None]] = {}
        self._configs = attention_configs(model)
        self._usual_attention: str = model.config.get_text_config(decoder=True)._attn_implementation
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._packs = False
        self._shapes: dict[int, RowShape | None] = {}
        self._sessions: dict[str, dict[Span, Held]] = {}
        self._kv_bytes = 0
        self._steps = 0
        self._rows = 0
        self._busy_s = 0.0

    # ---------------------------------------------------------------- what callers use

    def step(self, works: Sequence[Work]) -> list[Done]:
        """Run every work's rows; one `Done` per work, in order. Never raises for what one work got wrong."""
        began = time.perf_counter()
        results: dict[int, Done] = {}
        with torch.inference_mode():
            for round_ in rounds(works):
                for group in self._admit(works, round_, results):
                    self._run(works, group, results)
        self._steps += 1
        self._busy_s += time.perf_counter() - began
        return [results[index] for index in range(len(works))]

    def rewind(self, session: str, position: int) -> None:
        """Cut the session's caches back to rows [0:position).

        Raises `ModelUnsupported` if a layer cannot be rewound (that far), `ValueError` if the session is not
        there or is shorter.
        """
        if session not in self._sessions:
            raise ValueError(f"no session {session} here; begin it at position 0")
        with torch.inference_mode():
            for held in self._sessions[session].values():
                held.cache.rewind(position)
                del held.context[position:]

    def forget(self, session: str) -> None:
        """Free what the session holds; nothing happens where there is none."""
        for held in self._sessions.pop(session, {}).values():
            self._kv_bytes -= held.nbytes

    def stats(self) -> EngineStats:
        """Counters and gauges."""
        return EngineStats(
            steps=self._steps,
            rows=self._rows,
            sessions=len(self._sessions),
            kv_bytes=self._kv_bytes,
            weight_bytes=self.info.weight_bytes,
            busy_s=self._busy_s,
        )

    def close(self) -> None:
        """Let go of weights and caches."""
        self._sessions.clear()
        self._layouts.clear()
        self._modules.clear()
        self._kv_bytes = 0
        del self._model
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    # ---------------------------------------------------------------- admission

    def _admit(self, works: Sequence[Work], indices: list[int], results: dict[int, Done]) -> list[list[int]]:
        """Check each work and make room for it; returns groups that run as one forward each."""
        packed: dict[Span, list[list[int]]] = {}
        groups: list[list[int]] = []
        for index in indices:
            work = works[index]
            try:
                rows = self._check(work)
                held = self._open(work)
                self._make_room(held, rows)
            except WorkRefused as refused:
                results[index] = Done(work.session, work.position, error=str(refused))
                continue
            except torch.OutOfMemoryError as error:
                results[index] = Done(work.session, work.position, error=f"full: {error}")
                continue
            if not self._packs or rows > PACKED_WORK_ROWS_MAX:
                groups.append([index])
                continue
            batches = packed.setdefault(work.span, [[]])
            if sum(row_count(works[i]) for i in batches[-1]) + rows > PACKED_ROWS_MAX:
                batches.append([])
            batches[-1].append(index)
        return groups + [batch for batches in packed.values() for batch in batches]

    def _check(self, work: Work) -> int:
        """The work's rows, if it makes sense here; raises `WorkRefused`."""
        card, span = self.info.card, work.span
        if span not in self.info.span or span.start >= span.end:
            raise WorkRefused(
                f"input: layers {span.start}:{span.end} are not here, "
                f"this stage holds {self.info.span.start}:{self.info.span.end}"
            )
        if self._anatomy.split_refusal and span != self.info.span:
            raise WorkRefused(f"input: this model cannot be cut: {self._anatomy.split_refusal}")
        rows = row_count(work)
        if rows == 0:
            raise WorkRefused("input: a work needs at least one row")
        if work.position < 0 or work.position + rows > card.max_positions:
            raise WorkRefused(
                f"input: rows {work.position}:{work.position + rows} do not fit the model's "
                f"{card.max_positions} positions; end the text or shorten the prompt"
            )
        if span.start == 0:
            if work.tokens is None or not all(0 <= token < card.vocab_size for token in work.tokens):
                raise WorkRefused(f"input: the first stage takes tokens below {card.vocab_size}")
        elif work.hidden is None or work.hidden.shape != (rows, card.hidden_size):
            raise WorkRefused(f"input: this stage takes hidden states [rows, {card.hidden_size}]")
        if work.sampling is not None and span.end != card.n_layers:
            raise WorkRefused(f"input: only the last stage (layers ...:{card.n_layers}) draws tokens")
        return rows

    def _open(self, work: Work) -> Held:
        """The session's cache, a fresh one at position 0; raises `WorkRefused` when the position has a gap."""
        spans = self._sessions.get(work.session, {})
        if work.position == 0:
            for span in [span for span in spans if span.start < work.span.end and work.span.start < span.end]:
                self._kv_bytes -= spans.pop(span).nbytes
            held = Held(SessionCache(self._plans, work.span))
            self._sessions.setdefault(work.session, spans)[work.span] = held
            return held
        found = spans.get(work.span)
        length = found.cache.length if found else 0
        if found is None or length != work.position:
            raise WorkRefused(
                f"gap: position {work.position} does not follow, session {work.session} has {length} rows here; "
                "send them again from there, or from position 0"
            )
        return found

    def _make_room(self, held: Held, rows: int) -> None:
        """Grow the session's cache for `rows` more; raises `WorkRefused` where the bound is reached."""
        span = held.cache.span
        shapes = [self._shapes.get(index) for index in range(span.start, span.end)]
        after = held.cache.bytes_after(rows, shapes)
        more = after - held.nbytes
        if more and self._kv_bytes + more > self._kv_bytes_max:
            if held.cache.length == 0:
                self._drop(held)
            raise WorkRefused(
                f"full: the caches here take {self._kv_bytes} of {self._kv_bytes_max} bytes and this session "
                f"needs {more} more; end sessions, raise kv_bytes_max, or go to another peer"
            )
        if more:
            held.cache.reserve(rows, shapes)
            self._account(held)

    def _account(self, held: Held) -> None:
        """Count what the session holds now."""
        now = held.cache.nbytes()
        self._kv_bytes += now - held.nbytes
        held.nbytes = now

    def _drop(self, held: Held) -> None:
        """Forget one span of a session."""
        for session, spans in list(self._sessions.items()):
            if spans.get(held.cache.span) is held:
                del spans[held.cache.span]
                self._kv_bytes -= held.nbytes
                if not spans:
                    del self._sessions[session]

    # ---------------------------------------------------------------- running

    def _run(self, works: Sequence[Work], group: list[int], results: dict[int, Done]) -> None:
        """One forward for the works of `group`, all over the same span."""
        chosen = [works[index] for index in group]
        span = chosen[0].span
        helds = [self._sessions[work.session][span] for work in chosen]
        counts = [row_count(work) for work in chosen]
        try:
            if len(chosen) == 1:
                outs = [self._forward_alone(chosen[0], helds[0].cache)]
            else:
                outs = self._forward_packed(chosen, [held.cache for held in helds], counts)
            for index, work, held, rows, out in zip(group, chosen, helds, counts, outs, strict=True):
                held.cache.length += rows
                results[index] = self._finish(work, held, out)
        except (
            Exception
        ) as error:  # boundary: whatever a model's code raises ends these sessions, not the stage
            for index, work, held in zip(group, chosen, helds, strict=True):
                self._drop(held)
                results[index] = Done(
                    work.session, work.position, error=f"failed: {type(error).__name__}: {error}"
                )
            return
        self._rows += sum(counts)
        for held in helds:
            if not self.info.card.rewindable:
                self._account(held)

    def _inputs(self, works: Sequence[Work]) -> torch.Tensor:
        """The rows of all works as one sequence: ids [1, rows], or hidden states [1, rows, hidden]."""
        if works[0].span.start == 0:
            ids = [token for work in works for token in work.tokens or ()]
            return torch.tensor([ids], dtype=torch.long, device=self._device)
        parts = [
            tensor_from_wire(work.hidden, self._device, self._hidden_dtype)
            for work in works
            if work.hidden is not None
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _forward_alone(self, work: Work, cache: SessionCache) -> torch.Tensor:
        """The model's own path: hidden states [rows, hidden], or logits [1, vocab] of the last row."""
        keep = {"logits_to_keep": 1} if self._keeps_logits else {}
        out = self._call(work.span, self._inputs([work]), cache, **keep)
        return out[0] if work.span.end < self.info.card.n_layers else out[0, -1:]

    def _forward_packed(
        self, works: Sequence[Work], caches: Sequence[SessionCache], counts: Sequence[int]
    ) -> list[torch.Tensor]:
        """All works in one forward; per work as from `_forward_alone`."""
        span = works[0].span
        packed = PackedCache(self._plans, caches, counts, self._usual_attention)
        positions = [
            work.position + row for work, rows in zip(works, counts, strict=True) for row in range(rows)
        ]
        more: dict[str, Any] = {"position_ids": torch.tensor([positions], device=self._device)}
        last = span.end == self.info.card.n_layers
        ends = torch.tensor(counts, device=self._device).cumsum(0) - 1
        if last and self._keeps_logits:
            more["logits_to_keep"] = ends
        with packing(self._configs, packed):
            out = self._call(span, self._inputs(works), packed, **more)[0]
        if packed.calls != span.end - span.start:
            raise ModelUnsupported("attention did not pass the packed path in every layer")
        if not last:
            return list(out.split(list(counts)))
        rows = out if self._keeps_logits else out[ends]
        return [rows[i : i + 1] for i in range(len(works))]

    def _call(self, span: Span, inputs: torch.Tensor, cache: Any, **more: Any) -> torch.Tensor:
        """The gated model's forward over `span`: hidden states [1, rows, hidden], or logits [1, kept, vocab]."""
        layout, entry = self._layout(span)
        split.replace_module(self._model, self._anatomy.layers_path, layout)
        more[self._anatomy.cache_argument] = cache
        if entry is not None:
            entry.hidden = inputs
            more["inputs_embeds"] = inputs
        else:
            more["input_ids"] = inputs
        try:
            out = self._model(use_cache=True, **more)
        except split.StopForward as stop:
            return stop.hidden
        finally:
            if entry is not None:
                entry.hidden = None
        logits: torch.Tensor = out.logits
        return logits

    def _layout(self, span: Span) -> tuple[nn.ModuleList, Entry | None]:
        """The layer list as the model shall see it for `span`: own layers, and gates around them."""
        if span not in self._layouts:
            size = self._anatomy.tuple_size
            modules: list[nn.Module] = [
                module if span.start <= index < span.end else split.Gate(module, size)
                for index, module in enumerate(self._modules)
            ]
            entry = None
            if span.start > 0:
                entry = Entry(self._modules[span.start - 1], size)
                modules[span.start - 1] = entry
            if span.end < len(modules):
                modules[span.end] = split.Exit(self._modules[span.end], size)
            self._layouts[span] = (nn.ModuleList(modules), entry)
        return self._layouts[span]

    def _finish(self, work: Work, held: Held, out: torch.Tensor) -> Done:
        """The work's `Done`: hidden states, or the token drawn after its last row."""
        if work.span.end < self.info.card.n_layers:
            return Done(work.session, work.position, hidden=tensor_to_wire(out))
        if work.sampling is None:
            return Done(work.session, work.position)
        position = held.cache.length
        given = list(work.context)
        held.context = held.context[: max(0, position - len(given))] + given
        try:
            drawn = sample.draw(out[0], work.sampling, position, held.context)
        except ValueError as error:
            return Done(work.session, work.position, error=f"input: {error}")
        if len(held.context) == position:
            held.context.append(drawn.token)
        return Done(work.session, work.position, sampled=drawn)

    # ---------------------------------------------------------------- trying it out

    def warm_up(self, began: float) -> None:
        """Run a few rows: learn what a row costs, and whether packing gives what steps alone give.

        `began`: `time.perf_counter()` when loading began.
        """
        span = self.info.span
        with torch.inference_mode():
            cache = SessionCache(self._plans, span)
            out = self._probe_alone(cache, [3, 1], seed=0)
            if span.end < self.info.card.n_layers:
                self._hidden_dtype = out[-1].dtype
            for index, shape in zip(range(span.start, span.end), cache.shapes(), strict=True):
                self._shapes[index] = shape
            self._packs = self.info.card.batchable and any(self._packs_well(seed) for seed in (1, 2, 3))
        card = msgspec.structs.replace(self.info.card, batchable=self._packs)
        self.info = msgspec.structs.replace(self.info, card=card, load_s=time.perf_counter() - began)

    def _probe_inputs(self, rows: int, seed: int) -> torch.Tensor:
        """Made-up input of `rows` rows."""
        random = torch.Generator().manual_seed(seed)
        if self.info.span.start == 0:
            return torch.randint(self.info.card.vocab_size, (1, rows), generator=random).to(self._device)
        hidden = torch.randn(1, rows, self.info.card.hidden_size, generator=random)
        return hidden.to(device=self._device, dtype=self._hidden_dtype)

    def _probe_alone(self, cache: SessionCache, counts: Sequence[int], seed: int) -> list[torch.Tensor]:
        """Steps of `counts` rows, one after another; each step's last row."""
        outs = []
        for step, rows in enumerate(counts):
            out = self._call(self.info.span, self._probe_inputs(rows, seed + 10 * step), cache)
            cache.length += rows
            outs.append(out[0, -1])
        return outs

    def _packs_well(self, seed: int) -> bool:
        """Whether two sessions packed into one forward get what each gets alone, up to rounding."""
        span, counts = self.info.span, [3, 2]
        alone = [SessionCache(self._plans, span) for _ in counts]
        packed = [SessionCache(self._plans, span) for _ in counts]
        expected, parts, positions = [], [], []
        for index, rows in enumerate(counts):
            own_seed = seed * 1000 + 100 * index
            expected.append(self._probe_alone(alone[index], [rows, 2], own_seed)[-1])
            self._probe_alone(packed[index], [rows], own_seed)
            parts.append(self._probe_inputs(2, own_seed + 10))
            positions += [rows, rows + 1]
        cache = PackedCache(self._plans, packed, [2, 2], self._usual_attention)
        try:
            with packing(self._configs, cache):
                ids = torch.tensor([positions], device=self._device)
                out = self._call(span, torch.cat(parts, dim=1), cache, position_ids=ids)[0]
        except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError):
            return False
        if cache.calls != span.end - span.start:
            return False
        tolerance = 1e-3 if self.info.dtype == "float32" else 5e-2
        return all(
            (out[row] - wanted).float().norm() <= tolerance * wanted.float().norm()
            for row, wanted in zip((1, 3), expected, strict=True)
        )


class Entry(split.Gate):
    """The gate before a stage's first layer: hands it the hidden state that was received."""

    hidden: torch.Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(self.hidden)


def row_count(work: Work) -> int:
    """Rows of a work."""
    if work.tokens is not None:
        return len(work.tokens)
    return work.hidden.shape[0] if work.hidden is not None and len(work.hidden.shape) == 2 else 0


def rounds(works: Sequence[Work]) -> list[list[int]]:
    """Indices of works such that a round has one of a session, in the order given."""
    result: list[list[int]] = []
    seen: dict[str, int] = {}
    for index, work in enumerate(works):
        turn = seen.get(work.session, 0)
        seen[work.session] = turn + 1
        if turn == len(result):
            result.append([])
        result[turn].append(index)
    return result
