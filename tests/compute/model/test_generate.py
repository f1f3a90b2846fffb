"""Greedy text through three stages is what transformers' own `generate` writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mycel.compute.engine import Sampling

PROMPT = [5, 17, 80, 2, 33, 61, 9]
COUNT = 24


@pytest.mark.parametrize("penalty", [1.0, 20.0])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe", "gemma2", "mamba"])
def test_greedy_equals_generate(
    family: str,
    penalty: float,
    tiny: Callable[..., Path],
    chain: Callable[..., Any],
    unsplit: Callable[..., Any],
) -> None:
    path = tiny(family, layers=6, seed=3)
    model = unsplit(path).model
    settings = {"max_new_tokens": COUNT, "min_new_tokens": COUNT, "do_sample": False, "pad_token_id": 0}
    settings["repetition_penalty"] = penalty
    ids = torch.tensor([PROMPT])
    model.generation_config.eos_token_id = None
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, len(PROMPT) :].tolist()
    stages = chain(path, (0, 1, 4, 6))
    sampling = Sampling(repetition_penalty=penalty)
    [done] = stages.step([("s", 0, PROMPT)], sampling, tuple(PROMPT))
    text = [done.sampled.token]
    while len(text) < COUNT:
        [done] = stages.step([("s", len(PROMPT) + len(text) - 1, text[-1:])], sampling)
        text.append(done.sampled.token)
    assert text == expected
    assert penalty == 1.0 or len(set(text)) > 8, "a text of few tokens would prove little"
