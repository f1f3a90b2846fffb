"""Generation through several nodes: the same text as the unsplit model, and everything a request can ask."""

from __future__ import annotations

from typing import Any

import pytest

from mycel.compute.infer.request import GenerateRequest

PROMPT = tuple(b"def f(x):")


async def tokens_of(generation: Any) -> list[int]:
    return [token.id async for piece in generation for token in piece.tokens]


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
async def test_greedy_text_through_three_nodes_is_that_of_transformers(
    swarm: Any, model_of: Any, reference: Any, family: str
) -> None:
    model = model_of(family)
    async with swarm() as s:
        owner, *stages = await s.stages(model, [0, 1, 3, 4])
        request = GenerateRequest(model=f"tiny-{family}", prompt=PROMPT, max_tokens=40, stop_tokens=())
        async with owner.generator.generate(request) as generation:
            tokens = await tokens_of(generation)
        assert tokens == reference(model, PROMPT, 40)
        assert generation.report.finish == "length"
        assert [stage.peer for stage in generation.report.route] == [node.peer for node in stages]
        assert [node.rows for node in stages] == [len(PROMPT) + 39] * 3
