"""A training script of one's own: real nodes in threads of this process, and a daemon that let them in."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import mycel

EVERY, PHASES = 5, 4
OPTIONS = mycel.BorderOptions(every=EVERY, codec="int8")


operations: dict[int, Any] = {}


def a_script(ticket: str, number: int, out: dict[int, Any], at_last: threading.Barrier) -> None:
    """What a user would write, with data of its own."""
    joined = mycel.join(ticket, preset="local", label=f"script {number}")
    with joined as swarm, swarm.group("e2e", least=2) as peers:
        count = np.full(2, number + 1, np.int64)
        _, gathered = peers.all_gather(count, tag="gather")
        _, part = peers.reduce_scatter(np.arange(4.0), op="max", tag="scatter")
        told = np.full(3, number, np.float16)
        peers.broadcast(told, peers.members[0], tag="broadcast")
        first = peers.members.index(swarm.peer_id) == 0
        operations[number] = (first, gathered.tolist(), part.tolist(), told.tolist())
        assert peers.barrier().contributors == 2
        generator = torch.Generator().manual_seed(number)
        model = torch.nn.Linear(2000, 3)
        torch.nn.init.normal_(model.weight, generator=generator)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
        diloco = mycel.DiLoCo(model, peers, OPTIONS)
        begun = float(np.linalg.norm(diloco.weights))
        steps = []
        while diloco.outer_steps < PHASES:
            x = torch.randn(8, 2000, generator=generator)
            model(x).pow(2).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            steps.append(diloco.step())
        done = [step for step in steps if step is not None]
        diloco.finish()
        out[number] = (diloco.weights.copy(), done, model.weight.detach().numpy().copy(), begun)
        at_last.wait(60)


def test_scripts_train_one_model_over_real_sockets(machine: Callable[[str], Any]) -> None:
    machine("founder").start("up")
    ticket = machine("founder").json("ticket")["text"]
    out: dict[int, Any] = {}
    at_last = threading.Barrier(2)
    threads = [threading.Thread(target=a_script, args=(ticket, number, out, at_last)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert sorted(out) == [0, 1]
    (weights, done, held, begun), (other_weights, other_done, other_held, _) = out[0], out[1]
    assert np.array_equal(weights, other_weights)
    assert np.array_equal(held, other_held)
    assert [step.contributors for step in done] == [2] * PHASES
    assert [step.number for step in done] == [step.number for step in other_done] == [1, 2, 3, 4]
    one, other = sorted(operations, key=lambda number: not operations[number][0])
    gathered = [one + 1] * 2 + [other + 1] * 2
    assert operations[one] == (True, gathered, [0.0, 1.0], [one] * 3)
    assert operations[other] == (False, gathered, [2.0, 3.0], [one] * 3)
    assert np.linalg.norm(weights) < 0.98 * begun  # all push towards 0
