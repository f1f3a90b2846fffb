"""A causal language model on text files, by torch and transformers.

Data: a text file, or a folder of .txt files, cut into pieces of `length` tokens; each twentieth piece is kept
for judging.

Settings: `model`, a folder with config.json that every client has at the same place or a hub id (its weights
are the start), or "" for a fresh small Llama over bytes (`width` 64, `layers` 2, `heads` 4); `steps` 20,
`batch` 4, `length` 128, `rate` 1e-3 (AdamW, a fresh one each round), `proximal_mu` 0. With a model of `model`
its tokenizer cuts text; a fresh one reads bytes, and so does any with `bytes` true.

In jobs of kind train, whose inner steps come some at a time (`keeps_optimizer`), the optimizer lives as long
as the process, and its rate follows a warm-up of 20 steps and a cosine over the `done` of `total` steps.
`optimizer` "muon" takes Muon (Jordan et al. 2024) for the layers' matrices, with `matrix_rate` 0.02.
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
WARMUP_STEPS = 20


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
    optimizers = optimizers_of(task, model)
    steps, batch = int(task.setting("steps", 20)), int(task.setting("batch", 4))
    total = 0.0
    model.train()
    torch.manual_seed(task.seed)
    for step in range(steps):
        set_rates(task, optimizers, step)
        rows = pieces[torch.from_numpy(rng.integers(len(pieces), size=batch))].long()
        loss = model(input_ids=rows, labels=rows).loss
        total += loss.item()
        if mu:
            apart = zip(model.parameters(), began, strict=True)
            loss = loss + mu / 2 * sum(((now - then) ** 2).sum() for now, then in apart)
        model.zero_grad()
        loss.backward()
        for optimizer, _ in optimizers:
            optimizer.step()
    return task.done(weights_of(model), examples=steps * batch, loss=total / max(1, steps))


def optimizers_of(task: Task, model: Any) -> list[tuple[torch.optim.Optimizer, float]]:
    """Optimizers with their top rates: fresh ones, or those of the steps before."""
    key = f"causal-lm:optimizers:{task.settings.get('model', '')}"
    if not task.settings.get("keeps_optimizer") or not task.setting("done", 0):
        task.cache.pop(key, None)
    if key not in task.cache:
        rate, matrix_rate = task.setting("rate", 1e-3), task.setting("matrix_rate", 0.02)
        matrices: list[torch.nn.Parameter] = []
        others: list[torch.nn.Parameter] = []
        for name, parameter in model.named_parameters():
            is_matrix = parameter.dim() == 2 and "embed" not in name and "head" not in name
            (matrices if is_matrix else others).append(parameter)
        if task.settings.get("optimizer", "adamw") != "muon":
            task.cache[key] = [(torch.optim.AdamW(model.parameters(), lr=rate), rate)]
        else:
            muon = torch.optim.Muon(matrices, momentum=0.95, weight_decay=0.01)
            adam = torch.optim.AdamW(others, betas=(0.9, 0.95))
            task.cache[key] = [(muon, matrix_rate), (adam, rate)]
    kept: list[tuple[torch.optim.Optimizer, float]] = task.cache[key]
    return kept


def set_rates(task: Task, optimizers: list[tuple[torch.optim.Optimizer, float]], step: int) -> None:
    """The learning rates of this request's inner step `step`."""
    share = 1.0
    if task.settings.get("keeps_optimizer"):
        done, total = task.setting("done", 0) + step, max(1.0, task.setting("total", 1))
        warm = min(1.0, (done + 1) / WARMUP_STEPS)
        share = warm * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * min(1.0, done / total))))
    for optimizer, rate in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate * share


@app.evaluate
def evaluate(task: Task) -> Judged:
    """Loss and perplexity per token on the pieces kept for judging."""
    model, pieces = filled(task), pieces_of(task)[1]
    model.eval()
    batch = int(task.setting("batch", 4))
    with torch.no_grad():
        rows_of = (part.long() for part in pieces.split(batch))
        losses = [model(input_ids=rows, labels=rows).loss.item() * len(rows) for rows in rows_of]
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
        pieces = tokens[: len(tokens) // length * length].reshape(-1, length)
        if len(pieces) < 2:
            what = f"{len(tokens)} tokens, fewer than two pieces of {length}"
            raise UsageProblem(f"{task.data.name} has {what}")
        kept = torch.arange(len(pieces)) % min(JUDGE_EVERY, len(pieces)) == 0
        task.cache[key] = (pieces[~kept], pieces[kept])
    pair: tuple[torch.Tensor, torch.Tensor] = task.cache[key]
    return pair


def tokens_of(task: Task) -> torch.Tensor:
    """All of this node's text as tokens: uint8 where they are bytes, else int32."""
    files = sorted(task.data.rglob("*.txt")) if task.data.is_dir() else [task.data]
    try:
        texts = [Path(file).read_bytes() for file in files]
    except OSError as error:
        raise UsageProblem(f"{task.data.name} cannot be read: {error.strerror}") from error
    name = str(task.settings.get("model", ""))
    if not name or task.settings.get("bytes"):
        return torch.frombuffer(bytearray(b"\n".join(texts) or b"\n"), dtype=torch.uint8)
    tokenizer = AutoTokenizer.from_pretrained(name)
    tokens = tokenizer(b"\n".join(texts).decode("utf-8", "replace"))["input_ids"]
    return torch.tensor(tokens, dtype=torch.int32)
