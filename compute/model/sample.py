"""Drawing the next token from a row of logits.

A draw depends on (logits, sampling, position, context) and nothing else: no generator lives anywhere. The
one uniform number it needs is a hash of (seed, position), so a stage that replaces a dead one draws what
the dead one would have drawn, on whatever machine. The number picks from the inverse of the cumulative
distribution over the kept tokens in ascending id, in float64, so that a difference in the last bit of one
float32 probability moves a border between two tokens by 1e-8 and not the whole draw.

The order of the rules is that of transformers' generation: repetition penalty (CTRL, arXiv 1909.05858,
section 4.1), temperature, top-k (arXiv 1805.04833; ties with the k-th are all kept), top-p (nucleus,
arXiv 1904.09751, section 3.1; a token is kept while those ahead of it hold less than p). Log-probabilities
are those of the model before any rule; the gap is that of the penalised logits, the ones decided on.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from hashlib import blake2b

import torch

from mycel.compute.engine import Sampled, Sampling

NUCLEUS_FIRST = 1024
"""How many of the best tokens are sorted at first, before eight times as many: nearly every nucleus fits."""
LOGPROBS_MAX = 64
"""Most likely tokens reported with each draw, at most: what a reply frame should hold."""


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits: blake2b (RFC 7693) of seed and position, each modulo 2**64."""
    counter = (seed % 2**64).to_bytes(8, "little") + (position % 2**64).to_bytes(8, "little")
    digest = blake2b(counter, digest_size=8, person=b"mycel draw").digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def check(sampling: Sampling) -> None:
    """Raise `ValueError` naming the field of `sampling` that no draw could follow, and what it may be."""
    if not (math.isfinite(sampling.temperature) and sampling.temperature >= 0):
        raise ValueError(f"temperature {sampling.temperature}: give 0 (greedy) or a positive number")
    if sampling.top_k < 0:
        raise ValueError(f"top_k {sampling.top_k}: give 0 (off) or a count of tokens")
    if not 0 <= sampling.top_p <= 1:
        raise ValueError(f"top_p {sampling.top_p}: give a share between 0 and 1")
    if not (math.isfinite(sampling.repetition_penalty) and sampling.repetition_penalty > 0):
        raise ValueError(
            f"repetition_penalty {sampling.repetition_penalty}: give a positive number, 1 is off"
        )
    if not 0 <= sampling.logprobs <= LOGPROBS_MAX:
        raise ValueError(f"logprobs {sampling.logprobs}: give a count between 0 and {LOGPROBS_MAX}")


def draw(logits: torch.Tensor, sampling: Sampling, position: int, context: Collection[int] = ()) -> Sampled:
    """Draw the token at `position` from `logits` ([vocab], any float dtype, any device).

    `context` holds the token ids so far, prompt included; only the repetition penalty reads it. Raises
    `ValueError` for sampling that makes no sense, context outside the vocabulary, and logits that are not
    numbers (a broken model or a poisoned input).
    """
    check(sampling)
    raw = logits.detach().float()
    norm = float(torch.logsumexp(raw, 0))
    if not math.isfinite(norm):
        raise ValueError("the model gave logits that are not finite numbers; no token can be drawn")
    scores = _penalise(raw, sampling.repetition_penalty, context)
    values, ids = scores.topk(min(2, len(scores)))
    best, *second = values.tolist()
    gap = best - second[0] if second else math.inf
    if sampling.temperature > 0:
        scaled = scores.to("cpu", torch.float64) / sampling.temperature
        token = _pick(scaled, sampling, uniform(sampling.seed, position))
    elif gap > 0:
        token = int(ids[0])
    else:  # a tie: topk promises no order
        token = int((scores == best).nonzero()[0])
    top: tuple[tuple[int, float], ...] = ()
    if sampling.logprobs:
        likely = _best(raw, sampling.logprobs)
        logprobs = (raw[likely] - norm).tolist()
        top = tuple(zip(likely.tolist(), logprobs, strict=True))
    return Sampled(token, float(raw[token]) - norm, top, gap)


def _penalise(scores: torch.Tensor, penalty: float, context: Collection[int]) -> torch.Tensor:
    """Divide positive scores of tokens seen by `penalty`, multiply negative ones; each token once."""
    if penalty == 1 or not context:
        return scores
    ids = sorted(set(context))
    if ids[0] < 0 or ids[-1] >= len(scores):
        raise ValueError(f"the context names tokens outside the vocabulary of {len(scores)}")
    seen = torch.tensor(ids, device=scores.device)
    old = scores[seen]
    return scores.index_put((seen,), torch.where(old < 0, old * penalty, old / penalty))


def _best(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Ids of the `count` highest scores, best first, ties by lower id."""
    threshold = scores.topk(min(count, len(scores))).values[-1]
    ids = (scores >= threshold).nonzero().squeeze(1)
    order = scores[ids].sort(descending=True, stable=True).indices
    return ids[order][:count]


def _pick(scores: torch.Tensor, sampling: Sampling, u: float) -> int:
    """The token at `u` of the cumulative distribution over what top-k and top-p keep of `scores`."""
    ids = torch.arange(len(scores))
    if 0 < sampling.top_k < len(scores):
        ids = (scores >= scores.topk(sampling.top_k).values[-1]).nonzero().squeeze(1)
    if sampling.top_p < 1:
        ids = ids[_nucleus(scores[ids], sampling.top_p)].sort().values
    kept = scores[ids]
    cumulative = torch.exp(kept - kept.max()).cumsum(0)
    place = torch.searchsorted(cumulative, u * cumulative[-1], right=True)
    if place == len(ids):  # u * total rounded up to the total
        place = torch.searchsorted(cumulative, cumulative[-1])
    return int(ids[place])


def _nucleus(scores: torch.Tensor, top_p: float) -> torch.Tensor:
    """Places of the smallest set of best scores whose share reaches `top_p`; at least one."""
    norm = torch.logsumexp(scores, 0)
    count = NUCLEUS_FIRST
    while True:
        best = _best(scores, count)
        share = torch.exp(scores[best] - norm)
        ahead = share.cumsum(0) - share
        kept = int((ahead < top_p).sum())
        if kept < len(best) or len(best) == len(scores):
            return best[: max(kept, 1)]
        count *= 8
