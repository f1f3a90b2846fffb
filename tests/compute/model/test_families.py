"""Every family: stages give the very bits of the unsplit model, packed steps what single ones give."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from mycel.compute.model.card import read_card
from mycel.compute.model.tiny import FAMILIES, WHOLE_ONLY

LAYERS = 6
CUTS = {"2-way": (0, 3, 6), "uneven 4-way": (0, 1, 3, 4, 6)}
NOT_PACKED = {"gpt_neo", "bloom", "falcon-alibi", "qwen3_next", "mamba"}
"""Recurrent states, windows behind a joint mask, and ALiBi made from padding masks."""
STEPS = [
    [(7 * index + 3) % 96 for index in range(11)],  # past the windows of 8
    [5],
    [17],
    [80, 2, 3],
    [44],
    [9],
]


def steps_of(seed: int, counts: Sequence[int]) -> list[list[int]]:
    """Steps of so many tokens each."""
    random = torch.Generator().manual_seed(seed)
    return [torch.randint(96, (count,), generator=random).tolist() for count in counts]


@pytest.mark.parametrize("family", FAMILIES)
def test_split_is_bit_identical(
    family: str, tiny: Callable[..., Path], chain: Callable[..., Any], unsplit: Callable[..., Any],
    drawn_from: list[torch.Tensor],
) -> None:  # fmt: skip
    path = tiny(family, layers=LAYERS)
    expected = unsplit(path).logits(STEPS)
    for name, cuts in CUTS.items():
        stages = chain(path, cuts)
        drawn_from.clear()
        position = 0
        for step in STEPS:
            stages.step([("one", position, step)])
            position += len(step)
        same = [torch.equal(got, wanted) for got, wanted in zip(drawn_from, expected, strict=True)]
        assert all(same), f"{family} {name}: steps {[i for i, equal in enumerate(same) if not equal]} differ"


@pytest.mark.parametrize("family", WHOLE_ONLY)
def test_served_whole_is_bit_identical(
    family: str,
    tiny: Callable[..., Path],
    chain: Callable[..., Any],
    unsplit: Callable[..., Any],
    drawn_from: list[torch.Tensor],
) -> None:
    path = tiny(family)
    stages = chain(path, (0, 4))
    position = 0
    for step in STEPS:
        stages.step([("one", position, step)])
        position += len(step)
    assert all(
        torch.equal(got, wanted) for got, wanted in zip(drawn_from, unsplit(path).logits(STEPS), strict=True)
    )


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "mixtral", "qwen3_next", "mamba", "gpt_oss"])
def test_split_is_bit_identical_in_bfloat16(
    family: str,
    tiny: Callable[..., Path],
    chain: Callable[..., Any],
    unsplit: Callable[..., Any],
    drawn_from: list[torch.Tensor],
) -> None:
    path = tiny(family, layers=LAYERS)
    stages = chain(path, CUTS["uneven 4-way"], dtype="bfloat16")
    position = 0
    for step in STEPS:
        stages.step([("one", position, step)])
        position += len(step)
    expected = unsplit(path, torch.bfloat16).logits(STEPS)
    assert [torch.equal(got, wanted) for got, wanted in zip(drawn_from, expected, strict=True)] == [True] * 6


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_steps_are_close_to_single_ones(
    family: str, tiny: Callable[..., Path], chain: Callable[..., Any], drawn_from: list[torch.Tensor]
) -> None:
    path = tiny(family, layers=LAYERS)
    stages = chain(path, (0, 3, 6))
    assert all(stage.info.card.batchable == (family not in NOT_PACKED) for stage in stages.stages)
    counts = {"a": [11, 1, 1, 1, 1], "b": [3, 1, 6, 1, 1], "c": [1, 1, 1, 9, 1], "d": [20, 2, 1, 1, 3]}
    steps = {session: steps_of(seed, counts[session]) for seed, session in enumerate(counts)}
    alone: dict[tuple[str, int], torch.Tensor] = {}
    for session in counts:
        position = 0
        for turn, step in enumerate(steps[session]):
            stages.step([(session, position, step)])
            alone[session, turn] = drawn_from.pop()
            position += len(step)
    for stage in stages.stages:
        for session in counts:
            stage.forget(session)
    for turn in range(5):
        asked = [(session, sum(counts[session][:turn]), steps[session][turn]) for session in counts]
        drawn_from.clear()
        stages.step(asked)
        for session, logits in zip(counts, drawn_from, strict=True):
            difference = (logits - alone[session, turn]).abs().max() / alone[session, turn].abs().max()
            assert difference < 5e-6, f"{family}: session {session}, step {turn}"


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ("mamba", "qwen3_next")])
def test_card_tells_what_a_cached_row_costs(
    family: str, tiny: Callable[..., Path], chain: Callable[..., Any]
) -> None:
    path = tiny(family, layers=LAYERS)
    card = read_card(str(path))
    stages = chain(path, (0, 6))
    stages.step([("one", 0, STEPS[0])])
    [stage] = stages.stages
    rows, rest = divmod(stage.stats().kv_bytes, card.kv_bytes_per_token_layer * LAYERS)
    assert rest == 0
    assert rows >= len(STEPS[0])
    assert card.n_layers == LAYERS
    assert card.rewindable
