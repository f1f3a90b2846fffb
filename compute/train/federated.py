"""The coordinator of a federated job: orders rounds, takes in updates, keeps what must outlive it.

What to do when is decided by `Rounds`, what becomes of the updates by the strategy; here they are joined to
streams. Every client that is asked has a task, which outlives its round: that is how late updates come in. A
linear strategy's updates are added up one by one and let go, those of a robust one kept until the round
closes.

After each round the new model, the strategy's rows and a small `Standing` are kept (`Keep`), and only then
does the next begin. A coordinator that dies in the middle of a round loses that round's sums and nothing
else: the next one begins the same round with the same model, and clients that were done answer from what they
kept.

A model is judged by clients with the model that they get anyway, at the beginning of the next round, so
judging costs no transfer; the last model is sent once more for it.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import msgspec
import trio

from mycel.compute.train.courier import Courier, Delivery
from mycel.compute.train.gather import mean_of, median_of
from mycel.compute.train.layout import Layout
from mycel.compute.train.orders import Claim, Deputy, Order
from mycel.compute.train.pool import Pool
from mycel.compute.train.rounds import (
    Act,
    Ask,
    Close,
    Fail,
    RoundRules,
    Rounds,
    Short,
    Standing,
    UnderQuorum,
)
from mycel.compute.train.rows import Flat, digest_of, from_safetensors, row_of, to_safetensors
from mycel.compute.train.strategy import UPLOADS, Strategy, Sum, Weighed, combine_all
from mycel.compute.train.tree import Branch, plan_tree
from mycel.protocol.errors import MycelError, Refused
from mycel.protocol.limits import MIB
from mycel.protocol.limits_train import DEFAULT_FEDERATED_LIMITS
from mycel.protocol.mesh import Mesh, PeerId
from mycel.protocol.rpc import Rpc

SETTLE_S = 1.5
"""How long the first round waits for members to say whether they take part."""
SMALL_BYTES = 4 * MIB
"""Rows up to this are looked through at once; larger ones in a thread, so that streams go on."""


class Keep(Protocol):
    """Where a coordinator keeps what must outlive it, so that another can go on."""

    async def keep(self, content: bytes) -> bytes:
        """Keep bytes; a short name for them."""

    async def fetch(self, name: bytes) -> bytes:
        """What was kept under a name. Raises `MycelError` where it is gone."""

    async def checkpoint(self, state: bytes, names: Sequence[bytes]) -> None:
        """From here on `resume` gives this. `names` are all that `state` refers to; others may go."""

    async def resume(self) -> bytes | None:
        """The last checkpoint, None where there is none."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A federated job, as its coordinator needs it."""

    claim: Claim
    rounds: int
    """How many there are to be."""
    rules: RoundRules
    strategy: Strategy
    seed: int = 0
    evaluate_every: int = 1
    """Judge the model after every so many rounds, and at the end; 0: never."""
    fan_out: int = 0
    """Clients below each aggregator of a tree; linear strategies only. 0: no tree."""
    memory_bytes: int = 0
    """What a round may take here; 0: no bound."""


@dataclass(frozen=True, slots=True)
class News:
    """Who hears how it goes."""

    report: Callable[[int, Mapping[str, float]], None] = lambda number, figures: None
    log: Callable[[str], None] = lambda line: None


@dataclass(slots=True)
class _Intake:
    """What came in for the round that is open."""

    total: Sum | None
    rows: list[tuple[PeerId, Flat, float]] = field(default_factory=list)
    metrics: list[tuple[Mapping[str, float], int]] = field(default_factory=list)
    judged: list[tuple[Mapping[str, float], int]] = field(default_factory=list)


