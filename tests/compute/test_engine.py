"""The contract of `Engine`, over the engine in this process and the one in a worker process."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import trio
from transformers import AutoModelForCausalLM

from mycel.compute.engine import (
    Done,
    Engine,
    ModelUnsupported,
    Sampled,
    Sampling,
    Span,
    StageSpec,
    Work,
)
from mycel.compute.inline import InlineEngine
from mycel.compute.model.card import read_card
from mycel.compute.model.tiny import tiny_model
from mycel.compute.tokenizer import byte_level_tokenizer_files, read_tokenizer
from mycel.compute.worker import WorkerEngine
from mycel.protocol.errors import LocalProtocolError
from mycel.protocol.tensor import Tensor

PROMPT = (3, 1, 4, 1, 5, 9, 2, 6)
ALL = Span(0, 4)


@pytest.fixture(params=["inline", "worker"])
def engine(request: pytest.FixtureRequest) -> Engine:
    if request.param == "inline":
        return InlineEngine()
    worker: WorkerEngine = request.getfixturevalue("shared_worker")
    return worker


def spec(path: Path, span: Span | None = None, kv_bytes_max: int = 1 << 30) -> StageSpec:
    return StageSpec(str(path), span, device="cpu", threads=1, kv_bytes_max=kv_bytes_max)


def drawn(done: Done) -> Sampled:
    assert done.error is None, done.error
    assert done.sampled is not None
    return done.sampled


async def generate(
    engine: Engine, session: str, prompt: Sequence[int], count: int, sampling: Sampling, span: Span = ALL
) -> list[Sampled]:
    """`count` tokens after `prompt`, one step each."""
    tokens, position, out = tuple(prompt), 0, []
    for _ in range(count):
        work = Work(session, span, position, tokens=tokens, sampling=sampling)
        out.append(drawn((await engine.step([work]))[0]))
        position += len(tokens)
        tokens = (out[-1].token,)
    return out


async def test_card_without_loading(engine: Engine, tiny_llama_path: Path) -> None:
    card = await engine.describe(str(tiny_llama_path))
    assert card == read_card(str(tiny_llama_path))
    assert (card.architecture, card.n_layers, card.hidden_size) == ("LlamaForCausalLM", 4, 32)


async def test_load_reports_progress_and_what_it_holds(engine: Engine, tiny_llama_path: Path) -> None:
    seen: list[tuple[float, str]] = []
    info = await engine.load(spec(tiny_llama_path, Span(1, 3)), lambda done, what: seen.append((done, what)))
    assert (info.span, info.device, info.dtype) == (Span(1, 3), "cpu", "float32")
    assert info.load_s > 0
    fractions = [fraction for fraction, _ in seen]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    assert all(what for _, what in seen)
    whole = await engine.load(spec(tiny_llama_path))
    assert whole.span == ALL
    assert whole.weight_bytes > info.weight_bytes


async def test_greedy_text_equals_generate(engine: Engine, tiny_llama_path: Path) -> None:
    await engine.load(spec(tiny_llama_path))
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_path)
    wanted = model.generate(torch.tensor([PROMPT]), max_new_tokens=12, do_sample=False, eos_token_id=None)
    got = await generate(engine, "greedy", PROMPT, 12, Sampling())
    assert [sampled.token for sampled in got] == wanted[0, len(PROMPT) :].tolist()


async def test_sub_spans_of_one_stage_hand_over_bit_for_bit(engine: Engine, tiny_llama_path: Path) -> None:
    await engine.load(spec(tiny_llama_path))
    sampling = Sampling(temperature=1.2, seed=5, logprobs=64)
    wanted = await generate(engine, "whole", PROMPT, 5, sampling)
    tokens, position = PROMPT, 0
    for expected in wanted:
        first = Work("cut", Span(0, 3), position, tokens=tokens)
        (handed,) = await engine.step([first])
        assert handed.hidden is not None
        assert handed.hidden.shape == (len(tokens), 32)
        handed.hidden.check()
        last = Work("cut", Span(3, 4), position, hidden=handed.hidden, sampling=sampling)
        assert drawn((await engine.step([last]))[0]) == expected
        position += len(tokens)
        tokens = (expected.token,)


async def test_errors_are_one_works_own(engine: Engine, tiny_llama_path: Path) -> None:
    await engine.load(spec(tiny_llama_path))
    good = Work("good", ALL, 0, tokens=PROMPT, sampling=Sampling())
    works = [
        Work("gap", ALL, 3, tokens=(1,)),
        good,
        Work("alien", ALL, 0, tokens=(96,)),
        Work("none", ALL, 0),
        Work("outside", Span(2, 9), 0, hidden=Tensor("float32", (1, 32), bytes(128))),
        Work("nan", ALL, 0, tokens=PROMPT, sampling=Sampling(temperature=-1)),
        Work("ok", Span(0, 2), 0, tokens=(1, 2)),
    ]
    dones = await engine.step(works)
    assert [(done.session, done.position) for done in dones] == [(w.session, w.position) for w in works]
    assert [done.error is None for done in dones] == [False, True, False, False, False, False, True]
    assert dones[0].error is not None
    assert dones[0].error.startswith("gap:")
    drawn(dones[1])


async def test_rewound_session_goes_on_as_before(engine: Engine, tiny_llama_path: Path) -> None:
    await engine.load(spec(tiny_llama_path))
    wanted = await generate(engine, "r", PROMPT, 6, Sampling(logprobs=8))
    await engine.rewind("r", len(PROMPT) + 2)
    third = Work("r", ALL, len(PROMPT) + 2, tokens=(wanted[2].token,), sampling=Sampling(logprobs=8))
    assert drawn((await engine.step([third]))[0]) == wanted[3]
    with pytest.raises(ValueError, match="no session"):
        await engine.rewind("nobody", 1)


async def test_forget_frees_the_cache(engine: Engine, tiny_llama_path: Path) -> None:
    await engine.load(spec(tiny_llama_path))
    await generate(engine, "a", PROMPT, 3, Sampling())
    await generate(engine, "b", PROMPT, 1, Sampling())
    before = await engine.stats()
    assert (before.sessions, before.steps, before.rows) == (2, 4, 2 * len(PROMPT) + 2)
    assert before.kv_bytes > 0
    assert before.busy_s > 0
    await engine.forget("a")
    await engine.forget("never seen")
    between = await engine.stats()
    assert between.sessions == 1
    assert 0 < between.kv_bytes < before.kv_bytes
    await engine.forget("b")
    assert (await engine.stats()).kv_bytes == 0
    (done,) = await engine.step([Work("a", ALL, len(PROMPT), tokens=(1,))])
    assert done.error is not None


async def test_session_without_cache_memory_is_refused_and_others_go_on(
    engine: Engine, tiny_llama_path: Path
) -> None:
    await engine.load(spec(tiny_llama_path, kv_bytes_max=60_000))
    works = [Work(name, ALL, 0, tokens=PROMPT, sampling=Sampling()) for name in ("first", "second")]
    first, second = await engine.step(works)
    drawn(first)
    assert second.error is not None
    assert second.error.startswith("full:")
    await engine.forget("first")
    drawn((await engine.step(works[1:]))[0])


async def test_sixteen_sessions_in_one_step_get_their_own_tokens(
    engine: Engine, tiny_llama_path: Path
) -> None:
    await engine.load(spec(tiny_llama_path))
    prompts = [tuple((7 * i + j) % 96 for j in range(3 + i % 5)) for i in range(16)]
    alone = [
        [s.token for s in await generate(engine, f"alone{i}", p, 4, Sampling())]
        for i, p in enumerate(prompts)
    ]
    inputs, positions = list(prompts), [0] * 16
    together: list[list[int]] = [[] for _ in prompts]
    for _ in range(4):
        works = [Work(f"s{i}", ALL, positions[i], tokens=inputs[i], sampling=Sampling()) for i in range(16)]
        for i, done in enumerate(await engine.step(works)):
            positions[i] += len(inputs[i])
            inputs[i] = (drawn(done).token,)
            together[i].append(inputs[i][0])
    assert together == alone


async def test_a_penalised_session_is_told_only_new_tokens(engine: Engine, tiny_llama_path: Path) -> None:
    await engine.load(spec(tiny_llama_path))
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_path)
    wanted = model.generate(
        torch.tensor([PROMPT]), max_new_tokens=10, do_sample=False, eos_token_id=None, repetition_penalty=1.8
    )[0, len(PROMPT) :].tolist()
    tokens, position, got = PROMPT, 0, []
    for _ in range(10):
        work = Work(
            "p", ALL, position, tokens=tokens, sampling=Sampling(repetition_penalty=1.8),
            context=PROMPT if position == 0 else (),
        )  # fmt: skip
        got.append(drawn((await engine.step([work]))[0]).token)
        position += len(tokens)
        tokens = (got[-1],)
    assert got == wanted


async def test_what_cannot_be_loaded_says_why_and_the_engine_lives(
    engine: Engine, tiny_llama_path: Path, tmp_path: Path
) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        await engine.load(spec(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        await engine.describe(str(tmp_path))
    with pytest.raises(ModelUnsupported, match="2:9"):
        await engine.load(spec(tiny_llama_path, Span(2, 9)))
    with pytest.raises(ModelUnsupported, match="dtype"):
        await engine.load(StageSpec(str(tiny_llama_path), None, dtype="int3"))
    broken = tmp_path / "broken"
    shutil.copytree(tiny_llama_path, broken)
    weights = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ModelUnsupported, match="cut short"):
        await engine.load(spec(broken))
    await engine.load(spec(tiny_llama_path))
    await generate(engine, "after", PROMPT, 1, Sampling())


async def test_steps_need_a_stage(engine: Engine, tiny_llama_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        await engine.load(spec(tiny_llama_path / "nowhere"))  # the stage held before is let go first
    for ask in (engine.step([]), engine.rewind("s", 0)):
        with pytest.raises(LocalProtocolError, match="load"):
            await ask
    await engine.forget("s")
    assert (await engine.stats()).sessions == 0


async def test_tokenizer_files(engine: Engine, tiny_llama_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "with"
    shutil.copytree(tiny_llama_path, path)
    for name, content in byte_level_tokenizer_files().items():
        (path / name).write_bytes(content)
    files = await engine.tokenizer_files(str(path))
    assert files["tokenizer.json"] == byte_level_tokenizer_files()["tokenizer.json"]
    assert read_tokenizer(files).encode("hi") == [104, 105]
    with pytest.raises(ModelUnsupported, match="tokenizer"):
        await engine.tokenizer_files(str(tiny_llama_path))


async def test_tokenizer_is_converted_where_there_is_no_tokenizer_json(
    engine: Engine, tiny_llama_path: Path, tmp_path: Path
) -> None:
    """GPT-2's older form: a vocabulary and merges."""
    path = tiny_model(tmp_path / "gpt2", "gpt2")
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = [*letters, "Ġ", "th", "the", "<|endoftext|>"]
    (path / "vocab.json").write_text("{" + ", ".join(f'"{w}": {i}' for i, w in enumerate(words)) + "}")
    (path / "merges.txt").write_text("#version: 0.2\nt h\nth e\n")
    (path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    tokenizer = read_tokenizer(await engine.tokenizer_files(str(path)))
    ids = tokenizer.encode("the cat")
    assert ids == [words.index(w) for w in ("the", "Ġ", "c", "a", "t")]
    assert tokenizer.decode(ids) == "the cat"


async def test_cancelled_steps_leave_the_engine_in_order(engine: Engine, tiny_llama_path: Path) -> None:
    await engine.load(spec(tiny_llama_path))
    wanted = await generate(engine, "w", PROMPT, 4, Sampling(logprobs=8))
    big = Tensor("float32", (60, 32), bytes(60 * 128))
    for turn in range(20):
        with trio.move_on_after(0.0003 * turn):
            await engine.step([Work(f"x{turn}", Span(1, 4), 0, hidden=big)] * (1 + turn % 3))
        with trio.CancelScope() as scope:
            scope.cancel()
            await engine.stats()
    assert await generate(engine, "w2", PROMPT, 4, Sampling(logprobs=8)) == wanted


async def test_callers_take_turns(engine: Engine, tiny_llama_path: Path) -> None:
    await engine.load(spec(tiny_llama_path))
    alone = [await generate(engine, f"a{i}", PROMPT[i:], 5, Sampling()) for i in range(4)]
    together: dict[int, list[Sampled]] = {}

    async def one(i: int) -> None:
        together[i] = await generate(engine, f"b{i}", PROMPT[i:], 5, Sampling())

    async with trio.open_nursery() as nursery:
        for i in range(4):
            nursery.start_soon(one, i)
    assert [together[i] for i in range(4)] == alone


async def test_inline_steps_cost_virtual_time(
    tiny_llama_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    engine = InlineEngine(cost=lambda works: 0.5 * len(works), load_s=30.0)
    began = trio.current_time()
    await engine.load(spec(tiny_llama_path))
    assert trio.current_time() - began == 30.0
    await engine.step([Work(name, ALL, 0, tokens=(1, 2)) for name in "abc"])
    assert trio.current_time() - began == 31.5
    engine.break_down("the plug was pulled")
    with pytest.raises(Exception, match="plug"):
        await engine.step([])
    assert "plug" in str(await engine.wait_lost())
