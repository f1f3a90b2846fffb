"""Tiny models of every family, the unsplit model beside its stages, and a way to drive stages by hand."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from mycel.compute.engine import Done, Sampling, Span, StageSpec, Work
from mycel.compute.model import sample
from mycel.compute.model.load import load_stage
from mycel.compute.model.quiet import quiet_transformers
from mycel.compute.model.stage import Stage
from mycel.compute.model.tiny import tiny_model
from mycel.protocol.tensor import Tensor

GREEDY = Sampling()


class Chain:
    """Stages of one model, one after another, as a route would run them."""

    def __init__(self, path: Path, cuts: Sequence[int], **spec: Any) -> None:
        self.stages: list[Stage] = [
            load_stage(StageSpec(str(path), Span(start, end), device="cpu", **({"threads": 1} | spec)))
            for start, end in itertools.pairwise(cuts)
        ]
        self.last = self.stages[-1].info.span

    def step(
        self,
        asked: Sequence[tuple[str, int, Sequence[int]]],
        sampling: Sampling | None = GREEDY,
        context: tuple[int, ...] = (),
    ) -> list[Done]:
        """One step of several sessions, (session, position, tokens) each, through all stages at once."""
        hidden: list[Tensor | None] = [None] * len(asked)
        done: list[Done] = []
        for stage in self.stages:
            span = stage.info.span
            works = [
                Work(
                    session,
                    span,
                    position,
                    tokens=tuple(tokens) if span.start == 0 else None,
                    hidden=hidden[index],
                    sampling=sampling if span == self.last else None,
                    context=context if span == self.last else (),
                )
                for index, (session, position, tokens) in enumerate(asked)
            ]
            done = stage.step(works)
            assert [result.error for result in done] == [None] * len(asked)
            hidden = [result.hidden for result in done]
        return done


class Unsplit:
    """The model as transformers runs it."""

    def __init__(self, path: Path, dtype: torch.dtype = torch.float32) -> None:
        with quiet_transformers():
            self.model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
        self.argument = "cache_params" if self.model.config.model_type == "mamba" else "past_key_values"

    def logits(self, steps: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """The last row's logits after each step of one session."""
        cache = {self.argument: DynamicCache(config=self.model.config)}
        with torch.no_grad():
            return [
                self.model(torch.tensor([step]), use_cache=True, logits_to_keep=1, **cache).logits[0, -1]
                for step in steps
            ]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The split of a sum over threads shows in its last bit, and tiny models are slower on more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny(family, **settings)`: the directory of a tiny random model, made once."""
    made: dict[str, Path] = {}

    def make(family: str, **settings: Any) -> Path:
        key = f"{family} {sorted(settings.items())}"
        if key not in made:
            made[key] = tiny_model(tmp_path_factory.mktemp(family) / "model", family, **settings)
        return made[key]

    return make


@pytest.fixture
def drawn_from(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The logits that tokens are drawn from, as they pass."""
    seen: list[torch.Tensor] = []
    draw = sample.draw

    def watch(logits: torch.Tensor, *rest: Any) -> Any:
        seen.append(logits.clone())
        return draw(logits, *rest)

    monkeypatch.setattr(sample, "draw", watch)
    return seen


@pytest.fixture
def chain() -> Callable[..., Chain]:
    """`chain(path, cuts, **spec)`: stages cut there."""
    return Chain


@pytest.fixture
def unsplit() -> Callable[..., Unsplit]:
    """`unsplit(path)`: the whole model."""
    return Unsplit
