"""A loaded stage: runs steps, keeps sessions' caches within their bound, and draws tokens at the model's end.

Theory of operation. `step` takes works in rounds, so that a session has one work at a time; in a round each
work is checked and its cache grown before anything computes, then works over the same layers run together
(`mycel.compute.model.packed`) where the model allows, else one by one. A work alone takes the model's own
path and gives the very bits of the unsplit model. What fails, fails by session: the others go on.

`Done.error` begins with one word for machines: `gap:` (the position does not follow), `full:` (no cache
memory), `input:` (the work makes no sense) or `failed:` (the computation broke; the session is gone here and
is to be replayed from position 0).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from mycel.compute.engine import Done, EngineStats, Span, StageInfo, Work
from mycel.compute.model import sample
from mycel.compute.model.cache import SessionCache
from mycel.compute.model.forward import Forward
from mycel.compute.model.memory import is_out_of_memory
from mycel.compute.model.threads import ThreadChoice
from mycel.compute.model.trial import Trial
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
    room: int = 0
    """Rows that fit, in all, before the cache has to grow."""
    context: list[int] = field(default_factory=list)
    """Token ids so far, for the repetition penalty; empty while nobody asked for one."""


class WorkRefused(Exception):
    """A work that cannot run; the text is its `Done.error`."""


class Stage:
    """Layers of one model on one device. Not thread-safe: one thread at a time steps it."""

    def __init__(self, forward: Forward, trial: Trial, info: StageInfo, kv_bytes_max: int) -> None:
        self.info = info
        self._open_forward: Forward | None = forward
        self._trial = trial
        self._kv_bytes_max = kv_bytes_max
        self._threads = torch.get_num_threads() if info.device == "cpu" else 1
        self._choices: dict[tuple[Span, int], ThreadChoice] = {}  # by layers, and rows in powers of two
        self._sessions: dict[str, dict[Span, Held]] = {}
        self._kv_bytes = 0
        self._steps = 0
        self._rows = 0
        self._busy_s = 0.0

    @property
    def _forward(self) -> Forward:
        if self._open_forward is None:
            raise RuntimeError("this stage was closed; load it again")
        return self._open_forward

    def step(self, works: Sequence[Work]) -> list[Done]:
        """Run every work's rows; one `Done` per work, in order.

        Never raises for what one work got wrong; memory that runs out in a forward is raised, and
        the stage is not to be used after that.
        """
        began = time.perf_counter()
        results: dict[int, Done] = {}
        with torch.inference_mode():
            for indices in rounds(works):
                for group in self._admit(works, indices, results):
                    self._run(works, group, results)
        self._steps += 1
        self._busy_s += time.perf_counter() - began
        return [results[index] for index in range(len(works))]

    def rewind(self, session: str, position: int) -> None:
        """Cut the session's caches back to rows [0:position).

        Raises `ModelUnsupported` if a layer cannot be rewound (that far), `ValueError` if the session is not
        there or is shorter; nothing has changed then.
        """
        spans = self._sessions.get(session)
        if spans is None:
            raise ValueError(f"no session {session} here; begin it at position 0")
        for held in spans.values():
            held.cache.check_rewind(position)
        for held in spans.values():
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
        """Let go of weights and caches. Stepping afterwards is a bug and raises `RuntimeError`."""
        self._sessions.clear()
        self._kv_bytes = 0
        self._open_forward = None
        if self.info.device.startswith("cuda"):
            torch.cuda.empty_cache()

    def _admit(self, works: Sequence[Work], indices: list[int], results: dict[int, Done]) -> list[list[int]]:
        """Check each work and make room for it; returns groups that run as one forward each."""
        packed: dict[Span, list[list[int]]] = {}
        groups: list[list[int]] = []
        for index in indices:
            work = works[index]
            try:
                rows = self._check(work)
                self._make_room(self._open(work), rows)
            except WorkRefused as refused:
                results[index] = Done(work.session, work.position, error=str(refused))
                continue
            if self._trial.way is None or rows > PACKED_WORK_ROWS_MAX:
                groups.append([index])
                continue
            batches = packed.setdefault(work.span, [[]])
            if not self._fits([works[i] for i in batches[-1]], work):
                batches.append([])
            batches[-1].append(index)
        return groups + [batch for batches in packed.values() for batch in batches]

    def _fits(self, batch: Sequence[Work], work: Work) -> bool:
        """Whether `work` can join the packed forward of `batch`."""
        joined = [*batch, work]
        rows = sum(row_count(each) for each in joined)
        cached = sum(each.position for each in joined) + rows
        if self._trial.way == "masked" and cached > self.info.card.max_positions:
            return not batch  # the model sees all cached rows in sequence, and has tables for so many only
        return rows <= PACKED_ROWS_MAX

    def _check(self, work: Work) -> int:
        """The work's rows, if it makes sense here; raises `WorkRefused`."""
        card, span, rows = self.info.card, work.span, row_count(work)
        refusal = self._forward.anatomy.split_refusal
        if span not in self.info.span or span.start >= span.end:
            raise WorkRefused(
                f"input: layers {span.start}:{span.end} are not here, "
                f"this stage holds {self.info.span.start}:{self.info.span.end}"
            )
        if refusal and span != self.info.span:
            raise WorkRefused(f"input: {card.name} cannot be cut: {refusal}")
        if rows == 0:
            raise WorkRefused("input: a work needs at least one row")
        if work.position < 0 or work.position + rows > card.max_positions:
            raise WorkRefused(
                f"input: rows {work.position}:{work.position + rows} do not fit the model's "
                f"{card.max_positions} positions; end the text or shorten the prompt"
            )
        if span.start == 0:
            if work.tokens is None or not all(0 <= token < card.vocab_size for token in work.tokens):
                raise WorkRefused(f"input: the first stage takes token ids below {card.vocab_size}")
        elif work.hidden is None or tuple(work.hidden.shape) != (rows, card.hidden_size):
            raise WorkRefused(f"input: this stage takes hidden states [rows, {card.hidden_size}]")
        if work.sampling is not None and span.end != card.n_layers:
            raise WorkRefused(f"input: only the last stage (layers ...:{card.n_layers}) draws tokens")
        return rows

    def _open(self, work: Work) -> Held:
        """The session's cache, a fresh one at position 0; raises `WorkRefused` where there is a gap."""
        spans = self._sessions.get(work.session, {})
        if work.position == 0:
            overlapping = [
                span for span in spans if span.start < work.span.end and work.span.start < span.end
            ]
            for span in overlapping:
                self._kv_bytes -= spans.pop(span).nbytes
            self._sessions.setdefault(work.session, spans)
            spans[work.span] = Held(SessionCache(self._forward.plans, work.span))
            return spans[work.span]
        found = spans.get(work.span)
        length = found.cache.length if found else 0
        if found is None or length != work.position:
            raise WorkRefused(
                f"gap: position {work.position} does not follow, session {work.session} has {length} rows "
                "here; send the rows from there on, or all from position 0"
            )
        return found

    def _make_room(self, held: Held, rows: int) -> None:
        """Grow the session's cache for `rows` more; raises `WorkRefused` where the bound is reached."""
        if held.cache.length + rows <= held.room:
            return
        first, span = self.info.span.start, held.cache.span
        shapes = self._trial.shapes[span.start - first : span.end - first]
        more = held.cache.bytes_after(rows, shapes) - held.nbytes
        if more == 0:
            held.room = held.cache.room()
            return
        refusal = None
        if self._kv_bytes + more > self._kv_bytes_max:
            refusal = (
                f"full: caches take {self._kv_bytes} of {self._kv_bytes_max} bytes here and this session "
                f"needs {more} more; end sessions, raise kv_bytes_max, or go to another peer"
            )
        else:
            try:
                held.cache.reserve(rows, shapes)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                refusal = f"full: the device has no memory for {more} more bytes of cache ({error})"
        self._account(held)
        held.room = held.cache.room()
        if refusal:
            if held.cache.length == 0:
                self._drop(held)
            raise WorkRefused(refusal)

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

    def _run(self, works: Sequence[Work], group: list[int], results: dict[int, Done]) -> None:
        """One forward for the works of `group`, all over the same span."""
        chosen = [works[index] for index in group]
        span, way = chosen[0].span, self._trial.way
        helds = [self._sessions[work.session][span] for work in chosen]
        counts = [row_count(work) for work in chosen]
        try:
            inputs = self._inputs(chosen)
            choice = self._choice(span, counts)
            self._forward.threads = choice.threads() if choice else 0
            began = time.perf_counter()
            if len(chosen) == 1 or way is None:
                outs = [self._forward.alone(span, inputs, helds[0].cache)]
            else:
                outs = self._forward.packed(span, inputs, [held.cache for held in helds], counts, way)
            if choice:
                choice.note(time.perf_counter() - began)
            for index, work, held, out in zip(group, chosen, helds, outs, strict=True):
                results[index] = self._finish(work, held, out)
        except Exception as error:  # boundary: what a model's code raises ends these sessions, not the stage
            if is_out_of_memory(error):
                raise  # not theirs alone: whoever runs this stage begins afresh
            for index, work, held in zip(group, chosen, helds, strict=True):
                self._drop(held)
                results[index] = Done(
                    work.session, work.position, error=f"failed: {type(error).__name__}: {error}"
                )
            return
        self._rows += sum(counts)
        if not self.info.card.rewindable:
            for held in helds:
                self._account(held)

    def _choice(self, span: Span, counts: Sequence[int]) -> ThreadChoice | None:
        """What says how many threads a step gets; None for a prefill, which gets all."""
        if self._threads == 1 or len(counts) < sum(counts):
            return None
        return self._choices.setdefault((span, len(counts).bit_length()), ThreadChoice(self._threads))

    def _inputs(self, works: Sequence[Work]) -> torch.Tensor:
        """The rows of all works as one sequence: ids [1, rows], or hidden states [1, rows, hidden]."""
        device, dtype = self._forward.device, self._trial.hidden_dtype
        if works[0].span.start == 0:
            ids = [token for work in works for token in work.tokens or ()]
            return torch.tensor([ids], dtype=torch.long, device=device)
        parts = [tensor_from_wire(work.hidden, device, dtype) for work in works if work.hidden is not None]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

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
