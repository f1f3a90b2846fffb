"""A model through 1, 2 and 4 daemons against the unsplit model, and 16 sessions at once through 3.

A random Llama of about 100 million parameters. Daemons are processes of their own with a worker each, over
loopback TCP; the owner of the sessions is a node in this process that holds no layers. The unsplit model is
transformers' `generate()` in another process, run twice: with OpenMP's threads as torch sets them, and with
threads that sleep when idle; the faster counts. All may use all cores, one at a time, in turns. Anything else
that runs on the machine spoils the figures.

`vs_unsplit_N`: tokens per second through N daemons over those of `generate()`. Two things are in it: stages
read their weights with all threads, which `generate()` does not (so one daemon may well be above 1.0), and
they work one after the other, with a way between them. `four_vs_one` is the second alone: what cutting costs.
`sessions_16_vs_1`: tokens per second of 16 sessions together over those of one, both through the same 3
daemons.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path

import measure
import trio

from mycel.compute.infer.request import GenerateRequest
from mycel.node import daemon
from mycel.node.config import PRESETS, Config
from mycel.node.memory import VolatileMemory
from mycel.node.running import Node
from mycel.node.tcp import TcpNetwork
from mycel.node.trust import open_trust
from mycel.node.views import TicketAsk

LAYERS = 12
TOKENS = 64
PROMPT = tuple(range(100, 132))
SESSIONS = 16
READY_S = 120.0
STOP_S = 10.0


async def main() -> None:
    """Measure and report."""
    with tempfile.TemporaryDirectory(prefix="mycel-bench-") as folder:
        model = Path(folder) / "llama-100m"
        await trio.run_process([sys.executable, __file__, "--make", str(model)])
        alone = await against_unsplit(Path(folder), model)
        together = await many_sessions(Path(folder), model)
    base = max(("unsplit", "unsplit, passive"), key=alone.median)
    figures: dict[str, float] = {f"vs_unsplit_{n}": alone.ratio(f"{n} daemons", base) for n in (1, 2, 4)}
    figures["four_vs_one"] = alone.ratio("4 daemons", "1 daemons")
    figures["sessions_16_vs_1"] = together.ratio("16 sessions", "1 session")
    figures["unsplit_tokens_per_s"] = alone.median(base)
    figures["sessions_16_tokens_per_s"] = together.median("16 sessions")
    measure.report("split", figures)


async def against_unsplit(folder: Path, model: Path) -> measure.Comparison:
    """Tokens per second, one session: unsplit, and through 1, 2 and 4 daemons."""
    async with (
        unsplit(model) as generate,
        unsplit(model, OMP_WAIT_POLICY="passive", GOMP_SPINCOUNT="0") as passive,
        swarm(folder, model, 1) as one,
        swarm(folder, model, 2) as two,
        swarm(folder, model, 4) as four,
    ):
        expected = await generate_tokens(generate)
        for node in (one, two, four):
            assert await through(node, model) == expected, "the split model says something else"
        ways: dict[str, measure.Measure] = {
            "unsplit": partial(speed_of, partial(generate_tokens, generate), 1),
            "unsplit, passive": partial(speed_of, partial(generate_tokens, passive), 1),
            "1 daemons": partial(speed_of, partial(through, one, model), 1),
            "2 daemons": partial(speed_of, partial(through, two, model), 1),
            "4 daemons": partial(speed_of, partial(through, four, model), 1),
        }
        found = await measure.compare(ways)
    print(found.table("tokens/s"))
    return found


async def many_sessions(folder: Path, model: Path) -> measure.Comparison:
    """Tokens per second through 3 daemons: one session, and 16 at once."""
    async with swarm(folder, model, 3) as node:
        found = await measure.compare(
            {
                "1 session": partial(speed_of, partial(through, node, model), 1),
                "16 sessions": partial(speed_of, partial(all_through, node, model), SESSIONS),
            }
        )
    print(found.table("tokens/s"))
    return found


async def speed_of(work: Callable[[], Awaitable[object]], sessions: int) -> float:
    """Tokens per second of `work`, prefill included."""
    began = time.perf_counter()
    await work()
    return sessions * TOKENS / (time.perf_counter() - began)


async def through(node: Node, model: Path, prompt: tuple[int, ...] = PROMPT) -> list[int]:
    """One session's tokens."""
    request = GenerateRequest(model=model.name, prompt=prompt, max_tokens=TOKENS, stop_tokens=())
    async with node.generator.generate(request) as generation:
        return [token.id async for piece in generation for token in piece.tokens]


