"""Federated rounds over a mesh: a coordinator and clients that train, die, lie, come late and come back."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import trio
import trio.testing

from mycel.compute.train.app import App, Task, Trained
from mycel.compute.train.client import FederatedClient, Owner, Terms
from mycel.compute.train.courier import Courier
from mycel.compute.train.federated import Coordinator, News, Plan
from mycel.compute.train.gather import merge
from mycel.compute.train.inline import InlineTrainer
from mycel.compute.train.layout import Entry, Layout
from mycel.compute.train.orders import OFFER, ROUND, Claim, Deputy, Down, Offered, Order, Up
from mycel.compute.train.rounds import RoundRules, UnderQuorum
from mycel.compute.train.rows import Flat, digest_of
from mycel.compute.train.strategy import Strategy, make_strategy
from mycel.compute.train.trade import Source, WorkAsk
from mycel.compute.train.trainer import Trainers
from mycel.compute.train.workshop import Workshop
from mycel.protocol.errors import Refused
from mycel.protocol.mesh import PeerId
from mycel.protocol.rpc import Rpc
from mycel.protocol.tensor import Tensor
from mycel.simnet.mesh import MeshOptions, MeshWorld, SimMesh, mesh_world

SIZE = 1000
LAYOUT = Layout((Entry("w", (10, 90)), Entry("b", (100,))))
JOB = "job"
BUILT_IN = Source("classifier")
SUBMITTER = PeerId("submitter")
DATA = {"numbers": Path("numbers")}


def app_towards(target: float, spoil: Callable[[np.ndarray], Any] = lambda row: row) -> App:
    """Trains any model to be `target` everywhere; `spoil` is what a liar does to it."""
    app = App()

    @app.train
    def train(task: Task) -> Trained:
        arrays = {name: spoil(np.full_like(array, target)) for name, array in task.arrays.items()}
        return task.done(arrays, examples=int(target) or 1, loss=float(task.number))

    @app.evaluate
    def evaluate(task: Task) -> Any:
        return task.judged(examples=1, mean=float(task.arrays["w"].mean()))

    return app


class Memory:
    """A `Keep` that every coordinator of a test shares: as blocks and documents would be."""

    def __init__(self) -> None:
        self.kept: dict[bytes, bytes] = {}
        self.state: bytes | None = None

    async def keep(self, content: bytes) -> bytes:
        name = str(len(self.kept)).encode()
        self.kept[name] = content
        return name

    async def fetch(self, name: bytes) -> bytes:
        return self.kept[name]

    async def checkpoint(self, state: bytes, names: Any) -> None:
        self.state = state

    async def resume(self) -> bytes | None:
        return self.state


@dataclass
class Doors:
    """A gate that lets named coordinators order; epochs only rise."""

    source: Source = BUILT_IN
    submitter: PeerId = SUBMITTER
    coordinators: list[PeerId] = field(default_factory=list)

    def terms(self, peer: PeerId, claim: Claim) -> Terms:
        if claim.job != JOB:
            raise Refused(f"no job {claim.job} here", reason="unknown-job")
        if peer not in self.coordinators:
            raise Refused(f"{peer} holds no lease of {claim.job}", reason="unproven")
        return Terms(JOB, self.submitter, self.source, "numbers")


class Clinic:
    """A world with clients, and coordinators made on demand."""

    def __init__(self, world: MeshWorld, nursery: trio.Nursery) -> None:
        self.world, self.nursery, self.memory = world, nursery, Memory()
        self.doors = Doors()
        self.nodes: list[SimMesh] = []
        self.trained: list[tuple[PeerId, int]] = []
        self.lines: list[str] = []
        self.figures: dict[int, dict[str, float]] = {}

    async def node(self, name: str) -> tuple[SimMesh, Rpc]:
        """A node connected with all others."""
        mesh = self.world.add(name)
        rpc = Rpc(mesh)
        await self.nursery.start(rpc.run)
        for other in self.nodes:
            await mesh.connect(other.listen_addrs)
        self.nodes.append(mesh)
        return mesh, rpc

    async def client(
        self, name: str, app: App, cost: float | Callable[[WorkAsk], float] = 1.0, owner: Owner | None = None
    ) -> SimMesh:
        """A client whose trainer runs `app` under the name that the job asks for."""
        mesh, rpc = await self.node(name)
        workshop = Workshop(clock=trio.current_time)
        workshop.add("classifier", app)

        def seconds(ask: WorkAsk) -> float:
            self.trained.append((mesh.peer_id, ask.number))
            return cost(ask) if callable(cost) else cost

        trainers = Trainers(lambda: InlineTrainer(workshop, seconds))
        service = FederatedClient(mesh, rpc, self.doors, trainers, owner or Owner(DATA))
        await self.nursery.start(service.attend, JOB, self.doors.source)
        return mesh

    async def coordinate(
        self, mesh: SimMesh, rpc: Rpc, strategy: Strategy, *, epoch: int = 1, rounds: int = 1, **more: Any
    ) -> Flat:
        """Run the job to its end at a node; the last model."""
        self.doors.coordinators.append(mesh.peer_id)
        fan_out = more.pop("fan_out", 0)
        claim = Claim(JOB, epoch)
        memory = more.pop("memory_bytes", 0)
        rules = RoundRules(**{"patience_s": 2.0, **more})
        plan = Plan(claim, rounds, rules, strategy, fan_out=fan_out, memory_bytes=memory)

        def report(number: int, figures: Mapping[str, float]) -> None:
            self.figures.setdefault(number, {}).update(figures)

        async def first() -> tuple[Layout, Flat]:
            return LAYOUT, np.zeros(SIZE, np.float32)

        news = News(report, self.lines.append)
        coordinator = Coordinator(mesh, rpc, plan, self.memory, news)
        return (await coordinator.run(first))[1]


@asynccontextmanager
async def clinic() -> AsyncIterator[Clinic]:
    async with mesh_world(MeshOptions(seed=5)) as world, trio.open_nursery() as nursery:
        yield Clinic(world, nursery)
        nursery.cancel_scope.cancel()


async def test_rounds_average_by_examples_and_judge(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with clinic() as clients:
        boss = await clients.node("boss")
        for target in (1, 2, 3):
            await clients.client(f"c{target}", app_towards(target))
        model = await clients.coordinate(*boss, make_strategy("fedavg"), rounds=3)
        assert model == pytest.approx(np.full(SIZE, 14 / 6), rel=1e-6)  # (1 + 4 + 9) / (1 + 2 + 3)
        assert clients.figures[3]["mean"] == pytest.approx(14 / 6, rel=1e-4)
        assert clients.figures[1]["mean"] == pytest.approx(14 / 6, rel=1e-4)
        assert clients.figures[2]["clients"] == 3
        assert len(clients.trained) == 3 * 3 + 3  # each round once, and once for judging the last


async def test_a_tree_sums_to_the_same_with_fewer_calls(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with clinic() as clients:
        boss = await clients.node("boss")
        for target in range(1, 9):
            await clients.client(f"c{target}", app_towards(target))
        opened: list[PeerId] = []
        serve, boss[1].stream = boss[1].stream, None  # type: ignore[assignment,method-assign]

        def stream(peer: PeerId, *args: Any, **kwargs: Any) -> Any:
            opened.append(peer)
            return serve(peer, *args, **kwargs)

        boss[1].stream = stream  # type: ignore[assignment,method-assign]
        model = await clients.coordinate(*boss, make_strategy("fedavg"), fan_out=3)
        targets = np.arange(1, 9)
        assert model == pytest.approx(np.full(SIZE, (targets**2).sum() / targets.sum()), rel=1e-6)
        assert clients.figures[1]["clients"] == 8
        assert len(opened) == 2 + 8  # two aggregators; judging asks all


async def test_an_aggregator_that_dies_costs_its_own_update(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with clinic() as clients:
        boss = await clients.node("boss")
        meshes = [await clients.client(f"c{target}", app_towards(2, lambda row: row)) for target in range(8)]
        heads: list[PeerId] = []
        serve = boss[1].stream

        def stream(peer: PeerId, *args: Any, **kwargs: Any) -> Any:
            heads.append(peer)
            if len(heads) == 2:
                clients.nursery.start_soon(kill)
            return serve(peer, *args, **kwargs)

        async def kill() -> None:
            await trio.sleep(0.7)
            clients.world.kill(next(mesh for mesh in meshes if mesh.peer_id == heads[0]))

        boss[1].stream = stream  # type: ignore[assignment,method-assign]
        model = await clients.coordinate(*boss, make_strategy("fedavg"), fan_out=3, quorum=7)
        assert model == pytest.approx(np.full(SIZE, 2.0))
        assert clients.figures[1]["clients"] == 7
        assert sorted(clients.trained) == sorted(set(clients.trained))  # nobody trained a round twice


async def test_who_dies_is_noticed_at_once(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with clinic() as clients:
        boss = await clients.node("boss")
        meshes = [await clients.client(f"c{target}", app_towards(target)) for target in (1, 2, 3)]

        async def kill() -> None:
            await trio.sleep(1.0)
            clients.world.kill(meshes[2])

        began = trio.current_time()
        clients.nursery.start_soon(kill)
        model = await clients.coordinate(*boss, make_strategy("fedavg"), quorum=2)
        assert model == pytest.approx(np.full(SIZE, 5 / 3), rel=1e-6)
        assert trio.current_time() - began < 4.0
        assert any("round 1" in line for line in clients.lines)


async def test_a_trainer_that_dies_is_named_and_others_go_on(autojump_clock: trio.testing.MockClock) -> None:
    async with clinic() as clients:
        boss = await clients.node("boss")
        await clients.client("c1", app_towards(1))
        await clients.client("c2", app_towards(2), cost=lambda ask: math.inf)
        model = await clients.coordinate(*boss, make_strategy("fedavg"), quorum=1, round_s_max=4.0)
        assert model == pytest.approx(np.full(SIZE, 1.0))


async def test_a_round_under_quorum_fails_aloud(autojump_clock: trio.testing.MockClock) -> None:
    async with clinic() as clients:
        boss = await clients.node("boss")
        for target in (1, 2):
            await clients.client(f"c{target}", app_towards(target, lambda row: row[:1]))
        with pytest.raises(UnderQuorum, match=r"0 of 2 updates.*came back as"):
            await clients.coordinate(*boss, make_strategy("fedavg"), quorum=2)


async def test_another_coordinator_goes_on_and_nobody_trains_twice(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with clinic() as clients:
        first = await clients.node("first")
        second = await clients.node("second")
        for target in (1, 2, 3):
            await clients.client(f"c{target}", app_towards(target), cost=2.0)

        with trio.move_on_after(3.0) as killed:  # in the middle of its second round
            await clients.coordinate(*first, make_strategy("fedadam"), rounds=3)
        assert killed.cancelled_caught
        clients.world.kill(first[0])
        began = trio.current_time()
        model = await clients.coordinate(*second, make_strategy("fedadam"), epoch=2, rounds=3)
        assert "going on after round 1" in clients.lines
        rounds = [number for _, number in clients.trained]
        assert [rounds.count(number) for number in (1, 2, 3)] == [3, 3, 3]
        assert trio.current_time() - began < 7.0

    async with clinic() as clients:
        boss = await clients.node("second")
        for target in (1, 2, 3):
            await clients.client(f"c{target}", app_towards(target))
        assert await clients.coordinate(*boss, make_strategy("fedadam"), rounds=3) == pytest.approx(model)


async def test_a_late_update_counts_in_the_next_round(autojump_clock: trio.testing.MockClock) -> None:
    async with clinic() as clients:
        boss = await clients.node("boss")
        await clients.client("c1", app_towards(1))
        await clients.client("c2", app_towards(2), cost=lambda ask: 1.0 if ask.evaluate else 5.0)
        await clients.coordinate(*boss, make_strategy("fedavg"), rounds=4, quorum=1, slack=1.5)
        assert sum(figures.get("late", 0) for figures in clients.figures.values()) >= 1


@pytest.mark.parametrize("rule", ["robust", "trimmed-mean", "geometric-median"])
async def test_robust_strategies_bear_a_liar(autojump_clock: trio.testing.MockClock, rule: str) -> None:
    async with clinic() as clients:
        boss = await clients.node("boss")
        for number in range(4):
            await clients.client(f"c{number}", app_towards(1 + number / 100))
        await clients.client("liar", app_towards(1, lambda row: row * -1e6))
        model = await clients.coordinate(*boss, make_strategy(rule))
        assert 0.9 < float(model.mean()) < 1.1


async def test_a_round_that_does_not_fit_is_refused_before_it_begins(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with clinic() as clients:
        boss = await clients.node("boss")
        for number in range(5):
            await clients.client(f"c{number}", app_towards(1))
        room = 12 * LAYOUT.nbytes  # of these models, so small that what is looked at is most of it
        with pytest.raises(Refused, match=r"5 clients take part; .* are free") as refused:
            await clients.coordinate(*boss, make_strategy("robust"), memory_bytes=room)
        assert refused.value.reason == "too-large"
        assert clients.trained == []
        await clients.coordinate(*boss, make_strategy("robust"), memory_bytes=room, wanted=1)


async def test_an_aggregator_passes_on_what_its_coordinator_signed_and_nothing_else(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with clinic() as clients:
        boss, _ = await clients.node("boss")
        head, rpc = await clients.node("head")
        _, stranger = await clients.node("stranger")
        client = (await clients.client("c1", app_towards(1))).peer_id
        clients.doors.coordinators.append(boss.peer_id)
        model = np.zeros(SIZE, np.float32)
        order = Order(Claim(JOB, 5), 1, LAYOUT, digest_of(model), {"rate": 0.1}, 0)
        deputy = Deputy(boss.peer_id, head.peer_id, boss.sign(order.words(head.peer_id)))
        order = msgspec.structs.replace(order, deputy=deputy)
        for by, changes in [
            (rpc, {"settings": {"rate": 9.0}}),
            (rpc, {"number": 2}),
            (rpc, {"claim": Claim(JOB, 6)}),
            (rpc, {"deputy": msgspec.structs.replace(deputy, coordinator=head.peer_id)}),
            (stranger, {}),
            (stranger, {"deputy": None}),
        ]:
            with pytest.raises(Refused) as refused:
                await Courier(by).carry(client, msgspec.structs.replace(order, **changes), model.data)
            assert refused.value.reason == "unproven"
        assert clients.trained == []
        assert (await Courier(rpc).carry(client, order, model.data.cast("B"))).report.clients == (client,)


async def test_bad_orders_get_refusals_by_name(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with clinic() as clients:
        boss, rpc = await clients.node("boss")
        client = (await clients.client("c1", app_towards(1))).peer_id
        clients.doors.coordinators.append(boss.peer_id)
        model = np.zeros(SIZE, np.float32)
        good = {"layout": LAYOUT, "model": digest_of(model), "settings": {}, "seed": 0, "number": 1}

        async def reason(data: bytes, **order: Any) -> str:
            claim = Claim(order.pop("job", JOB), order.pop("epoch", 5))
            with pytest.raises(Refused) as refused:
                async with rpc.stream(client, ROUND, deadline_s=10.0) as call:
                    await call.send(Down(order=Order(claim=claim, **{**good, **order})))
                    await call.send(Down(piece=Tensor("uint8", (len(data),), data)))
                    await call.end()
                    await call.receive()
            return refused.value.reason

        row = model.tobytes()
        assert await reason(row, job="other") == "unknown-job"
        assert await reason(row[:-4]) == "wrong-size"
        assert await reason(row + row) == "wrong-size"
        assert await reason(b"\1" * len(row)) == "corrupt"
        assert await reason(row, epoch=4) == "stale-epoch"
        assert await reason(row, layout=Layout((Entry("w", (1 << 20, 1 << 20)),))) == "too-large"
        assert await reason(row, layout=Layout((Entry("w", (-5,)),))) == "layout"
        assert await reason(row, settings={"a" * 1000: 1}) == "order"
        assert clients.trained == []
        clients.doors.coordinators.clear()
        assert await reason(row) == "unproven"


async def test_data_and_bundles_are_the_owners_to_give(autojump_clock: trio.testing.MockClock) -> None:
    async with clinic() as clients:
        boss, rpc = await clients.node("boss")
        clients.doors.coordinators.append(boss.peer_id)
        clients.doors.source = Source("own", {"app.py": b"raise SystemExit"})
        trusting = Owner(DATA, [PeerId("submitter")])
        for name, owner, reason in [
            ("a", Owner(DATA, [PeerId("another")]), "untrusted"),
            ("b", Owner({}, [PeerId("submitter")]), "no-data"),
        ]:
            client = await clients.client(name, app_towards(1), owner=owner)
            with pytest.raises(Refused) as refused:
                await rpc.call(client.peer_id, OFFER, Claim(JOB, 1), deadline_s=5.0)
            assert refused.value.reason == reason
        client = await clients.client("c", app_towards(1), owner=trusting)
        await rpc.call(client.peer_id, OFFER, Claim(JOB, 1), deadline_s=5.0)


@pytest.mark.parametrize(
    ("spoil", "lies", "why"),
    [
        ("short", {}, "ended"),
        ("long", {}, "bytes"),
        ("nan", {}, "not finite"),
        ("loud", {}, "not finite"),
        ("none", {"has_update": False}, "without the update"),
        ("", {"number": 7}, "not what was asked"),
        ("", {"epoch": 9}, "not what was asked"),
        ("", {"model": "f" * 64}, "not what was asked"),
        ("", {"clients": (PeerId("c1"), PeerId("c2"))}, "clients it was not given"),
        ("", {"examples": -5}, "impossible"),
        ("", {"metrics": {"loss": math.nan}}, "impossible"),
        ("", {"metrics": {f"m{n}": 0.0 for n in range(999)}}, "too many figures"),
    ],
    ids=str,
)
async def test_a_lying_client_is_named_and_the_others_count(
    autojump_clock: trio.testing.MockClock, spoil: str, lies: dict[str, Any], why: str
) -> None:
    async with clinic() as clients:
        boss = await clients.node("boss")
        for target in (1, 2):
            await clients.client(f"c{target}", app_towards(target))
        liar, rpc = await clients.node("liar")

        async def lie(call: Any, items: AsyncIterator[Down]) -> AsyncIterator[Up]:
            order = (await anext(items)).order
            assert order is not None
            honest = msgspec.structs.replace(
                merge(order, [], []), clients=(liar.peer_id,), has_update=order.train, examples=5
            )
            yield Up(report=msgspec.structs.replace(honest, **lies))
            number = {"nan": np.nan, "loud": 1e30}.get(spoil, 1e9)
            row = np.full(SIZE, number, np.float32).tobytes()
            row = {"short": row[:-4], "long": row + row}.get(spoil, row)
            if spoil != "none":
                yield Up(piece=Tensor("uint8", (len(row),), row))
            async for _ in items:
                pass

        async def offer(call: Any, claim: Claim) -> Any:
            return Offered()

        rpc.serve(OFFER, offer)
        rpc.serve(ROUND, lie)
        model = await clients.coordinate(*boss, make_strategy("fedavg"), quorum=2)
        assert model == pytest.approx(np.full(SIZE, 5 / 3), rel=1e-6)
        assert any(liar.peer_id in line and why in line for line in clients.lines), clients.lines
