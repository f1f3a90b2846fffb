"""One worker of bench/diloco.py, a process of its own: the byte LM, a node in a swarm, and inner steps.

Reads commands as lines of JSON, answers each with one; ends when its input ends.
"""

from __future__ import annotations

import json
import math
import sys
import sysconfig
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

import mycel
from mycel.compute.train.flat import FlatModule
from mycel.compute.train.peers import Array, Peers, Pending, Reduced

CONTEXT = 12
"""Bytes that the model looks back on."""
HIDDEN = 64
HELD_OUT = 200_000
"""Bytes of other files that losses are taken on: the same ones for every model, so that ratios are quiet."""
AT_ONCE = 20_000
LEFT_OUT = {"site-packages", "test", "tests", "idlelib", "lib2to3", "encodings"}


class ByteModel(torch.nn.Module):
    """A byte from the ones before it: embeddings, one hidden layer, 257 logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(257, 24)
        self.hidden = torch.nn.Linear(24 * CONTEXT, HIDDEN)
        self.out = torch.nn.Linear(HIDDEN, 257)

    def forward(self, context: torch.Tensor) -> torch.Tensor:
        """[rows, 257] of logits for [rows, CONTEXT] of bytes."""
        rows = self.embedding(context).flatten(1)
        logits: torch.Tensor = self.out(functional.gelu(self.hidden(rows)))
        return logits


def corpus() -> tuple[torch.Tensor, torch.Tensor]:
    """(Bytes to train on, bytes to judge by) of Python's own standard library, by files."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(path for path in root.rglob("*.py") if not LEFT_OUT & set(path.relative_to(root).parts))
    text = torch.frombuffer(bytearray(b"\0".join(path.read_bytes() for path in files)), dtype=torch.uint8)
    cut = int(len(text) * 0.97)
    return text[:cut].long(), text[cut:].long()


