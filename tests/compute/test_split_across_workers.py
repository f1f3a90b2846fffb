"""Three families cut into three worker processes give the unsplit model's output, bit for bit."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
import trio
from transformers import AutoModelForCausalLM

from mycel.compute.engine import Sampled, Sampling, Span, StageSpec, Work
from mycel.compute.model.sample import draw
from mycel.compute.model.tiny import tiny_model
from mycel.compute.process import WorkerOptions
from mycel.compute.worker import WorkerEngine, start_worker

SPANS = (Span(0, 1), Span(1, 3), Span(3, 4))
PROMPT = (7, 3, 88, 12, 5, 61, 3, 3, 40, 9, 21)
SAMPLING = Sampling(temperature=0.9, top_p=0.95, seed=9, logprobs=64)
"""Two thirds of the vocabulary's log-probabilities are compared with each token, all 17 digits of them."""
COUNT = 10


@pytest.fixture(scope="module")
def workers(shared_worker: WorkerEngine) -> Iterator[list[WorkerEngine]]:
    with ExitStack() as stack:
        started = [start_worker(WorkerOptions(environment=os.environ)) for _ in SPANS[1:]]
        for worker in started:
            stack.callback(trio.run, worker.aclose)
        yield [shared_worker, *started]


def unsplit(path: Path) -> list[Sampled]:
    """The same steps through transformers' own model in this process, as its generate() takes them."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokens, position, cache, out = PROMPT, 0, None, []
    with torch.inference_mode():
        for _ in range(COUNT):
            step = model(torch.tensor([tokens]), past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = step.past_key_values
            position += len(tokens)
            out.append(draw(step.logits[0, -1], SAMPLING, position))
            tokens = (out[-1].token,)
    return out


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_moe"])
async def test_split_across_processes_is_bit_identical(
    family: str, workers: list[WorkerEngine], tmp_path: Path
) -> None:
    path = tiny_model(tmp_path / family, family, seed=4)
    async with trio.open_nursery() as nursery:
        for worker, span in zip(workers, SPANS, strict=True):
            nursery.start_soon(worker.load, StageSpec(str(path), span, device="cpu", threads=1))
    tokens, position, got = PROMPT, 0, []
    for _ in range(COUNT):
        done = None
        for worker, span in zip(workers, SPANS, strict=True):
            work = Work(
                "s",
                span,
                position,
                tokens=tokens if span.start == 0 else None,
                hidden=None if done is None else done.hidden,
                sampling=SAMPLING if span.end == 4 else None,
            )
            (done,) = await worker.step([work])
            assert done.error is None
        assert done is not None
        assert done.sampled is not None
        position += len(tokens)
        got.append(done.sampled)
        tokens = (done.sampled.token,)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert got == unsplit(path)
    finally:
        torch.set_num_threads(threads)
