"""One stage: positions, bounds, sub-spans, isolation, rewinding, drawing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from mycel.compute.engine import Done, ModelUnsupported, Sampling, Span, StageSpec, Work
from mycel.compute.model.cache import RowShape
from mycel.compute.model.forward import Forward
from mycel.compute.model.load import load_stage
from mycel.compute.model.stage import Stage
from mycel.protocol.tensor import Tensor

PROMPT = (5, 17, 80, 2, 33)
WHOLE = Span(0, 4)


def load(path: Path, span: Span | None = None, **spec: Any) -> Stage:
    return load_stage(StageSpec(str(path), span, device="cpu", threads=1, **spec))


def feed(stage: Stage, session: str, position: int, tokens: Sequence[int], **more: Any) -> Done:
    more.setdefault("sampling", Sampling())
    [done] = stage.step([Work(session, stage.info.span, position, tokens=tuple(tokens), **more)])
    return done


@pytest.fixture
def stage(tiny: Callable[..., Path]) -> Stage:
    return load(tiny("llama"))


def test_a_position_that_leaves_a_gap_is_refused_and_changes_nothing(stage: Stage) -> None:
    assert feed(stage, "a", 0, PROMPT).error is None
    before = stage.stats().kv_bytes
    for position in (6, 4, 63):
        error = feed(stage, "a", position, [1]).error
        assert error is not None
        assert error.startswith(f"gap: position {position} does not follow, session a has 5 rows")
    unknown = feed(stage, "nobody", 3, [1]).error
    assert unknown is not None
    assert unknown.startswith("gap:")
    assert stage.stats().kv_bytes == before
    assert stage.stats().sessions == 1
    assert feed(stage, "a", 5, [1]).error is None


def test_position_0_begins_the_session_again(stage: Stage) -> None:
    first = feed(stage, "a", 0, PROMPT)
    held = stage.stats().kv_bytes
    feed(stage, "a", 5, [1, 2, 3])
    assert feed(stage, "a", 0, PROMPT) == first
    assert stage.stats().kv_bytes == held
    assert stage.stats().sessions == 1


@pytest.mark.parametrize(
    ("work", "why"),
    [
        (Work("a", Span(0, 5), 0, tokens=PROMPT), "layers 0:5 are not here"),
        (Work("a", Span(2, 2), 0, tokens=PROMPT), "layers 2:2 are not here"),
        (Work("a", WHOLE, 0, tokens=()), "at least one row"),
        (Work("a", WHOLE, 0), "at least one row"),
        (Work("a", WHOLE, 0, tokens=(96,)), "token ids below 96"),
        (Work("a", WHOLE, 0, tokens=(-1,)), "token ids below 96"),
        (Work("a", WHOLE, 0, tokens=(1,) * 65), "64 positions"),
        (Work("a", WHOLE, -1, tokens=(1,)), "64 positions"),
        (Work("a", Span(1, 4), 0, tokens=PROMPT), "takes hidden states"),
        (Work("a", Span(1, 4), 0, hidden=Tensor("float32", (2, 31), bytes(248))), "[rows, 32]"),
        (Work("a", Span(0, 2), 0, tokens=PROMPT, sampling=Sampling()), "only the last stage"),
    ],
)
def test_works_that_make_no_sense_are_refused_alone(stage: Stage, work: Work, why: str) -> None:
    good = Work("good", WHOLE, 0, tokens=PROMPT, sampling=Sampling())
    bad, fine = stage.step([work, good])
    assert bad.error is not None
    assert bad.error.startswith("input: ")
    assert why in bad.error
    assert fine.sampled is not None
    assert stage.stats().sessions == 1


def test_hidden_states_of_a_strange_dtype_end_only_their_session(stage: Stage) -> None:
    feed(stage, "good", 0, PROMPT)
    [done] = stage.step([Work("a", Span(1, 4), 0, hidden=Tensor("int8", (2, 32), bytes(64)))])
    assert done.error is not None
    assert done.error.startswith("failed: ValueError: hidden states are float32")
    assert stage.stats().sessions == 1
    assert feed(stage, "good", 5, [1]).error is None


def test_cache_memory_is_bounded_and_counted(tiny: Callable[..., Path]) -> None:
    one = load(tiny("llama"))
    feed(one, "a", 0, PROMPT)
    cost = one.stats().kv_bytes
    stage = load(tiny("llama"), kv_bytes_max=2 * cost)
    assert feed(stage, "a", 0, PROMPT).error is None
    assert feed(stage, "b", 0, PROMPT).error is None
    refused = feed(stage, "c", 0, PROMPT).error
    assert refused is not None
    assert refused.startswith(f"full: caches take {2 * cost} of {2 * cost} bytes")
    assert stage.stats().sessions == 2
    assert stage.stats().kv_bytes == 2 * cost
    stage.forget("a")
    assert stage.stats().kv_bytes == cost
    assert feed(stage, "c", 0, PROMPT).error is None
    stage.forget("b")
    stage.forget("c")
    stage.forget("c")
    assert stage.stats().kv_bytes == 0
    assert stage.stats().sessions == 0


def test_a_session_that_cannot_grow_keeps_what_it_has(tiny: Callable[..., Path]) -> None:
    path = tiny("llama", max_position_embeddings=512)
    one = load(path)
    feed(one, "a", 0, PROMPT)
    cost = one.stats().kv_bytes
    stage = load(path, kv_bytes_max=cost)
    feed(stage, "a", 0, PROMPT)
    refused = feed(stage, "a", 5, [1] * 100).error
    assert refused is not None
    assert refused.startswith("full:")
    assert stage.stats().kv_bytes == cost
    assert feed(stage, "a", 5, [1]) == feed(one, "a", 5, [1])


def test_a_device_without_memory_refuses_the_session_and_goes_on(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = feed(stage, "a", 0, PROMPT)
    cost = stage.stats().kv_bytes

    def exhausted(self: RowShape, capacity: int) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    with monkeypatch.context() as patch:
        patch.setattr(RowShape, "buffers", exhausted)
        error = feed(stage, "b", 0, PROMPT).error
    assert error is not None
    assert error.startswith("full: the device has no memory")
    assert (stage.stats().sessions, stage.stats().kv_bytes) == (1, cost)
    assert feed(stage, "b", 0, PROMPT).sampled == first.sampled


def test_any_part_of_the_span_runs_and_equals_a_stage_of_that_part(tiny: Callable[..., Path]) -> None:
    path = tiny("llama", layers=5)
    whole, middle = load(path), load(path, Span(1, 3))
    [entry] = whole.step([Work("s", Span(0, 1), 0, tokens=PROMPT)])
    for position, hidden in ((0, entry.hidden), (5, Tensor("float32", (1, 32), bytes(128)))):
        [part] = whole.step([Work("s", Span(1, 3), position, hidden=hidden)])
        [own] = middle.step([Work("s", Span(1, 3), position, hidden=hidden)])
        assert part.hidden is not None
        assert own.hidden is not None
        assert bytes(part.hidden.data) == bytes(own.hidden.data)
    [end] = whole.step([Work("s", Span(3, 5), 0, hidden=part.hidden, sampling=Sampling())])
    assert end.sampled is not None
    assert whole.stats().sessions == 1
    whole.forget("s")
    assert whole.stats().kv_bytes == 0


def test_sessions_do_not_see_each_other(stage: Stage) -> None:
    alone = [feed(stage, "a", 0, PROMPT), feed(stage, "a", 5, [7]), feed(stage, "a", 6, [8])]
    stage.forget("a")
    mixed = []
    for position, tokens in ((0, PROMPT), (5, [7]), (6, [8])):
        mixed.append(feed(stage, "a", position, tokens))
        feed(stage, "other", position, [tokens[-1] + 1] * len(tokens))
    assert mixed == alone


def test_a_session_twice_in_a_step_runs_in_order(stage: Stage) -> None:
    apart = [feed(stage, "a", 0, PROMPT), feed(stage, "a", 5, [7]), feed(stage, "a", 6, [8])]
    stage.forget("a")
    works = [Work("a", WHOLE, 0, tokens=PROMPT, sampling=Sampling())]
    works += [
        Work("a", WHOLE, position, tokens=(token,), sampling=Sampling())
        for position, token in ((5, 7), (6, 8))
    ]
    assert stage.step(works) == apart


def test_sessions_share_one_forward(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    packed: list[list[int]] = []
    run = Forward.packed

    def count(self: Forward, span: Span, inputs: torch.Tensor, caches: Any, counts: Any, way: Any) -> Any:
        packed.append(list(counts))
        return run(self, span, inputs, caches, counts, way)

    monkeypatch.setattr(Forward, "packed", count)
    works = [Work(f"s{i}", WHOLE, 0, tokens=PROMPT[: i + 1], sampling=Sampling()) for i in range(4)]
    assert all(done.error is None for done in stage.step(works))
    assert packed == [[1, 2, 3, 4]]
    assert stage.stats().steps == 1
    assert stage.stats().rows == 10


def test_a_forward_that_breaks_ends_its_sessions_and_not_the_stage(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed(stage, "good", 0, PROMPT)
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "silu", lambda *args, **kwargs: 1 / 0)
        patch.setattr(torch.nn.functional, "linear", lambda *args, **kwargs: 1 / 0)
        error = feed(stage, "bad", 0, PROMPT).error
    assert error == "failed: ZeroDivisionError: division by zero"
    assert stage.stats().sessions == 1
    assert feed(stage, "good", 5, [1]).error is None


def test_rewind_goes_back_to_the_same_bits(stage: Stage) -> None:
    feed(stage, "a", 0, PROMPT)
    first = [feed(stage, "a", 5, [7]), feed(stage, "a", 6, [8, 9]), feed(stage, "a", 8, [1])]
    stage.rewind("a", 6)
    assert feed(stage, "a", 7, [1]).error is not None
    assert [feed(stage, "a", 6, [8, 9]), feed(stage, "a", 8, [1])] == first[1:]
    with pytest.raises(ValueError, match="session has 9 rows"):
        stage.rewind("a", 10)
    with pytest.raises(ValueError, match="no session b"):
        stage.rewind("b", 0)


def test_rewind_is_refused_where_it_would_be_wrong(tiny: Callable[..., Path]) -> None:
    recurrent = load(tiny("qwen3_next"))
    assert not recurrent.info.card.rewindable
    feed(recurrent, "a", 0, PROMPT)
    with pytest.raises(ModelUnsupported, match="cannot be rewound"):
        recurrent.rewind("a", 3)
    assert feed(recurrent, "a", 5, [1]).error is None
    sliding = load(tiny("mistral", max_position_embeddings=512))
    tokens = [index % 96 for index in range(300)]
    feed(sliding, "a", 0, tokens)
    for index in range(20):
        feed(sliding, "a", 300 + index, [index])
    first = feed(sliding, "a", 320, [5])
    sliding.rewind("a", 300)
    for index in range(20):
        feed(sliding, "a", 300 + index, [index])
    assert feed(sliding, "a", 320, [5]) == first
    for index in range(180):
        assert feed(sliding, "a", 321 + index, [index % 96]).error is None
    with pytest.raises(ModelUnsupported, match="sliding window"):
        sliding.rewind("a", 100)


def test_repetition_penalty_knows_the_context(stage: Stage) -> None:
    plain = feed(stage, "a", 0, PROMPT).sampled
    assert plain is not None
    harsh = Sampling(repetition_penalty=1000.0)
    feed(stage, "b", 0, PROMPT, sampling=None)
    drawn: list[int] = []
    position, token = 5, 40
    context = (*PROMPT, token)
    for _ in range(30):
        done = feed(stage, "b", position, [token], sampling=harsh, context=context)
        assert done.sampled is not None
        drawn.append(done.sampled.token)
        position, token, context = position + 1, done.sampled.token, ()
    assert len(set(drawn) | set(PROMPT) | {40}) == 30 + len(PROMPT) + 1, "a token came twice"


def test_sampling_that_makes_no_sense_is_refused(stage: Stage) -> None:
    error = feed(stage, "a", 0, PROMPT, sampling=Sampling(temperature=-1.0)).error
    assert error is not None
    assert error.startswith("input: temperature -1.0")


def test_a_closed_stage_says_so(stage: Stage) -> None:
    stage.close()
    with pytest.raises(RuntimeError, match="closed; load it again"):
        feed(stage, "a", 0, PROMPT)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_crosses_stages_unchanged(tiny: Callable[..., Path], dtype: str) -> None:
    path = tiny("llama")
    whole, front, back = (load(path, span, dtype=dtype) for span in (WHOLE, Span(0, 1), Span(1, 4)))
    for position, tokens in ((0, PROMPT), (5, (7,))):
        expected = feed(whole, "a", position, tokens)
        [half] = front.step([Work("a", Span(0, 1), position, tokens=tokens)])
        assert half.hidden is not None
        assert half.hidden.dtype == dtype
        [got] = back.step([Work("a", Span(1, 4), position, hidden=half.hidden, sampling=Sampling())])
        assert got == expected
