"""One generation, three ways: on the unsplit model here, through the swarm, and while a stage dies."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import torch
from transformers import LlamaForCausalLM

from mycel.compute.engine import Sampling
from mycel.compute.model.quiet import quiet_transformers
from mycel.compute.model.sample import draw
from mycel.compute.tokenizer import read_tokenizer


@dataclass(frozen=True, slots=True)
class Ask:
    """What is generated: the same every time."""

    prompt: str = "def read_config(path, "
    tokens: int = 104
    temperature: float = 0.4
    seed: int = 0


@dataclass(slots=True)
class Run:
    """What came of it."""

    text: str = ""
    tokens: list[str] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    """Of each token, as the model gave them: two runs that computed the same have the same to the bit."""
    times: list[float] = field(default_factory=list)
    """Monotonic seconds at which each event arrived."""
    finish: str | None = None
    session: str = ""

    @property
    def longest_gap_s(self) -> float:
        """The longest wait between two events, as the client saw it."""
        return max(
            (after - before for before, after in zip(self.times, self.times[1:], strict=False)), default=0.0
        )

    @property
    def tokens_per_s(self) -> float:
        """Tokens after the first, per second from the first to the last."""
        return (len(self.tokens) - 1) / max(1e-9, self.times[-1] - self.times[0])


def run_unsplit(folder: Path, ask: Ask) -> Run:
    """The whole model in this process: transformers' own forward, one row at a time."""
    tokenizer = read_tokenizer({path.name: path.read_bytes() for path in folder.glob("*.json")})
    with quiet_transformers():
        model = LlamaForCausalLM.from_pretrained(folder)
    sampling = Sampling(temperature=ask.temperature, seed=ask.seed)
    ids = tokenizer.encode(ask.prompt)
    run, start, cache, step = Run(), len(ids), None, ids
    with torch.inference_mode():
        while len(ids) < start + ask.tokens:
            out = model(torch.tensor([step]), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            drawn = draw(out.logits[0, -1], sampling, len(ids))
            run.times.append(time.monotonic())
            if drawn.token in tokenizer.eos_tokens:
                run.finish = "stop"
                break
            ids.append(drawn.token)
            step = [drawn.token]
            run.tokens.append(tokenizer.token_text(drawn.token))
            run.logprobs.append(drawn.logprob)
    run.text = tokenizer.decode(ids[start:])
    run.finish = run.finish or "length"
    return run


def run_swarm(api: str, model: str, ask: Ask, on_text: Callable[[str, int], None]) -> Run:
    """The same through the OpenAI API of a node; `on_text` gets each piece and the count of tokens so far.

    Raises `RuntimeError` for an error that the API answers with.
    """
    content = {
        "model": model,
        "prompt": ask.prompt,
        "max_tokens": ask.tokens,
        "temperature": ask.temperature,
        "seed": ask.seed,
        "logprobs": 1,
        "stream": True,
    }
    run = Run()
    with httpx.stream("POST", f"{api}/completions", json=content, timeout=60) as answer:
        if answer.status_code != 200:
            raise RuntimeError(answer.read().decode())
        for line in answer.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise RuntimeError(event["error"]["message"])
            run.times.append(time.monotonic())
            run.session = event["sessions"][0]
            choice = event["choices"][0]
            if choice["logprobs"]:
                run.tokens += choice["logprobs"]["tokens"]
                run.logprobs += choice["logprobs"]["token_logprobs"]
            run.finish = choice["finish_reason"] or run.finish
            run.text += choice["text"]
            on_text(choice["text"], len(run.tokens))
    return run
