"""Trains the demo's model: a byte-level Llama of 0.8 million parameters, on Python's own standard library.

A token is a byte (id = byte; 256 ends a file), so there is nothing to download: text and tokenizer are
already on this machine. A minute on two cores brings the loss to about 1.5 nats a byte, which is enough for
lines that look like Python.

What was trained is kept in a cache folder named after everything that shaped it, so that a second run of
the demo starts at once and a changed setting trains anew.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mycel.compute.model.quiet import quiet_transformers
from mycel.compute.tokenizer import byte_level_tokenizer_files

END = 256
LEFT_OUT = frozenset({"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "encodings"})


@dataclass(frozen=True, slots=True)
class Training:
    """Everything that shapes the trained model; its hash names the cache folder."""

    layers: int = 4
    hidden: int = 128
    heads: int = 4
    intermediate: int = 352
    context: int = 128
    """Bytes that the model was trained to look back on."""
    batch: int = 12
    steps: int = 420
    matrix_rate: float = 0.02
    """Learning rate of the layers' matrices, by Muon: half the steps that AdamW needs for the same loss."""
    other_rate: float = 4e-3
    """Of the embedding and the norms, by AdamW."""
    warmup_steps: int = 20
    seed: int = 20261121

    def key(self) -> str:
        """A short name of these settings, of the Python whose sources are read and of torch."""
        told = {**asdict(self), "python": sys.version_info[:3], "torch": torch.__version__}
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]


Progress = Callable[[int, int, float], None]
"""(steps done, steps in all, loss averaged over the last steps)"""


def trained_model(training: Training, cache: Path, progress: Progress) -> tuple[Path, float | None]:
    """The folder of the trained model and the seconds it took, None where it stood in the cache."""
    folder = cache / f"demo-model-{training.key()}"
    if (folder / "done").exists():
        return folder, None
    shutil.rmtree(folder, ignore_errors=True)
    began = time.monotonic()
    model, loss = train(training, corpus(), progress)
    with quiet_transformers():
        model.save_pretrained(folder)
    for name, content in byte_level_tokenizer_files().items():
        (folder / name).write_bytes(content)
    (folder / "done").write_text(f"loss {loss:.3f}\n", "utf-8")
    return folder, time.monotonic() - began


def corpus() -> torch.Tensor:
    """The standard library's sources as one row of byte ids, files ended by `END`."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(path for path in root.rglob("*.py") if not LEFT_OUT & set(path.relative_to(root).parts))
    end = torch.tensor([END], dtype=torch.int16)
    parts = []
    for path in files:
        content = bytearray(path.read_bytes())
        if content:
            parts += [torch.frombuffer(content, dtype=torch.uint8).to(torch.int16), end]
    if not parts:
        raise SystemExit(f"no Python sources in {root}: this Python comes without its library's sources")
    return torch.cat(parts)


def train(training: Training, text: torch.Tensor, progress: Progress) -> tuple[LlamaForCausalLM, float]:
    """A model of `training`'s shape fitted to `text` (int16 ids), and the mean loss of its last 50 steps."""
    torch.manual_seed(training.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=END + 1,
            hidden_size=training.hidden,
            intermediate_size=training.intermediate,
            num_hidden_layers=training.layers,
            num_attention_heads=training.heads,
            num_key_value_heads=training.heads,
            max_position_embeddings=training.context,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=END,
        )
    )
    optimizers = _optimizers(training, model)
    losses: list[float] = []
    for step in range(training.steps):
        for optimizer, rate in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * schedule(training, step)
            optimizer.zero_grad(set_to_none=True)
        starts = torch.randint(len(text) - training.context, (training.batch,)).tolist()
        rows = torch.stack([text[start : start + training.context] for start in starts]).long()
        loss = model(input_ids=rows, labels=rows, use_cache=False).loss
        loss.backward()
        for optimizer, _ in optimizers:
            optimizer.step()
        losses.append(loss.item())
        recent = losses[-50:]
        progress(step + 1, training.steps, sum(recent) / len(recent))
    return model, sum(losses[-50:]) / len(losses[-50:])


def _optimizers(
    training: Training, model: LlamaForCausalLM
) -> tuple[tuple[torch.optim.Optimizer, float], tuple[torch.optim.Optimizer, float]]:
    """Muon (Jordan et al. 2024) for the layers' matrices, AdamW for the rest, each with its top rate."""
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (matrices if parameter.dim() == 2 and "embed" not in name else others).append(parameter)
    muon = torch.optim.Muon(matrices, momentum=0.95, weight_decay=0.01)
    return (muon, training.matrix_rate), (torch.optim.AdamW(others, betas=(0.9, 0.95)), training.other_rate)


def schedule(training: Training, step: int) -> float:
    """The share of the learning rate at `step`: a linear warm-up, then a cosine down to 2 %."""
    warm = min(1.0, (step + 1) / training.warmup_steps)
    return warm * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * step / training.steps)))
