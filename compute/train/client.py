"""A client of federated rounds: takes orders, has its trainer do them, and gives what came of it.

Whoever orders must show by what right (`Gate`), for a job that this node takes part in, with data that its
owner offers under the name that the job asks for, and, where the application is the submitter's own, only if
the owner trusts that submitter by name. Each of these has a refusal of its own: "unknown-job" and the like
from the gate, "stale-epoch" for a coordinator that was replaced, "no-data", "untrusted", "not-ready", "busy".

Work belongs to (job, round, model), not to the call that ordered it: it goes on when its coordinator dies,
and its result is kept until there is a newer one. So a coordinator that takes over and orders the same round
gets what was done before, at once, and asking twice costs nothing and counts once.

The daemon keeps rows as bytes and needs no numpy, except where an order names branches: then this client is
an aggregator, and adds up (`mycel.compute.train.gather`).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, cast

import msgspec
import trio

from mycel.compute.engine import EngineLost
from mycel.compute.train.courier import Courier, Delivery, piece_of, pieces_of, receive_row
from mycel.compute.train.orders import FIRST, OFFER, ROUND, Claim, Down, Offered, Order, Report, Up
from mycel.compute.train.trade import Begun, Setting, Source, StartAsk, WorkAsk, WorkDone, seed_of
from mycel.compute.train.trainer import Trainers
from mycel.protocol.errors import MycelError, Refused
from mycel.protocol.limits_train import DEFAULT_FEDERATED_LIMITS, FederatedLimits
from mycel.protocol.mesh import Mesh, PeerId
from mycel.protocol.method import Call
from mycel.protocol.rpc import Rpc
from mycel.protocol.tensor import Tensor


class Terms(msgspec.Struct, frozen=True):
    """What a client knows of a job, from whoever signed it and not from its coordinator."""

    job: str
    submitter: PeerId
    source: Source
    data: str
    """The name under which owners offer the data."""
    settings: dict[str, Setting] = {}
    """The job's own; orders may add what its strategy says."""
    seed: int = 0


class Gate(Protocol):
    """Says who may order."""

    def terms(self, peer: PeerId, claim: Claim) -> Terms:
        """The terms of the job that `peer` orders by this claim. Raises `Refused` with a named reason."""


@dataclass(frozen=True, slots=True)
class Owner:
    """What this node's owner lets federated jobs do."""

    data: Mapping[str, Path] = field(default_factory=dict)
    """Files and folders that may be trained on, by the names that jobs ask for."""
    trusted: Sequence[PeerId] = ()
    """Submitters whose own applications may run here."""

    def trusts(self, submitter: PeerId, me: PeerId) -> bool:
        """Whether code of `submitter` may run at this node, `me`."""
        return submitter in (me, *self.trusted)

    def check_code(self, job: str, submitter: PeerId, me: PeerId) -> None:
        """Raise `Refused` ("untrusted") where code that `submitter` brings for `job` may not run here."""
        if not self.trusts(submitter, me):
            raise Refused(
                f"job {job} brings code of {submitter}, whom this node's owner does not trust: "
                "add that id to trust_submitters to let it run here",
                reason="untrusted",
            )

    def offered(self, name: str) -> Path:
        """The data of that name. Raises `Refused` ("no-data")."""
        if name not in self.data:
            raise Refused(f"this node's owner offers no data named {name!r}", reason="no-data")
        return self.data[name]


@dataclass(slots=True)
class _Work:
    """What was ordered last of one job."""

    key: tuple[int, str, bool, bool]  # round, model, train, evaluate
    done: trio.Event = field(default_factory=trio.Event)
    result: WorkDone | None = None
    failure: MycelError | None = None


@dataclass(slots=True)
class _Part:
    """This node's part in one job."""

    nursery: trio.Nursery
    """Where its work is done, whoever ordered it."""
    epoch: int = 0
    work: _Work | None = None