async def all_through(node: Node, model: Path) -> None:
    """Sessions at once, each with a prompt of its own."""

    async def one(number: int) -> None:
        tokens = await through(node, model, (*PROMPT[:-1], 1000 + number))
        assert len(tokens) == TOKENS

    async with trio.open_nursery() as nursery:
        for number in range(SESSIONS):
            nursery.start_soon(one, number)


# --- daemons


@asynccontextmanager
async def swarm(folder: Path, model: Path, stages: int) -> AsyncIterator[Node]:
    """The owner's node of a swarm whose `stages` daemons share the model."""
    async with trio.open_nursery() as nursery:
        home = Path(tempfile.mkdtemp(prefix="swarm-", dir=folder))
        node = await nursery.start(run_owner, home)
        ticket = node.issue_ticket(TicketAsk()).text
        cuts = [LAYERS * n // stages for n in range(stages + 1)]
        processes = [start_daemon(home / f"{i}:{j}", ticket, f"{model}@{i}:{j}") for i, j in pairwise(cuts)]
        try:
            with trio.fail_after(READY_S):
                await await_complete(node)
            yield node
        finally:
            for process in processes:
                process.terminate()
            for process in processes:
                process.wait(STOP_S)
            nursery.cancel_scope.cancel()


async def await_complete(node: Node) -> None:
    """Wait until all layers have a holder."""
    async with node.board.watch("stages/") as changes:
        while not any(status.complete for status in node.generator.models()):
            await changes.__anext__()


async def run_owner(home: Path, *, task_status: trio.TaskStatus[Node]) -> None:
    """A node of this process, founder of a swarm."""
    network = TcpNetwork()
    trust = open_trust(home, now=network.wall(), entropy=network.entropy)
    papers = daemon.Papers(trust.identity, trust.credentials, trust.keep, VolatileMemory(), ())
    config = Config(**{**PRESETS["local"], "home": home, "assign": False})
    await daemon.run(config, network, no_engine, papers, task_status=task_status)


def no_engine() -> None:
    """The owner lends nothing."""
    raise AssertionError("the owner was asked to load layers")


def start_daemon(home: Path, ticket: str, serve: str) -> subprocess.Popen[bytes]:
    """A daemon that lends layers."""
    command = [sys.executable, "-m", "mycel", "join", ticket, "--home", str(home), "--preset", "local"]
    command += ["--serve", serve, "--no-assign", "--dtype", "float32", "--device", "cpu"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MYCEL_")}
    with open(home.parent / f"{home.name}.log", "wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


# --- the unsplit model


@asynccontextmanager
async def unsplit(model: Path, **environment: str) -> AsyncIterator[trio.Process]:
    """A process that runs `generate()` for each line it gets."""
    async with trio.open_nursery() as nursery:
        command = [sys.executable, __file__, "--unsplit", str(model)]
        run = partial(
            trio.run_process,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            check=False,
            env={**os.environ, **environment},
        )
        process: trio.Process = await nursery.start(run, command)
        yield process
        nursery.cancel_scope.cancel()


async def generate_tokens(process: trio.Process) -> list[int]:
    """One run of `generate()`."""
    assert process.stdin is not None
    assert process.stdout is not None
    await process.stdin.send_all(b"\n")
    line = bytearray()
    while not line.endswith(b"\n"):
        line += await process.stdout.receive_some()
    return [int(token) for token in line.split()]


def serve_unsplit(model: str) -> None:
    """In the child: greedy tokens on each line of input."""
    import torch
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    prompt = torch.tensor([list(PROMPT)])
    for _ in sys.stdin:
        with torch.inference_mode():
            out = whole.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=TOKENS,
                do_sample=False, eos_token_id=None, pad_token_id=0,
            )  # fmt: skip
        print(*out[0, len(PROMPT) :].tolist(), flush=True)


def make_model(path: str) -> None:
    """In a child: 12 layers of 768, 32 000 tokens, tied: 109 million parameters."""
    from mycel.compute.model.tiny import tiny_llama

    tiny_llama(
        Path(path), num_hidden_layers=LAYERS, hidden_size=768, intermediate_size=2048, num_attention_heads=12,
        num_key_value_heads=12, vocab_size=32000, max_position_embeddings=1024, tie_word_embeddings=True,
    )  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--make")
    parser.add_argument("--unsplit")
    options: Sequence[str | None] = vars(parser.parse_args()).values()  # type: ignore[assignment]
    to_make, to_run = options
    if to_make is not None:
        make_model(to_make)
    elif to_run is not None:
        serve_unsplit(to_run)
    else:
        trio.run(main)
