"""A causal language model on text files, by torch and transformers.

Data: a text file, or a folder of .txt files, cut into pieces of `length` tokens; each twentieth piece is kept
for judging.

Settings: `model`, a folder with config.json that every client has at the same place or a hub id (its weights
are the start), or "" for a fresh small Llama over bytes (`width` 64, `layers` 2, `heads` 4); `steps` 20,
`batch` 4, `length` 128, `rate` 1e-3 (AdamW, a fresh one each round), `proximal_mu` 0. With a model of `model`
its tokenizer cuts text; a fresh one reads bytes.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from mycel.compute.model.quiet import quiet_transformers
from mycel.compute.train.app import App, Judged, Task, Trained
from mycel.protocol.errors import UsageProblem

app = App()

BYTES = 256
JUDGE_EVERY = 20


@app.start
def start(task: Task) -> dict[str, Any]:
    """The model that the settings name, or a fresh one of the task's seed."""
    return weights_of(model_of(task, fresh=True))


@app.train
def train(task: Task) -> Trained:
    """Some steps of AdamW over random pieces of this node's text."""
    model, pieces = filled(task), pieces_of(task)[0]
    began = [parameter.detach().clone() for parameter in model.parameters()]
    mu, rng = task.setting("proximal_mu", 0.0), task.rng
    optimizer = torch.optim.AdamW(model.parameters(), lr=task.setting("rate", 1e-3))
    steps, batch = int(task.setting("steps", 20)), int(task.setting("batch", 4))
    total = 0.0
    model.train()
    torch.manual_seed(task.seed)
    for _ in range(steps):
        rows = pieces[torch.from_numpy(rng.integers(len(pieces), size=batch))]
        loss = model(input_ids=rows, labels=rows).loss
        total += loss.item()
        if mu:
            apart = zip(model.parameters(), began, strict=True)
            loss = loss + mu / 2 * sum(((now - then) ** 2).sum() for now, then in apart)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return task.done(weights_of(model), examples=steps * batch, loss=total / max(1, steps))


@app.evaluate
def evaluate(task: Task) -> Judged:
    """Loss and perplexity per token on the pieces kept for judging."""
    model, pieces = filled(task), pieces_of(task)[1]
    model.eval()
    batch = int(task.setting("batch", 4))
    with torch.no_grad():
        losses = [model(input_ids=rows, labels=rows).loss.item() * len(rows) for rows in pieces.split(batch)]
    loss = sum(losses) / max(1, len(pieces))
    return task.judged(examples=len(pieces), loss=loss, perplexity=math.exp(min(loss, 80.0)))


def weights_of(model: Any) -> dict[str, Any]:
    """Its parameters by name; weights that are tied come once."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def filled(task: Task) -> Any:
    """The model, built once per process, with the weights that came."""
    model = model_of(task)
    own = dict(model.named_parameters())
    if list(own) != list(task.arrays):
        raise UsageProblem("the model that came has other parameters than the one that the settings name")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(torch.from_numpy(task.arrays[name]))
    return model


def model_of(task: Task, *, fresh: bool = False) -> Any:
    """The torch module that the settings name."""
    name = str(task.settings.get("model", ""))
    key = f"causal-lm:{name}"
    if fresh or key not in task.cache:
        with quiet_transformers():
            if name:
                task.cache[key] = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
            else:
                width, length = int(task.setting("width", 64)), int(task.setting("length", 128))
                config = AutoConfig.for_model(
                    "llama",
                    vocab_size=BYTES,
                    hidden_size=width,
                    intermediate_size=2 * width,
                    num_hidden_layers=int(task.setting("layers", 2)),
                    num_attention_heads=int(task.setting("heads", 4)),
                    num_key_value_heads=int(task.setting("heads", 4)),
                    max_position_embeddings=max(512, length),
                    tie_word_embeddings=True,
                )
                torch.manual_seed(task.seed)
                task.cache[key] = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return task.cache[key]


def pieces_of(task: Task) -> tuple[torch.Tensor, torch.Tensor]:
    """(Pieces to train on, pieces to judge by), each [pieces, length] of tokens, read once."""
    key = f"pieces:{task.data}:{task.setting('length', 128)}"
    if key not in task.cache:
        tokens, length = tokens_of(task), int(task.setting("length", 128))
        pieces = torch.tensor(tokens[: len(tokens) // length * length]).reshape(-1, length)
        if len(pieces) < 2:
            what = f"{len(tokens)} tokens, fewer than two pieces of {length}"
            raise UsageProblem(f"{task.data.name} has {what}")
        kept = torch.arange(len(pieces)) % min(JUDGE_EVERY, len(pieces)) == 0
        task.cache[key] = (pieces[~kept], pieces[kept])
    pair: tuple[torch.Tensor, torch.Tensor] = task.cache[key]
    return pair


def tokens_of(task: Task) -> list[int]:
    """All of this node's text as tokens."""
    files = sorted(task.data.rglob("*.txt")) if task.data.is_dir() else [task.data]
    try:
        texts = [Path(file).read_bytes() for file in files]
    except OSError as error:
        raise UsageProblem(f"{task.data.name} cannot be read: {error.strerror}") from error
    name = str(task.settings.get("model", ""))
    if not name:
        return list(b"\n".join(texts))
    tokenizer = AutoTokenizer.from_pretrained(name)
    tokens: list[int] = tokenizer(b"\n".join(texts).decode("utf-8", "replace"))["input_ids"]
    return tokens
