"""Layers whose weights all threads read at once: the same bits, or left alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mycel.compute.engine import Span, StageSpec, Work
from mycel.compute.model import blocks, stage
from mycel.compute.model.blocks import BlockLinear, block_counts, use_blocks
from mycel.compute.model.load import load_stage
from mycel.compute.model.stage import Stage
from mycel.compute.model.threads import ThreadChoice

WIDE = {"hidden_size": 512, "intermediate_size": 1376, "vocab_size": 2048}
STEPS = [[5, 17, 80, 2, 33], [7], [41], [9], [60]]

needs_mkl = pytest.mark.skipif(not torch._C.has_mkl, reason="torch has no MKL here")


@pytest.fixture
def two_threads() -> None:
    """Undone by `one_thread`."""
    torch.set_num_threads(2)


def modules_of(loaded: Stage) -> list[nn.Linear]:
    return [module for module in loaded._forward._model.modules() if isinstance(module, nn.Linear)]


def check_bits(stages: Any, unsplit: Any, drawn_from: list[torch.Tensor]) -> None:
    expected = unsplit.logits(STEPS)
    position = 0
    for step in STEPS:
        stages.step([("a", position, step)])
        position += len(step)
    assert len(drawn_from) == len(STEPS)
    assert all(torch.equal(got, wanted) for got, wanted in zip(drawn_from, expected, strict=True))


@needs_mkl
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("family", ["llama", "qwen2", "phi"])
def test_decoding_in_blocks_gives_the_bits_of_the_unsplit_model(
    tiny: Callable[..., Path],
    chain: Callable[..., Any],
    unsplit: Callable[..., Any],
    drawn_from: list[torch.Tensor],
    family: str,
) -> None:
    path = tiny(family, layers=2, **WIDE)
    stages = chain(path, (0, 1, 2), threads=2)
    cut = [module for each in stages.stages for module in modules_of(each) if type(module) is BlockLinear]
    assert len(cut) >= 8  # all but narrow ones
    assert (cut[0].offsets is None) == (family == "llama")  # with and without a bias
    check_bits(stages, unsplit(path), drawn_from)


@needs_mkl
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("family", ["gemma2", "mixtral", "opt", "deepseek_v3", "mamba", "falcon", "cohere2"])
def test_blocks_fit_every_way_that_layers_are_called(
    tiny: Callable[..., Path],
    chain: Callable[..., Any],
    unsplit: Callable[..., Any],
    drawn_from: list[torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
    family: str,
) -> None:
    monkeypatch.setattr(blocks, "BYTES_MIN", 0)
    monkeypatch.setattr(blocks, "BLOCK_FEATURES_MIN", 1)
    path = tiny(family)
    stages = chain(path, (0, 2, 4), threads=2)
    assert any(type(module) is BlockLinear for each in stages.stages for module in modules_of(each))
    check_bits(stages, unsplit(path), drawn_from)


@needs_mkl
@pytest.mark.usefixtures("two_threads")
def test_sessions_that_share_a_step_go_through_the_blocks_together(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny("llama", layers=2, **WIDE)
    loaded = load_stage(StageSpec(str(path), Span(0, 2), device="cpu", threads=2))
    counts: list[int] = []
    in_blocks = BlockLinear.in_blocks

    def watch(self: BlockLinear, rows: torch.Tensor) -> torch.Tensor:
        counts.append(rows.shape[1])
        return in_blocks(self, rows)

    monkeypatch.setattr(BlockLinear, "in_blocks", watch)
    prompts = [STEPS[0], [1, 2, 3]]
    for name, prompt in enumerate(prompts):
        loaded.step([Work(str(name), Span(0, 2), 0, tokens=tuple(prompt))])
    assert set(counts) == {1}  # the head's one row: a prefill's many are left to the library's own way
    counts.clear()
    loaded.step([Work(str(name), Span(0, 2), len(p), tokens=(4,)) for name, p in enumerate(prompts)])
    assert counts
    assert set(counts) == {2}


@needs_mkl
@pytest.mark.usefixtures("two_threads")
def test_a_layer_whose_bits_would_differ_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    right = BlockLinear.in_blocks
    model = nn.Sequential(nn.Linear(512, 1024), nn.Linear(1024, 512, bias=False), nn.Linear(64, 64))
    monkeypatch.setattr(BlockLinear, "in_blocks", lambda self, rows: right(self, rows) * (1 + 2**-22))
    use_blocks(model)
    assert [type(module) for module in model] == [nn.Linear] * 3
    monkeypatch.undo()
    use_blocks(model)
    assert [type(module) for module in model] == [BlockLinear, BlockLinear, nn.Linear]


def test_blocks_are_even_for_the_threads_where_they_can_be() -> None:
    assert block_counts(4096, 2)[:4] == [16, 8, 4, 2]
    assert block_counts(4096, 6) == [32, 16, 8]
    assert block_counts(11008, 12)[:2] == [86, 64]
    assert block_counts(768, 16)[0] == 16  # blocks of 48
    assert block_counts(4099, 4) == []  # a prime


def test_one_thread_needs_no_blocks() -> None:
    model = nn.Sequential(nn.Linear(512, 1024))
    use_blocks(model)
    assert type(model[0]) is nn.Linear


@pytest.mark.usefixtures("two_threads")
def test_the_number_of_threads_a_step_runs_with_shows_in_no_bit(
    tiny: Callable[..., Path],
    chain: Callable[..., Any],
    unsplit: Callable[..., Any],
    drawn_from: list[torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    used: list[int] = []

    class Turns(ThreadChoice):
        """One thread and two, in turns."""

        def threads(self) -> int:
            used.append(1 + len(used) % 2)
            return used[-1]

    monkeypatch.setattr(stage, "ThreadChoice", Turns)
    path = tiny("llama", layers=2, **WIDE)
    check_bits(chain(path, (0, 2), threads=2), unsplit(path), drawn_from)
    assert used == [1, 2, 1, 2]  # the prompt is no decode step
    assert torch.get_num_threads() == 2
