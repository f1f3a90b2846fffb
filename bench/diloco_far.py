"""One worker of bench/diloco.py, a process of its own: the byte LM, a node in a swarm, and inner steps.

Reads commands as lines of JSON, answers each with one; ends when its input ends.
"""

from __future__ import annotations

import json
import math
import sys
import sysconfig
import time
from collections.abc import Iterator, Mapping
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
HELD_OUT = 20_000
"""Bytes of other files that losses are taken on."""
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


class Trainer:
    """The model, its inner optimizer, and one worker's batches."""

    def __init__(self, ask: Mapping[str, Any], text: torch.Tensor, seeds: list[int]) -> None:
        torch.manual_seed(0)
        self.model = ByteModel()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=ask["rate"], betas=(0.9, 0.95), weight_decay=0.01
        )
        self._ask = ask
        self._text = text
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def step(self, number: int) -> None:
        """Inner step `number`, from 0: a batch of every seed."""
        share = min(1.0, (number + 1) / 100) * (
            0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * min(1.0, number / self._ask["steps"])))
        )
        self.optimizer.param_groups[0]["lr"] = self._ask["rate"] * share
        pairs = [draw(self._text, self._ask["batch"], generator) for generator in self._generators]
        contexts, following = torch.cat([one for one, _ in pairs]), torch.cat([one for _, one in pairs])
        self.optimizer.zero_grad()
        functional.cross_entropy(self.model(contexts), following).backward()
        self.optimizer.step()

    def judge(self, held_out: torch.Tensor) -> float:
        """Nats a byte on what was never trained on."""
        contexts, following = draw(held_out, HELD_OUT, torch.Generator().manual_seed(9))
        with torch.no_grad():
            return float(functional.cross_entropy(self.model(contexts), following))


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
        if ask["do"] == "parallel":  # what all workers would do who averaged every step's gradients
            trainer = Trainer(ask, text, list(range(ask["workers"])))
            for step in range(ask["steps"]):
                trainer.step(step)
            tell(loss=trainer.judge(held_out), weights=FlatModule(trainer.model).count)
        elif ask["do"] == "alone":
            trainer = Trainer(ask, text, [number])
            begun = time.monotonic()
            for step in range(ask["steps"]):
                trainer.step(step)
            tell(s=time.monotonic() - begun, loss=trainer.judge(held_out))
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
            trainer.step(step)
            diloco.step()
            step += 1
        took = time.monotonic() - begun
        diloco.finish()
        digest = int(np.frombuffer(diloco.weights.tobytes(), np.uint32).sum(dtype=np.uint64))
        return {"s": took, "loss": trainer.judge(held_out), "steps": step, "digest": digest}


if __name__ == "__main__":
    main(int(sys.argv[1]))
