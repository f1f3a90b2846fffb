"""What a coordinator holds while updates come in: measured by tracemalloc, with clients that hold nothing."""

from __future__ import annotations

import tracemalloc
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np
import pytest
import trio
import trio.testing

from mycel.compute.train.courier import pieces_of
from mycel.compute.train.federated import Coordinator, News, Plan
from mycel.compute.train.layout import Entry, Layout
from mycel.compute.train.orders import OFFER, ROUND, Claim, Down, Offered, Report, Up
from mycel.compute.train.robust import COLUMNS
from mycel.compute.train.rounds import RoundRules
from mycel.compute.train.rows import Flat
from mycel.compute.train.strategy import RULES, Sum, make_strategy
from mycel.protocol.limits import MIB
from mycel.protocol.rpc import Rpc
from mycel.simnet.mesh import MeshOptions, mesh_world

SIZE = MIB // 4
LAYOUT = Layout((Entry("w", (SIZE,)),))
ROW = memoryview(np.full(SIZE, 0.5, np.float32)).cast("B")
"""Everybody's update, in memory once."""
ADDED = 8 * COLUMNS / LAYOUT.nbytes
"""What an addition takes while it is done: nothing to speak of where a model is of some size."""


class Nowhere:
    """A `Keep` that keeps nothing."""

    async def keep(self, content: bytes) -> bytes:
        return b"gone"

    async def fetch(self, name: bytes) -> bytes:
        raise AssertionError("nothing is fetched")

    async def checkpoint(self, state: bytes, names: Any) -> None: ...

    async def resume(self) -> bytes | None:
        return None


async def most_held(
    monkeypatch: pytest.MonkeyPatch, rule: str, clients: int, **settings: float
) -> tuple[float, float]:
    """The most that a coordinator held in two rounds, and what its strategy declares, both in models."""
    async with mesh_world(MeshOptions(seed=3)) as world, trio.open_nursery() as nursery:
        boss = world.add("boss")
        rpc = Rpc(boss)
        await nursery.start(rpc.run)
        for number in range(clients):
            mesh = world.add(f"c{number}")
            client = Rpc(mesh)
            await nursery.start(client.run)
            await mesh.connect(boss.listen_addrs)

            async def offer(call: Any, claim: Claim) -> Offered:
                return Offered()

            async def train(
                call: Any, items: AsyncIterator[Down], me: Any = mesh.peer_id
            ) -> AsyncIterator[Up]:
                order = (await anext(items)).order
                assert order is not None
                async for _ in items:
                    pass
                claim = order.claim
                yield Up(
                    report=Report(
                        claim.job, claim.epoch, order.number, order.model, (me,), True, 1, {}, 0, {}, 0.0
                    )
                )
                for piece in pieces_of(ROW, MIB // 8):
                    yield Up(piece=piece)

            client.serve(OFFER, offer)
            client.serve(ROUND, train)
        strategy = make_strategy(rule, settings)
        plan = Plan(Claim("job", 1), 2, RoundRules(quorum=clients), strategy, evaluate_every=0)
        held: list[int] = []

        async def first() -> tuple[Layout, Flat]:
            return LAYOUT, np.zeros(SIZE, np.float32)

        def watched(act: Callable[..., Any]) -> Callable[..., Any]:
            """Note what was held before, and what it took besides."""

            def do(*arguments: Any) -> Any:
                before = held_now()
                tracemalloc.reset_peak()
                begun = tracemalloc.get_traced_memory()[0]
                result = act(*arguments)
                held.append(before + tracemalloc.get_traced_memory()[1] - begun)
                return result

            return do

        monkeypatch.setattr(Sum, "add", watched(Sum.add))
        monkeypatch.setattr(strategy, "combine", watched(strategy.combine))
        tracemalloc.start()
        try:
            _, model = await Coordinator(boss, rpc, plan, Nowhere(), News()).run(first)
        finally:
            tracemalloc.stop()
        assert model == pytest.approx(np.full(SIZE, 1.0))
        nursery.cancel_scope.cancel()
        return max(held) / LAYOUT.nbytes, 1 + strategy.memory_bytes(clients, LAYOUT.nbytes) / LAYOUT.nbytes


def held_now() -> int:
    """Bytes that this room's code allocated and still has."""
    snapshot = tracemalloc.take_snapshot().filter_traces(
        [tracemalloc.Filter(True, "*/mycel/compute/train/*")]
    )
    return sum(one.size for one in snapshot.statistics("filename"))


async def test_a_linear_strategy_holds_a_handful_of_models_however_many_clients_there_are(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, declared = await most_held(monkeypatch, "fedavg", 18)
    assert declared == 1 + 3 + 4, "the model, a sum and what is added to it, and four that come in"
    assert held < declared + ADDED + 0.5


@pytest.mark.parametrize("rule", sorted(RULES))
async def test_a_robust_rule_takes_what_it_declares(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch, rule: str
) -> None:
    held, declared = await most_held(monkeypatch, rule, 8, momentum=0.0)
    assert 8 < held < declared
