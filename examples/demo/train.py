"""Trains the demo's model: a byte-level Llama of 0.8 million parameters, on Python's own standard library.

A token is a byte (id = byte; 256 ends a text), so there is nothing to download: text and tokenizer are
already on this machine. The training is a job that one daemon hands to the swarm: each daemon takes inner
steps in a process of its own, and talks with the others once in some of them (DiLoCo). Meanwhile one daemon
is killed and another one joins.

What was trained is kept in a cache folder named after everything that shaped it, so that a second run of
the demo starts at once and a changed setting trains anew.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from nodes import DemoFailed, Swarm
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from mycel.compute.model.quiet import quiet_transformers
from mycel.compute.tokenizer import byte_level_tokenizer_files

END = 256
LEFT_OUT = frozenset({"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "encodings"})
TRAIN_S = 900.0


@dataclass(frozen=True, slots=True)
class Training:
    """Everything that shapes the trained model; its hash names the cache folder."""

    layers: int = 4
    hidden: int = 128
    heads: int = 4
    intermediate: int = 352
    context: int = 128
    """Bytes that the model was trained to look back on."""
    batch: int = 8
    """Rows of each inner step, at each daemon."""
    steps: int = 240
    """Inner steps of each daemon."""
    every: int = 10
    """Inner steps between two borders."""
    matrix_rate: float = 0.02
    """Learning rate of the layers' matrices, by Muon: half the steps that AdamW needs for the same loss."""
    other_rate: float = 4e-3
    """Of the embedding and the norms, by AdamW."""
    seed: int = 20261121

    @property
    def borders(self) -> int:
        """Outer steps in all."""
        return self.steps // self.every

    def key(self) -> str:
        """A short name of these settings, of the Python whose sources are read and of torch."""
        told = {**asdict(self), "python": sys.version_info[:3], "torch": torch.__version__}
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True, slots=True)
class Point:
    """One border, as the job tells it."""

    step: int
    loss: float
    """Mean over the inner steps before it, in nats a byte."""
    peers: int


def corpus(path: Path) -> None:
    """Write the standard library's sources into one file, each ended by a zero byte."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(path for path in root.rglob("*.py") if not LEFT_OUT & set(path.relative_to(root).parts))
    parts = [content for content in (file.read_bytes() for file in files) if content]
    if not parts:
        raise SystemExit(f"no Python sources in {root}: this Python comes without its library's sources")
    path.write_bytes(b"\0".join(parts))


def fresh_model(training: Training, folder: Path) -> None:
    """A model with random weights, as a directory that transformers reads."""
    torch.manual_seed(training.seed)
    config = LlamaConfig(
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
    with quiet_transformers():
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    for name, content in byte_level_tokenizer_files().items():
        (folder / name).write_bytes(content)


def write_job(training: Training, fresh: Path, folder: Path, peers: int) -> Path:
    """job.toml and its data."""
    corpus(folder / "corpus.txt")
    path = folder / "job.toml"
    path.write_text(
        f"""kind = "train"
name = "demo"
app = "causal-lm"
data = "corpus.txt"
steps = {training.steps}
inner_steps = {training.every}
batch = {training.batch}
peers = {peers}
seed = {training.seed}
[settings]
model = {json.dumps(str(fresh))}
bytes = true
length = {training.context}
optimizer = "muon"
matrix_rate = {training.matrix_rate}
rate = {training.other_rate}
""",
        "utf-8",
    )
    return path


def follow(swarm: Swarm, job: str, on_point: Callable[[Point], None]) -> None:
    """Tell of every border until the job has ended well. Raises `DemoFailed`."""
    last, deadline = 0, time.monotonic() + TRAIN_S
    while time.monotonic() < deadline:
        view = next(one for one in swarm.daemons[0].control.get("jobs")["jobs"] if one["id"] == job)
        if view["step"] > last:
            last = view["step"]
            on_point(Point(last, view["metrics"]["loss"], int(view["metrics"]["peers"])))
        if view["phase"] == "done":
            return
        if view["phase"] not in ("running", "waiting"):
            raise DemoFailed(f"the training job is {view['phase']}: {view['text']}")
        swarm.check()
        time.sleep(0.2)
    raise DemoFailed(f"the training job did not end within {TRAIN_S:.0f} s")


def command(swarm: Swarm, *words: str) -> dict[str, Any]:
    """What `mycel WORDS --json` prints, at the first daemon. Raises `DemoFailed`."""
    home = str(swarm.daemons[0].home)
    done = subprocess.run(
        [sys.executable, "-m", "mycel", *words, "--home", home, "--json"], capture_output=True, text=True
    )
    if done.returncode:
        raise DemoFailed(f"mycel {' '.join(words)}: {done.stderr.strip()}")
    return dict(json.loads(done.stdout))


def finish_model(fresh: Path, results: Path, folder: Path) -> None:
    """A directory of the trained weights, to be served. Raises `DemoFailed` where they do not fit."""
    with quiet_transformers():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(fresh), dtype=torch.float32)
    trained = load_file(results / "model.safetensors")
    missing, unexpected = model.load_state_dict(trained, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise DemoFailed(f"the trained model lacks {missing} and has {unexpected}")
    model.tie_weights()
    with quiet_transformers():
        model.save_pretrained(folder)
    for name, content in byte_level_tokenizer_files().items():
        (folder / name).write_bytes(content)