class Coordinator:
    """One job under one lease. `run` brings it to its end."""

    def __init__(
        self,
        mesh: Mesh,
        rpc: Rpc,
        plan: Plan,
        keep: Keep,
        news: News,
    ) -> None:
        self._mesh = mesh
        self._limits = limits = DEFAULT_FEDERATED_LIMITS
        self._plan = plan
        self._keep = keep
        self._news = news
        self._pool = Pool(mesh, rpc, plan.claim, news.log, limits)
        uploads = trio.CapacityLimiter(UPLOADS) if plan.strategy.is_linear else None
        self._courier = Courier(rpc, limits, uploads)
        self._wake = trio.Event()
        self._opened = trio.Event()
        self._ended: Close | Fail | None = None
        self._average = mean_of if plan.strategy.is_linear else median_of

    async def run(self, first: Callable[[], Awaitable[tuple[Layout, Flat]]]) -> tuple[Layout, Flat]:
        """Go on from the last checkpoint, or begin with the model that `first` makes, until all rounds are
        done; the last model.

        Raises `UnderQuorum` for a round that failed, and what `Keep` raises.
        """
        await self._restore(first)
        self._rounds = Rounds(
            self._plan.claim.job, self._plan.claim.epoch, self._plan.rules, self._standing.number
        )
        failure: MycelError | None = None
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            await nursery.start(self._pool.run)
            nursery.start_soon(self._follow_pool)
            try:
                with trio.move_on_after(SETTLE_S):
                    await self._pool.wait_settled()
                self._check_memory(len(self._pool.clients))
                while self._standing.number < self._plan.rounds:
                    await self._round()
                if self._plan.evaluate_every:
                    await self._judge_last()
            except MycelError as error:
                failure = error
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure
        return self._layout, self._model

    def _check_memory(self, clients: int) -> None:
        """Say what a round takes here. Raises `Refused` where there is not so much."""
        rules, most = self._plan.rules, self._plan.memory_bytes
        asked = min(clients, math.ceil(rules.wanted * (1 + rules.oversample))) if rules.wanted else clients
        needed = self._plan.strategy.memory_bytes(asked, self._layout.nbytes)
        takes = f"{clients} clients take part; a round takes up to {needed / MIB:.3g} MiB here"
        if most and needed > most:
            raise Refused(
                f"{takes}, and {most / MIB:.3g} are free: ask fewer clients, or take a linear strategy",
                reason="too-large",
            )
        self._news.log(takes)

    async def _restore(self, first: Callable[[], Awaitable[tuple[Layout, Flat]]]) -> None:
        kept = await self._keep.resume()
        if kept is None:
            self._standing = Standing()
            self._layout, self._model = await first()
            self._layout.check(self._limits.model_bytes)
            await self._save(Standing())
        else:
            self._standing = msgspec.msgpack.decode(kept, type=Standing)
            flat, plain, extra = from_safetensors(await self._keep.fetch(self._standing.model))
            self._layout = msgspec.json.decode(extra["layout"], type=Layout) if "layout" in extra else plain
            self._model = row_of(flat.data, self._layout)
            if self._standing.state:
                rows, named, _ = from_safetensors(await self._keep.fetch(self._standing.state))
                size = self._layout.size
                names = [entry.name for entry in named.entries]
                self._plan.strategy.state = {
                    name: rows[n * size : (n + 1) * size] for n, name in enumerate(names)
                }
            self._news.log(f"going on after round {self._standing.number}")
        self._digest = digest_of(self._model)

    async def _save(self, standing: Standing) -> None:
        """Keep the model as it is now, and where the job stands with it."""
        layout = msgspec.json.encode(self._layout).decode()
        model = await self._keep.keep(to_safetensors(self._model, self._layout, {"layout": layout}))
        state = b""
        if self._plan.strategy.state:
            state = await self._keep.keep(state_file(self._plan.strategy.state, self._layout))
        self._standing = msgspec.structs.replace(standing, model=model, state=state)
        names = [model, state] if state else [model]
        await self._keep.checkpoint(msgspec.msgpack.encode(self._standing), names)

    async def _round(self) -> None:
        """One round, from its first order to its checkpoint. Raises `UnderQuorum`."""
        began = trio.current_time()
        linear = self._plan.strategy.is_linear
        self._intake = _Intake(Sum(self._layout.size) if linear else None)
        self._rounds.on_pool(self._pool.clients, began)
        self._ended = None
        self._act(self._rounds.begin(began))
        self._opened.set()  # who came between the rounds is late for this one
        while (ended := self._ended) is None:
            with trio.move_on_at(self._rounds.next_at):
                await self._wake.wait()
            self._wake = trio.Event()
            if trio.current_time() >= self._rounds.next_at:
                self._act(self._rounds.on_time(trio.current_time()))
        self._opened = trio.Event()
        if isinstance(ended, Fail):
            raise UnderQuorum(ended.text)
        await self._finish(ended, trio.current_time() - began)

    async def _finish(self, closed: Close, seconds: float) -> None:
        intake, strategy = self._intake, self._plan.strategy
        judged = self._average(intake.judged)
        if judged:  # it was the model before this round that they judged
            self._news.report(closed.number - 1, judged)
        if intake.total is not None:
            update = intake.total.mean()
        else:
            ordered = sorted(intake.rows, key=lambda one: one[0])
            combine = partial(
                combine_all, strategy, [row for _, row, _ in ordered], [weight for _, _, weight in ordered]
            )
            is_small = self._layout.nbytes * len(ordered) < SMALL_BYTES
            update = combine() if is_small else await trio.to_thread.run_sync(combine)
        self._model = strategy.step(self._model, update)
        self._digest = digest_of(self._model)
        figures = self._average(intake.metrics) | {
            "clients": float(len(closed.counted)),
            "late": float(len(closed.late)),
            "round_s": seconds,
        }
        history = (*self._standing.history, figures | judged)[-self._limits.history :]
        await self._save(msgspec.structs.replace(self._standing, number=closed.number, history=history))
        self._news.report(closed.number, figures)

    def _act(self, acts: Sequence[Act]) -> None:
        asked = [act.client for act in acts if isinstance(act, Ask)]
        fan_out = self._plan.fan_out if self._plan.strategy.is_linear else 0
        for branch in plan_tree(asked, fan_out):
            self._nursery.start_soon(self._ask, branch, self._order(branch), self._model)
        for act in acts:
            match act:
                case Close() | Fail():
                    self._ended = act
                    self._wake.set()
                case Short(text=text, until=until):
                    self._news.log(f"{text}; waiting {until - trio.current_time():.0f} s for clients")

    def _order(self, branch: Branch) -> Order:
        number = self._rounds.number + 1
        every = self._plan.evaluate_every
        order = Order(
            claim=self._plan.claim,
            number=number,
            layout=self._layout,
            model=self._digest,
            settings=dict(self._plan.strategy.configure(number)),
            seed=self._plan.seed,
            evaluate=bool(every) and number > 1 and (number - 1) % every == 0,
            limit_s=self._rounds.budget_s(),
            branches=branch.below,
        )
        if not branch.below:
            return order
        signature = self._mesh.sign(order.words(branch.head))
        deputy = Deputy(self._mesh.peer_id, branch.head, signature)
        return msgspec.structs.replace(order, deputy=deputy)

    async def _ask(self, branch: Branch, order: Order, model: Flat) -> None:
        """Order one round from one client, or one branch, and take in what comes."""
        try:
            delivery = await self._courier.carry(branch.head, order, model.data.cast("B"))
            row = await self._checked(delivery, order)
        except MycelError as error:
            self._fail(branch.head, order.number, str(error))
            self._ask_again(branch.below, order, model)
            return
        while self._ended is not None:
            await self._opened.wait()
        for missing in delivery.report.missing:
            self._fail(missing.client, order.number, missing.why)
        self._take(delivery, order.number, row)

    def _ask_again(self, clients: Sequence[PeerId], order: Order, model: Flat) -> None:
        """Ask those below an aggregator that failed themselves: what they did they have kept."""
        alone = msgspec.structs.replace(order, branches=(), deputy=None)
        for client in clients:
            if self._rounds.is_waited_for(client, order.number):
                self._nursery.start_soon(self._ask, Branch(client), alone, model)

    async def _checked(self, delivery: Delivery, order: Order) -> Flat:
        """The update as a row. Raises `Refused` where it is none."""
        if delivery.update is None:
            raise Refused("it sent no update", reason="report")
        if delivery.update.nbytes < SMALL_BYTES:
            return row_of(delivery.update, order.layout)
        return await trio.to_thread.run_sync(row_of, delivery.update, order.layout)

    def _take(self, delivery: Delivery, number: int, row: Flat) -> None:
        """Count an update, late or not, with all clients that are in it."""
        report = delivery.report
        discounts, acts = [], list[Act]()
        for client in report.clients:
            try:
                discount, more = self._rounds.on_update(
                    client, number, self._plan.claim.epoch, trio.current_time()
                )
            except Refused as refused:
                self._news.log(f"{client}: {refused}")
                continue
            discounts.append(discount)
            acts += more
        if not discounts:
            return
        weight = self._plan.strategy.weigh(Weighed(report.examples, min(discounts)))
        if self._intake.total is not None:
            self._intake.total.add(row, weight)
        else:
            self._intake.rows.append((report.clients[0], row, weight))
        self._intake.metrics.append((report.metrics, report.examples))
        if report.judged:
            self._intake.judged.append((report.judged, report.judged_examples))
        self._act(acts)

    def _fail(self, client: PeerId, number: int, why: str) -> None:
        self._news.log(f"round {number}, {client}: {why}")
        self._act(self._rounds.on_failed(client, number, why, trio.current_time()))
        self._wake.set()

    async def _follow_pool(self) -> None:
        while True:
            await self._pool.wait_changed()
            self._act(self._rounds.on_pool(self._pool.clients, trio.current_time()))
            self._wake.set()

    async def _judge_last(self) -> None:
        """Have every client judge the last model. Who fails is left out."""
        order = self._order(Branch(PeerId("")))
        order = msgspec.structs.replace(order, train=False, evaluate=True, settings={})
        found: list[tuple[Mapping[str, float], int]] = []

        async def one(client: PeerId) -> None:
            try:
                report = (await self._courier.carry(client, order, self._model.data.cast("B"))).report
                found.append((report.judged, report.judged_examples))
            except MycelError as error:
                self._news.log(f"judging, {client}: {error}")

        with trio.move_on_after(self._rounds.expected_s):
            async with trio.open_nursery() as nursery:
                for client in self._pool.clients:
                    nursery.start_soon(one, client)
        if found:
            self._news.report(self._standing.number, self._average(found))


def state_file(state: Mapping[str, Flat], layout: Layout) -> bytes:
    """A strategy's rows as a safetensors file, each of the model's size."""
    import numpy as np

    from mycel.compute.train.layout import Entry

    named = Layout(tuple(Entry(name, (layout.size,)) for name in sorted(state)))
    return to_safetensors(np.concatenate([state[name] for name in sorted(state)]), named)