class FederatedClient:
    """The service. `attend` must be running for a job while orders of it come."""

    def __init__(
        self,
        mesh: Mesh,
        rpc: Rpc,
        gate: Gate,
        trainers: Trainers,
        owner: Owner,
        limits: FederatedLimits = DEFAULT_FEDERATED_LIMITS,
    ) -> None:
        self._mesh = mesh
        self._rpc = rpc
        self._gate = gate
        self._trainers = trainers
        self._owner = owner
        self._limits = limits
        self._parts: dict[str, _Part] = {}
        rpc.serve(OFFER, self._offer)
        rpc.serve(FIRST, self._first)
        rpc.serve(ROUND, self._round)

    async def attend(
        self, job: str, source: Source, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Take orders of a job until cancelled; then what was kept of it is let go. Raises `Refused` ("busy")
        where this node has too many jobs."""
        if len(self._parts) >= self._limits.jobs:
            raise Refused(f"this node takes part in {len(self._parts)} jobs already", reason="busy")
        try:
            async with trio.open_nursery() as nursery:
                self._parts[job] = _Part(nursery)
                task_status.started()
                await trio.sleep_forever()
        finally:
            self._parts.pop(job, None)
            with trio.CancelScope(shield=True):
                await self._trainers.drop(source)

    async def _offer(self, call: Call, claim: Claim) -> Offered:
        self._admit(call.peer, claim)
        work = self._parts[claim.job].work
        return Offered(work.key[0] if work is not None and work.result is not None else 0)

    async def _first(self, call: Call, claim: Claim) -> Begun:
        """The job's first model, the same wherever it is made."""
        terms = self._admit(call.peer, claim)
        try:
            return await self._trainers.start_model(
                terms.source, StartAsk(terms.source.name, terms.settings, terms.seed)
            )
        except (ValueError, EngineLost) as error:
            raise Refused(self._short(error), reason="application") from error

    async def _round(self, call: Call, items: AsyncIterator[Down]) -> AsyncIterator[Up]:
        async with aclosing(cast(AsyncGenerator[Down, None], items)):
            order = (await anext(items)).order
            if order is None:
                raise Refused("a round begins with an order, not with a piece of the model", reason="order")
            terms = self._admit(self._orders_by(call.peer, order.check(self._limits)), order.claim)
            delivery = await self._deliver(terms, order, items)
        yield Up(report=delivery.report)
        if delivery.update is not None:
            for piece in pieces_of(delivery.update, self._limits.chunk_bytes):
                yield Up(piece=piece)

    def _orders_by(self, peer: PeerId, order: Order) -> PeerId:
        """In whose name `peer` orders: its own, or, an aggregator, its coordinator's. Raises `Refused`."""
        deputy = order.deputy
        if deputy is None or deputy.coordinator == peer:
            return peer
        if deputy.head != peer or not self._mesh.verify(
            deputy.coordinator, order.words(peer), deputy.signature
        ):
            raise Refused(f"{peer} passes on an order that is not signed for it", reason="unproven")
        return deputy.coordinator

    def _admit(self, peer: PeerId, claim: Claim) -> Terms:
        """The terms by which `peer` may order. Raises `Refused`."""
        terms = self._gate.terms(peer, claim)
        part = self._parts.get(terms.job)
        if part is not None and claim.epoch < part.epoch:
            raise Refused(
                f"epoch {claim.epoch} of job {claim.job} is over, {part.epoch} was seen here: another peer "
                "coordinates it now",
                reason="stale-epoch",
            )
        if terms.source.is_bundle:
            self._owner.check_code(claim.job, terms.submitter, self._mesh.peer_id)
        self._owner.offered(terms.data)
        if part is None:
            raise Refused(f"this node has not begun with job {claim.job}", reason="not-ready")
        part.epoch = claim.epoch
        return terms

    async def _deliver(self, terms: Terms, order: Order, items: AsyncIterator[Down]) -> Delivery:
        part = self._parts[terms.job]
        key = (order.number, order.model, order.train, order.evaluate)
        work = part.work
        known = work is not None and work.key == key and work.failure is None
        if work is None or not known:
            if work is not None and not work.done.is_set() and work.key[0] >= order.number:
                raise Refused(f"this node works on round {work.key[0]} still", reason="busy")
            work = part.work = _Work(key)
        if known and not order.branches:
            await work.done.wait()
            return self._delivery(order, work)
        try:
            model = await receive_row(
                lambda: piece_of(items), order.layout.nbytes, self._limits.stall_s, order.model
            )
            async for _ in items:
                raise Refused("more came than the model", reason="wrong-size")
        except BaseException as error:  # why: nobody may wait for work that was never begun; raised again
            if not known:
                work.failure = error if isinstance(error, MycelError) else Refused("cut short", reason="lost")
                work.done.set()
            raise
        if not known:
            part.nursery.start_soon(self._work, terms, order, model, work)
        if order.branches:
            from mycel.compute.train.gather import gather_branches

            courier = Courier(self._rpc, self._limits, trio.CapacityLimiter(1))

            async def own() -> Delivery:
                await work.done.wait()
                return self._delivery(order, work)

            return await gather_branches(courier, order, model, own, self._mesh.peer_id)
        await work.done.wait()
        return self._delivery(order, work)

    async def _work(self, terms: Terms, order: Order, model: memoryview, work: _Work) -> None:
        """Have the trainer do it, and keep what came of it, whoever ordered it may have died meanwhile."""
        ask = WorkAsk(
            app=terms.source.name,
            job=terms.job,
            number=order.number,
            layout=order.layout,
            model=Tensor("float32", (order.layout.size,), model),
            settings={**terms.settings, **order.settings},
            seed=seed_of(order.seed, order.number, self._mesh.peer_id),
            data=str(self._owner.data[terms.data]),
            train=order.train,
            evaluate=order.evaluate,
        )
        try:
            work.result = await self._trainers.work(terms.source, ask, order.limit_s)
        except EngineLost as error:
            work.failure = Refused(self._short(error), reason="trainer-lost")
        except (ValueError, MycelError) as error:
            work.failure = Refused(self._short(error), reason="application")
        finally:
            work.done.set()

    def _short(self, error: Exception) -> str:
        return str(error)[: self._limits.text]

    def _delivery(self, order: Order, work: _Work) -> Delivery:
        if work.failure is not None:
            raise Refused(str(work.failure), reason=getattr(work.failure, "reason", "lost"))
        assert work.result is not None, "done without a result"
        done = work.result
        report = Report(
            job=order.claim.job,
            epoch=order.claim.epoch,
            number=order.number,
            model=order.model,
            clients=(self._mesh.peer_id,),
            has_update=done.update is not None,
            examples=done.examples,
            metrics=done.metrics,
            judged_examples=done.judged_examples,
            judged=done.judged,
            seconds=done.seconds,
        )
        update = None if done.update is None else memoryview(done.update.data).cast("B")
        return Delivery(report, update)
