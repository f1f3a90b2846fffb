"""Drawing tokens: transformers' rules, and draws that depend on (seed, position) alone."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mycel.compute.engine import Sampling
from mycel.compute.model import sample
from mycel.compute.model.sample import draw, uniform

VOCAB = 50


def logits_of(seed: int, vocab: int = VOCAB, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(vocab, generator=torch.Generator().manual_seed(seed)) * scale


def theirs(logits: torch.Tensor, sampling: Sampling, context: tuple[int, ...]) -> torch.Tensor:
    """The distribution that transformers' generate() would draw from."""
    rules = LogitsProcessorList()
    if sampling.repetition_penalty != 1 and context:
        rules.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    rules.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        rules.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        rules.append(TopPLogitsWarper(sampling.top_p))
    ids = torch.LongTensor([list(context)])
    return torch.softmax(rules(ids, logits[None].clone().float())[0].double(), 0)


samplings = st.builds(
    Sampling,
    temperature=st.floats(0.2, 3.0),
    top_k=st.integers(0, VOCAB + 5),
    top_p=st.floats(0.05, 1.0),
    repetition_penalty=st.sampled_from([1.0, 0.8, 1.3, 2.0]),
    seed=st.integers(-(2**63), 2**64 - 1),
)


@given(samplings, st.integers(0, 10**6), st.lists(st.integers(0, VOCAB - 1), max_size=12))
@settings(max_examples=150, deadline=None)
def test_draw_is_the_inverse_of_transformers_cumulative_distribution(
    sampling: Sampling, seed: int, context: list[int]
) -> None:
    logits = logits_of(seed)
    probabilities = theirs(logits, sampling, tuple(context))
    for position in range(8):
        token = draw(logits, sampling, position, context).token
        u = uniform(sampling.seed, position)
        below = float(probabilities[:token].sum())
        assert probabilities[token] > 0, "drew a token that transformers had removed"
        assert below - 1e-6 <= u <= below + float(probabilities[token]) + 1e-6


@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_greedy_is_the_penalised_argmax(penalty: float) -> None:
    for seed in range(30):
        logits = logits_of(seed)
        context = tuple(logits.topk(3).indices.tolist())
        rule = RepetitionPenaltyLogitsProcessor(penalty)
        scores = rule(torch.tensor([context]), logits[None].clone())[0]
        sampled = draw(logits, Sampling(repetition_penalty=penalty), 4, context)
        assert sampled.token == int(scores.argmax())
        best, second = scores.topk(2).values.tolist()
        assert sampled.gap == pytest.approx(best - second)
        assert sampled.logprob == pytest.approx(float(torch.log_softmax(logits, 0)[sampled.token]), abs=1e-5)


def test_frequencies_follow_the_distribution() -> None:
    logits, sampling = logits_of(5, vocab=6, scale=1.0), Sampling(temperature=0.9, top_p=0.95, seed=11)
    wanted = theirs(logits, sampling, ())
    n = 4000
    counts = torch.zeros(6)
    for position in range(n):
        counts[draw(logits, sampling, position).token] += 1
    assert counts[wanted == 0].sum() == 0
    kept = wanted > 0
    chi_square = float(((counts - n * wanted) ** 2)[kept].div(n * wanted[kept]).sum())
    assert chi_square < 25.7  # 5 degrees of freedom, one in ten thousand; the draws are fixed by the seed


def test_uniform_is_fixed_for_ever_and_differs_by_seed_and_position() -> None:
    assert uniform(0, 0) == 0.5723976489085126
    assert uniform(-1, 7) == uniform(2**64 - 1, 7)
    drawn = [uniform(seed, position) for seed in range(60) for position in range(60)]
    assert len(set(drawn)) == 3600
    assert all(0 <= u < 1 for u in drawn)
    assert abs(sum(drawn) / 3600 - 0.5) < 0.02