def draw(text: torch.Tensor, rows: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """(Contexts [rows, CONTEXT], the bytes after them [rows]) from random places."""
    starts = torch.randint(len(text) - CONTEXT - 1, (rows,), generator=generator)
    windows = text[starts[:, None] + torch.arange(CONTEXT + 1)]
    return windows[:, :CONTEXT], windows[:, CONTEXT]


def share(number: int, steps: int) -> float:
    """What part of the learning rate step `number`, from 0, takes: a hundred steps up, then a cosine down."""
    cosine = 0.5 + 0.5 * math.cos(math.pi * min(1.0, number / steps))
    return min(1.0, (number + 1) / 100) * (0.02 + 0.98 * cosine)


class Trainer:
    """The model, its inner optimizer with its schedule, and the batches of `workers`, by their numbers.

    Adam remembers squares for a thousand steps, as it does by default: with betas[1] = 0.95 workers of small
    batches fall behind one of large ones, even if they are averaged at every step.
    """

    def __init__(self, ask: Mapping[str, Any], text: torch.Tensor, workers: Iterable[int]) -> None:
        torch.manual_seed(ask["seed"])
        self.model = ByteModel()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=ask["rate"], betas=(0.9, ask["memory"]), weight_decay=0.01
        )
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda n: share(n, ask["steps"]))
        self._rows = int(ask["batch"])
        self._text = text
        self._generators = [torch.Generator().manual_seed(1000 * ask["seed"] + one) for one in workers]

    def step(self) -> None:
        """An inner step: a batch of every worker."""
        pairs = [draw(self._text, self._rows, generator) for generator in self._generators]
        contexts, following = torch.cat([one for one, _ in pairs]), torch.cat([one for _, one in pairs])
        self.optimizer.zero_grad()
        functional.cross_entropy(self.model(contexts), following).backward()
        self.optimizer.step()
        self._schedule.step()

    def judge(self, held_out: torch.Tensor) -> float:
        """Nats a byte on what was never trained on."""
        generator, total = torch.Generator().manual_seed(9), 0.0
        with torch.no_grad():
            for _ in range(HELD_OUT // AT_ONCE):
                contexts, following = draw(held_out, AT_ONCE, generator)
                total += float(functional.cross_entropy(self.model(contexts), following)) * AT_ONCE
        return total / HELD_OUT


class Delayed(Peers):
    """Peers whose sums come a second later."""

    def __init__(self, peers: Peers, delay_s: float) -> None:
        self._peers = peers
        self._delay_s = delay_s

    @property
    def count(self) -> int:
        return self._peers.count

    def all_reduce(
        self, array: Array, *, op: str = "avg", tag: str = "", codec: str | None = None
    ) -> Reduced:
        return self.begin_all_reduce(array, op=op, tag=tag, codec=codec).wait()

    def begin_all_reduce(
        self, array: Array, *, op: str = "avg", tag: str = "", codec: str | None = None
    ) -> Pending:
        return DelayedSum(self._peers.begin_all_reduce(array, op=op, tag=tag, codec=codec), self._delay_s)

    def is_awaited(self, tag: str) -> bool:
        return self._peers.is_awaited(tag)

    def sync(self, state: Mapping[str, Array]) -> bool:
        return self._peers.sync(state)


class DelayedSum:
    """See `Delayed`."""

    def __init__(self, pending: Pending, delay_s: float) -> None:
        self._pending = pending
        self._ready_at = time.monotonic() + delay_s

    def wait(self) -> Reduced:
        """Not before its time."""
        reduced = self._pending.wait()
        time.sleep(max(0.0, self._ready_at - time.monotonic()))
        return reduced


def commands() -> Iterator[dict[str, Any]]:
    """What is asked, one after the other."""
    for line in sys.stdin:
        yield json.loads(line)


def tell(**answer: Any) -> None:
    """One line."""
    print(json.dumps(answer), flush=True)


def main(number: int) -> None:
    """Answer commands."""
    torch.set_num_threads(1)
    text, held_out = corpus()
    tell(ready=True)
    for ask in commands():
        if ask["do"] in ("parallel", "alone"):
            # in parallel: what all workers would do who averaged every step's gradients
            trainer = Trainer(ask, text, range(ask["workers"]) if ask["do"] == "parallel" else [number])
            begun = time.monotonic()
            for _ in range(ask["steps"]):
                trainer.step()
            took = time.monotonic() - begun
            tell(s=took, loss=trainer.judge(held_out), weights=FlatModule(trainer.model).count)
        else:
            tell(**together(ask, number, text, held_out))


def together(
    ask: Mapping[str, Any], number: int, text: torch.Tensor, held_out: torch.Tensor
) -> dict[str, Any]:
    """A run of DiLoCo with the others."""
    trainer = Trainer(ask, text, [number])
    options = mycel.BorderOptions(
        every=ask["every"],
        outer=mycel.OuterOptions(ask["outer_rate"], ask["momentum"]),
        codec="int8+feedback",
        overlap=ask["overlap"],
        early=False,
    )
    joined = mycel.join(ask["ticket"], preset="local", label=f"worker {number}")
    with joined as swarm, swarm.group(ask["group"], least=ask["workers"]) as group:
        peers: Peers = Delayed(group, ask["delay_s"]) if ask["delay_s"] else group
        diloco = mycel.DiLoCo(trainer.model, peers, options)
        begun, step = time.monotonic(), 0
        while diloco.outer_steps < ask["steps"] // ask["every"] - ask["overlap"]:
            trainer.step()
            diloco.step()
            step += 1
        took = time.monotonic() - begun
        diloco.finish()
        digest = int(np.frombuffer(diloco.weights.tobytes(), np.uint32).sum(dtype=np.uint64))
        return {"s": took, "loss": trainer.judge(held_out), "steps": step, "digest": digest}


if __name__ == "__main__":
    main(int(sys.argv[1]))
