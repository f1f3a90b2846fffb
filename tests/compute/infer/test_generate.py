"""Generation through several nodes: the same text as the unsplit model, and everything a request can ask."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import trio
from transformers import AutoModelForCausalLM

from mycel.compute.engine import Sampling, Span, StageSpec
from mycel.compute.infer.pace import Timing
from mycel.compute.infer.request import (
    GenerateRequest,
    GenerationFailed,
    LayersMissing,
    ModelUnknown,
    RequestInvalid,
)
from mycel.compute.infer.serve import ORPHAN_S
from mycel.compute.inline import InlineEngine

PROMPT = tuple(b"def f(x):")


def request_of(**changes: Any) -> GenerateRequest:
    asked = {"model": "tiny-llama", "prompt": PROMPT, "max_tokens": 24, "stop_tokens": ()} | changes
    return GenerateRequest(**asked)


async def pieces_of(owner: Any, request: GenerateRequest) -> tuple[list[Any], Any]:
    async with owner.generator.generate(request) as generation:
        pieces = [piece async for piece in generation]
    return pieces, generation.report


def ids(pieces: list[Any]) -> list[int]:
    return [token.id for piece in pieces for token in piece.tokens]


def text(pieces: list[Any]) -> str:
    return "".join(piece.text for piece in pieces)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
async def test_greedy_text_through_three_nodes_is_that_of_transformers(
    autojump_clock: Any, swarm: Any, model_of: Any, reference: Any, family: str
) -> None:
    model = model_of(family)
    async with swarm() as s:
        owner, *stages = await s.stages(model, [0, 1, 3, 4])
        pieces, report = await pieces_of(owner, request_of(model=f"tiny-{family}", max_tokens=40))
        assert ids(pieces) == reference(model, PROMPT, 40)
        assert report.finish == pieces[-1].finish == "length"
        assert [stage.peer for stage in report.route] == [node.peer for node in stages]
        assert [node.rows for node in stages] == [len(PROMPT) + 39] * 3
        assert (report.prompt_tokens, report.tokens, report.failovers) == (len(PROMPT), 40, ())
        assert 0 < report.longest_gap_s < 0.1
        assert report.gap_min > 0


async def test_text_goes_in_and_out_and_the_owner_needs_no_files(
    autojump_clock: Any, swarm: Any, llama: Path
) -> None:
    async with swarm() as s:
        owner, *_ = await s.stages(llama, [0, 2, 4])
        tokenizer = await owner.generator.tokenizer("tiny-llama")
        assert tokenizer.encode("def f(x):") == list(PROMPT)
        pieces, _ = await pieces_of(owner, request_of(prompt="def f(x):", echo=True))
        assert pieces[0].text == "def f(x):"
        assert text(pieces[1:]) == tokenizer.decode(ids(pieces))


async def test_a_stop_string_ends_the_text_before_itself_and_frees_the_stages(
    autojump_clock: Any, swarm: Any, llama: Path
) -> None:
    async with swarm() as s:
        owner, *stages = await s.stages(llama, [0, 2, 4])
        whole = text((await pieces_of(owner, request_of()))[0])
        stop = whole[9:12]
        pieces, report = await pieces_of(owner, request_of(stop=(stop,)))
        assert text(pieces) == whole[: whole.index(stop)]
        assert report.finish == pieces[-1].finish == "stop"
        await trio.sleep(1)
        assert [node.open_sessions for node in stages] == [0, 0]
        assert [await node.kv_sessions() for node in stages] == [0, 0]


async def test_a_stop_token_ends_it_and_is_not_shown(autojump_clock: Any, swarm: Any, llama: Path) -> None:
    async with swarm() as s:
        owner, *_ = await s.stages(llama, [0, 2, 4])
        whole = ids((await pieces_of(owner, request_of()))[0])
        stop = whole[10]
        pieces, report = await pieces_of(owner, request_of(stop_tokens=(stop,)))
        assert ids(pieces) == whole[: whole.index(stop)]
        assert report.finish == "stop"


async def test_logprobs_are_those_of_the_unsplit_model(autojump_clock: Any, swarm: Any, llama: Path) -> None:
    async with swarm() as s:
        owner, *_ = await s.stages(llama, [0, 2, 4])
        pieces, _ = await pieces_of(owner, request_of(sampling=Sampling(logprobs=3), max_tokens=8))
    whole = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    sequence = [*PROMPT, *ids(pieces)]
    with torch.inference_mode():
        expected = whole(torch.tensor([sequence])).logits[0].log_softmax(-1)
    tokens = [token for piece in pieces for token in piece.tokens]
    for place, token in enumerate(tokens, start=len(PROMPT) - 1):
        best = expected[place].topk(3)
        assert token.logprob == pytest.approx(float(expected[place, token.id]), abs=1e-3)
        assert [top[0] for top in token.top] == best.indices.tolist()
        assert [top[2] for top in token.top] == pytest.approx(best.values.tolist(), abs=1e-3)
        assert all(isinstance(top[1], str) for top in token.top)


async def test_the_seed_decides_the_draws(autojump_clock: Any, swarm: Any, llama: Path) -> None:
    def sampled(seed: int) -> GenerateRequest:
        return request_of(sampling=Sampling(temperature=1.5, seed=seed))

    async with swarm() as s:
        owner, *_ = await s.stages(llama, [0, 2, 4])
        one, again, other = [ids((await pieces_of(owner, sampled(seed)))[0]) for seed in (1, 1, 2)]
        assert one == again != other


async def test_a_repetition_penalty_is_that_of_transformers(
    autojump_clock: Any, swarm: Any, llama: Path
) -> None:
    async with swarm() as s:
        owner, *_ = await s.stages(llama, [0, 2, 4])
        sampling = Sampling(repetition_penalty=1.7)
        pieces, _ = await pieces_of(owner, request_of(sampling=sampling, max_tokens=40))
    whole = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    prompt = torch.tensor([list(PROMPT)])
    with torch.inference_mode():
        out = whole.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=40, do_sample=False,
            repetition_penalty=1.7, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
    assert ids(pieces) == out[0, len(PROMPT) :].tolist()


async def test_max_tokens_is_cut_to_the_models_positions(
    autojump_clock: Any, swarm: Any, llama: Path
) -> None:
    async with swarm() as s:
        owner, *_ = await s.stages(llama, [0, 2, 4])
        pieces, report = await pieces_of(owner, request_of(prompt=tuple([65] * 500), max_tokens=1000))
        assert len(ids(pieces)) == 12
        assert report.finish == "length"


async def test_a_long_prompt_is_filled_in_chunks(
    autojump_clock: Any, swarm: Any, llama: Path, reference: Any
) -> None:
    prompt = tuple((7 * n) % 251 for n in range(300))
    async with swarm() as s:
        owner, *stages = await s.stages(llama, [0, 2, 4], timing=Timing(prefill_rows=64))
        pieces, report = await pieces_of(owner, request_of(prompt=prompt, max_tokens=10))
        assert ids(pieces) == reference(llama, prompt, 10)
        assert [node.stages.counters(report.session).steps for node in stages] == [5 + 9] * 2


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"model": "other"}, ModelUnknown, "served: tiny-llama"),
        ({"prompt": ()}, RequestInvalid, "empty"),
        ({"prompt": tuple([1] * 512)}, RequestInvalid, "positions"),
        ({"prompt": (9999,)}, RequestInvalid, "vocabulary"),
        ({"max_tokens": 0}, RequestInvalid, "at least one"),
        ({"stop": ("",)}, RequestInvalid, "stop string"),
    ],
)
async def test_a_request_that_cannot_be_is_refused_at_the_door(
    autojump_clock: Any, swarm: Any, llama: Path, changes: Any, error: type[Exception], words: str
) -> None:
    async with swarm() as s:
        owner, *_ = await s.stages(llama, [0, 2, 4])
        with pytest.raises(error, match=words):
            await pieces_of(owner, request_of(**changes))


async def test_sampling_that_makes_no_sense_fails_with_the_reason(
    autojump_clock: Any, swarm: Any, llama: Path
) -> None:
    async with swarm() as s:
        owner, *_ = await s.stages(llama, [0, 2, 4])
        with pytest.raises(Exception, match="temperature"):
            await pieces_of(owner, request_of(sampling=Sampling(temperature=-1.0)))


async def test_missing_layers_are_named_with_what_to_do(autojump_clock: Any, swarm: Any, llama: Path) -> None:
    async with swarm() as s:
        owner, *_ = await s.stages(llama, [0, 1, 3])
        [status] = owner.generator.models()
        assert status.missing == (Span(3, 4),)
        assert not status.complete
        with pytest.raises(
            LayersMissing, match=r"layers 3:4 of tiny-llama .* mycel serve tiny-llama --layers 3:4"
        ):
            await pieces_of(owner, request_of())


async def test_a_generation_waits_a_while_for_missing_layers(
    autojump_clock: Any, swarm: Any, llama: Path
) -> None:
    async with swarm() as s, trio.open_nursery() as nursery:
        owner, *_ = await s.stages(llama, [0, 1, 3])

        async def come() -> None:
            await trio.sleep(4)
            node = await s.add()
            await node.serve(llama, 3, 4)

        nursery.start_soon(come)
        pieces, _ = await pieces_of(owner, request_of())
        assert len(ids(pieces)) == 24


async def serve_slowly(node: Any, model: Path, seconds: float) -> None:
    spec = StageSpec(str(model), Span(3, 4), dtype="float32", device="cpu")
    await node.stages.serve(spec, lambda: InlineEngine(load_s=seconds))


async def test_a_generation_waits_longer_for_layers_that_load(
    autojump_clock: Any, swarm: Any, llama: Path, reference: Any
) -> None:
    async with swarm() as s, trio.open_nursery() as nursery:
        owner, *_ = await s.stages(llama, [0, 1, 3])
        nursery.start_soon(serve_slowly, await s.add(), llama, 60.0)
        pieces, _ = await pieces_of(owner, request_of())
        assert ids(pieces) == reference(llama, PROMPT, 24)
        assert trio.current_time() > 60


async def test_layers_that_load_for_too_long_are_told_from_missing_ones(
    autojump_clock: Any, swarm: Any, llama: Path
) -> None:
    async with swarm() as s, trio.open_nursery() as nursery:
        owner, *_ = await s.stages(llama, [0, 1, 3], timing=Timing(loading_s=30.0))
        nursery.start_soon(serve_slowly, await s.add(), llama, 60.0)
        with pytest.raises(LayersMissing, match="layers 3:4 of tiny-llama are still being loaded"):
            await pieces_of(owner, request_of())
        assert 30 < trio.current_time() < 35
        nursery.cancel_scope.cancel()


async def test_losing_the_only_holder_ends_with_that_error(
    autojump_clock: Any, swarm: Any, llama: Path
) -> None:
    async with swarm() as s:
        owner, _, last = await s.stages(llama, [0, 2, 4])
        count = 0
        with pytest.raises(LayersMissing, match="layers 2:4"):
            async with owner.generator.generate(request_of(max_tokens=100)) as generation:
                async for piece in generation:
                    count += len(piece.tokens)
                    if count == 10:
                        last.kill()
        assert count >= 10
        assert generation.report.finish == "failed"


async def test_leaving_the_block_frees_caches_everywhere(
    autojump_clock: Any, swarm: Any, llama: Path
) -> None:
    async with swarm() as s:
        owner, *stages = await s.stages(llama, [0, 1, 3, 4])
        async with owner.generator.generate(request_of(max_tokens=400)) as generation:
            async for _ in generation:
                break
            assert [node.open_sessions for node in stages] == [1, 1, 1]
        assert generation.report.finish == "cancelled"
        await trio.sleep(1)
        rows = [node.rows for node in stages]
        await trio.sleep(5)
        assert [node.rows for node in stages] == rows
        assert [node.open_sessions for node in stages] == [0, 0, 0]
        assert [await node.kv_sessions() for node in stages] == [0, 0, 0]


async def test_a_slow_client_pauses_the_ring(
    autojump_clock: Any, swarm: Any, llama: Path, reference: Any
) -> None:
    async with swarm() as s:
        owner, *stages = await s.stages(llama, [0, 1, 3, 4], timing=Timing(window=8))
        tokens: list[int] = []
        async with owner.generator.generate(request_of(max_tokens=40)) as generation:
            async for piece in generation:
                tokens += [token.id for token in piece.tokens]
                await trio.sleep(20)
                assert stages[0].rows <= len(PROMPT) + len(tokens) + 8
        assert tokens == reference(llama, PROMPT, 40)
        assert generation.report.failovers == ()


async def test_sessions_at_once_share_steps(
    autojump_clock: Any, swarm: Any, llama: Path, reference: Any
) -> None:
    prompts = [(*PROMPT, 100 + n) for n in range(16)]
    async with swarm() as s:
        owner, *stages = await s.stages(llama, [0, 1, 3, 4])
        began = trio.current_time()
        await pieces_of(owner, request_of(prompt=prompts[0]))
        alone_s = trio.current_time() - began
        steps_before = [node.stages.totals.steps for node in stages]
        results: dict[int, list[int]] = {}

        async def run(number: int) -> None:
            results[number] = ids((await pieces_of(owner, request_of(prompt=prompts[number])))[0])

        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            for number in range(16):
                nursery.start_soon(run, number)
        together_s = trio.current_time() - began
        assert 16 * alone_s / together_s > 4
        for number, prompt in enumerate(prompts):
            assert results[number] == reference(llama, prompt, 24)
        for node, before in zip(stages, steps_before, strict=True):
            stats = await node.engines[-1].stats()
            assert stats.steps < 16 * 24 / 2  # engine steps: shared by two sessions and more
            assert node.stages.totals.steps - before == 16 * 24  # each session's own


async def test_a_session_whose_owner_is_gone_is_closed_after_a_while(
    autojump_clock: Any, swarm: Any, llama: Path
) -> None:
    async with swarm() as s:
        owner, *stages = await s.stages(llama, [0, 1, 3, 4])
        async with trio.open_nursery() as nursery:

            async def run() -> None:
                with pytest.raises(GenerationFailed, match="stops"):
                    async with owner.generator.generate(request_of(max_tokens=400)) as generation:
                        async for _ in generation:
                            await trio.sleep(1)

            nursery.start_soon(run)
            await trio.sleep(3)
            assert [node.open_sessions for node in stages] == [1, 1, 1]
            owner.kill()
            await trio.sleep(ORPHAN_S - 1)
            assert [node.open_sessions for node in stages] == [1, 1, 1]
            await trio.sleep(3)
            assert [node.open_sessions for node in stages] == [0, 0, 0]
            assert [await node.kv_sessions() for node in stages] == [0, 0, 0]
            nursery.cancel_scope.cancel()


async def test_layers_are_chosen_when_none_are_named_also_by_many_at_once(
    autojump_clock: Any, swarm: Any, llama: Path, reference: Any
) -> None:
    async with swarm() as s:
        owner = await s.add()
        nodes = [await s.add() for _ in range(5)]
        async with trio.open_nursery() as nursery:
            for node in nodes:
                nursery.start_soon(lambda n: n.serve(llama, stages=4), node)
        await s.see(owner, 5)
        [status] = owner.generator.models()
        held = sorted((holder.span.start, holder.span.end) for holder in status.holders)
        assert held == [(0, 1), (0, 4), (1, 2), (2, 3), (3, 4)]
        pieces, report = await pieces_of(owner, request_of())
        assert ids(pieces) == reference(llama, PROMPT, 24)
        assert len(report.route) == 4


async def test_the_owner_may_be_a_stage_itself(
    autojump_clock: Any, swarm: Any, llama: Path, reference: Any
) -> None:
    async with swarm() as s:
        owner, *_ = await s.stages(llama, [1, 3, 4])
        await owner.serve(llama, 0, 1)
        pieces, report = await pieces_of(owner, request_of())
        assert ids(pieces) == reference(llama, PROMPT, 24)
        assert report.route[0].peer == owner.peer


async def test_one_node_alone_serves_itself(
    autojump_clock: Any, swarm: Any, llama: Path, reference: Any
) -> None:
    async with swarm() as s:
        owner = await s.add()
        await owner.serve(llama)
        pieces, report = await pieces_of(owner, request_of())
        assert ids(pieces) == reference(llama, PROMPT, 24)
        assert [(stage.peer, stage.span) for stage in report.route] == [(owner.peer, Span(0, 4))]


async def test_a_peer_may_have_several_stages_of_a_session(
    autojump_clock: Any, swarm: Any, llama: Path, reference: Any
) -> None:
    """Layers 0:1 and 2:4 on one peer, the second beside the first; then next to each other on one."""
    async with swarm() as s:
        owner, middle = await s.stages(llama, [1, 2])
        both = await s.add()
        await both.serve(llama, 0, 1)
        await both.serve(llama, 2, 4)
        await s.see(owner, 3)
        pieces, report = await pieces_of(owner, request_of())
        assert ids(pieces) == reference(llama, PROMPT, 24)
        assert [stage.peer for stage in report.route] == [both.peer, middle.peer, both.peer]
        rows = len(PROMPT) + 24 - 1
        assert both.stages.counters(report.session).rows_computed == 2 * rows
        middle.kill()
        await both.serve(llama, 1, 2)
        await s.see(owner, 3)
        pieces, report = await pieces_of(owner, request_of())
        assert ids(pieces) == reference(llama, PROMPT, 24)
        assert [stage.peer for stage in report.route] == [both.peer] * 3
        await trio.sleep(1)
        assert owner.open_sessions == both.open_sessions == 0