def test_draws_are_the_same_in_another_process_whatever_torch_s_own_seed() -> None:
    program = (
        "import torch; torch.manual_seed({seed})\n"
        "from mycel.compute.engine import Sampling\n"
        "from mycel.compute.model.sample import draw\n"
        "row = torch.arange(40.0).sin() * 3\n"
        "print([draw(row, Sampling(temperature=1.1, top_p=0.9, seed=3), p).token for p in range(30)])"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", program.format(seed=seed)],
            env={"PYTHONHASHSEED": str(seed), "OMP_NUM_THREADS": str(1 + seed)},
            check=True, capture_output=True, text=True, timeout=100,
        ).stdout
        for seed in (0, 1)
    ]  # fmt: skip
    assert outputs[0] == outputs[1]
    assert outputs[0].count(",") == 29


@given(st.integers(0, 10**6), st.floats(0, 1), st.sampled_from([torch.float32, torch.bfloat16]))
@settings(max_examples=40, deadline=None)
def test_nucleus_is_the_smallest_set_that_reaches_p(seed: int, top_p: float, dtype: torch.dtype) -> None:
    """Also where ties abound (bfloat16) and where the nucleus is larger than the part sorted first."""
    scores = logits_of(seed, vocab=3000, scale=0.7).to(dtype).double()
    kept = sample._nucleus(scores, top_p)
    share = torch.softmax(scores, 0)
    order = scores.sort(descending=True, stable=True).indices
    assert kept.tolist() == order[: len(kept)].tolist()
    assert len(kept) == 1 or float(share[kept[:-1]].sum()) < top_p + 1e-9
    assert float(share[kept].sum()) >= top_p - 1e-9 or len(kept) == len(scores)


def test_top_logprobs_are_the_models_own() -> None:
    logits = logits_of(8)
    sampled = draw(logits, Sampling(temperature=2.0, top_k=3, logprobs=5, seed=1), 3)
    wanted = torch.log_softmax(logits.double(), 0)
    values, ids = wanted.topk(5)
    assert [token for token, _ in sampled.top] == ids.tolist()
    assert [value for _, value in sampled.top] == pytest.approx(values.tolist(), abs=1e-5)
    assert sampled.logprob == pytest.approx(float(wanted[sampled.token]), abs=1e-5)


def test_ties_go_to_the_lower_id() -> None:
    logits = torch.zeros(10)
    logits[[7, 2, 5]] = 4.0
    sampled = draw(logits, Sampling(logprobs=4), 0)
    assert (sampled.token, sampled.gap) == (2, 0.0)
    assert [token for token, _ in sampled.top] == [2, 5, 7, 0]


@pytest.mark.parametrize(
    ("sampling", "word"),
    [
        (Sampling(temperature=-0.1), "temperature"),
        (Sampling(temperature=math.nan), "temperature"),
        (Sampling(top_k=-1), "top_k"),
        (Sampling(top_p=1.5), "top_p"),
        (Sampling(repetition_penalty=0), "repetition_penalty"),
        (Sampling(logprobs=1000), "logprobs"),
    ],
)
def test_senseless_sampling_is_refused_by_field(sampling: Sampling, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        draw(logits_of(0), sampling, 0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_an_error(value: float) -> None:
    logits = logits_of(0)
    logits[9] = value
    with pytest.raises(ValueError, match="finite"):
        draw(logits, Sampling(temperature=1.0), 0)


def test_context_outside_the_vocabulary_is_an_error() -> None:
    with pytest.raises(ValueError, match="vocabulary"):
        draw(logits_of(0), Sampling(repetition_penalty=1.2), 0, (3, VOCAB))


def test_masked_tokens_are_never_drawn() -> None:
    logits = torch.full((20,), -math.inf)
    logits[13] = -5.0
    assert draw(logits, Sampling(temperature=5.0, seed=2), 0).token == 13
    assert draw(logits, Sampling(), 0).token == 13
