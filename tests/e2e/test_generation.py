"""Generation through daemons that are processes of their own, over TCP, and what happens when they die."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import trio
from transformers import AutoModelForCausalLM

from mycel.compute.infer.request import GenerateRequest
from mycel.compute.model.tiny import tiny_model
from mycel.node import daemon
from mycel.node.config import PRESETS, Config
from mycel.node.memory import VolatileMemory
from mycel.node.running import Node
from mycel.node.tcp import TcpNetwork
from mycel.node.trust import open_trust
from mycel.node.views import TicketAsk

PROMPT = tuple(b"import os")
FAMILIES = {"llama": {"max_position_embeddings": 512}, "gpt2": {"n_positions": 512}, "qwen3": {}}
CUTS = [(0, 1), (1, 3), (3, 4)]
READY_S = 200.0


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tiny models, one per family."""
    folder = tmp_path_factory.mktemp("families")
    for family, settings in FAMILIES.items():
        tiny_model(folder / family, family, seed=5, vocab_size=257, **settings)
    return folder


def expected(model: Path, count: int) -> list[int]:
    """What transformers' generate() says."""
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    prompt = torch.tensor([list(PROMPT)])
    with torch.inference_mode():
        out = whole.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, do_sample=False,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
    return [int(token) for token in out[0, len(PROMPT) :]]


def no_engine() -> Any:
    raise AssertionError("the owner was asked to load layers")


@asynccontextmanager
async def owner_node(home: Path) -> AsyncIterator[Node]:
    """A node of this process that founds the swarm and lends nothing."""
    network = TcpNetwork()
    trust = open_trust(home, now=network.wall(), entropy=network.entropy)
    papers = daemon.Papers(trust.identity, trust.credentials, trust.keep, VolatileMemory(), ())
    config = Config(**{**PRESETS["local"], "home": home, "assign": False})
    async with trio.open_nursery() as nursery:
        yield await nursery.start(partial(daemon.run, config, network, no_engine, papers))
        nursery.cancel_scope.cancel()


async def join(owner: Node, machines: dict[Any, tuple[str, ...]]) -> dict[str, Any]:
    """Start daemons that join the owner's swarm, all at once; the machines by peer id."""
    ticket = owner.issue_ticket(TicketAsk()).text
    by_peer = {}

    async def start(machine: Any, options: tuple[str, ...]) -> None:
        event = await trio.to_thread.run_sync(partial(machine.start, "join", ticket, *options))
        by_peer[event["peer"]] = machine

    async with trio.open_nursery() as nursery:
        for machine, options in machines.items():
            nursery.start_soon(start, machine, options)
    return by_peer


async def await_holders(owner: Node, count: int) -> None:
    """Wait until that many stages are ready."""
    with trio.fail_after(READY_S):
        async with owner.board.watch("stages/") as changes:
            while sum(h.state == "ready" for m in owner.generator.models() for h in m.holders) < count:
                await changes.__anext__()


async def generate(
    owner: Node, model: str, count: int, at: int = -1, act: Callable[[str], None] | None = None
) -> tuple[list[int], Any]:
    """Tokens and report; `act` gets the peer in the middle of the route when `at` tokens are there."""
    request = GenerateRequest(model=model, prompt=PROMPT, max_tokens=count, stop_tokens=())
    tokens: list[int] = []
    with trio.fail_after(60):
        async with owner.generator.generate(request) as generation:
            async for piece in generation:
                if act is not None and len(tokens) < at <= len(tokens) + len(piece.tokens):
                    act(generation.route[len(generation.route) // 2].peer)
                tokens += [token.id for token in piece.tokens]
    return tokens, generation.report


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_three_architectures_through_three_daemons(
    tmp_path: Path, models: Path, machine: Callable[[str], Any]
) -> None:
    async with owner_node(tmp_path) as owner:
        daemons = {}
        for number, (i, j) in enumerate(CUTS):
            serves = [part for family in FAMILIES for part in ("--serve", f"{models / family}@{i}:{j}")]
            daemons[machine(f"m{number}")] = ("--no-assign", *serves)
        await join(owner, daemons)
        await await_holders(owner, 3 * len(FAMILIES))
        for family in FAMILIES:
            tokens, report = await generate(owner, family, 32)
            assert tokens == expected(models / family, 32)
            assert [(stage.span.start, stage.span.end) for stage in report.route] == CUTS


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_daemons_die_in_mid_sentence(
    tmp_path: Path, models: Path, machine: Callable[[str], Any]
) -> None:
    """One by SIGKILL, one by SIGSTOP (silence); spares, who took the model by themselves, go on."""
    count = 300
    said = expected(models / "llama", count)
    async with owner_node(tmp_path) as owner:
        serve = {machine(f"m{i}"): ("--no-assign", "--serve", f"{models / 'llama'}@{i}:{j}") for i, j in CUTS}
        machines = await join(owner, serve)
        await await_holders(owner, 3)
        spares = {machine(f"spare{n}"): ("--assign", "--models", str(models)) for n in range(2)}
        machines |= await join(owner, spares)
        await await_holders(owner, 5)

        def signal_to(peer: str, number: signal.Signals) -> None:
            struck.append(peer)
            machines[peer].process.send_signal(number)

        for number, stall_s_max in ((signal.SIGKILL, 1.0), (signal.SIGSTOP, 3.0)):
            struck: list[str] = []
            tokens, report = await generate(owner, "llama", count, 97, partial(signal_to, number=number))
            assert tokens == said
            [failover] = report.failovers
            assert list(failover.lost) == struck
            assert failover.replay == "exact"
            assert failover.stall_s < stall_s_max
            machines[struck[0]].process.send_signal(signal.SIGKILL)
