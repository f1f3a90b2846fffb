"""Carries out the attempts of a group: `mycel.compute.collective.attempt.Mover` over any `Lanes`.

An attempt is registered, its sources are told READY, and what may be sent is sent to each target as soon as
that is ready too. From then on the threads of the lanes do everything (`Operation.work`), and trio's thread
sleeps until the last piece is in its place: one wake-up for an operation, not one for a chunk.

An attempt fails when a peer that it needs is lost, gives up (GONE), sends what it should not, or when
nothing moved for `LaneLimits.progress_s`. Whoever fails says GONE to its neighbours with the peer it
suspects, so that a failure goes around the ring in a few round trips, not in a deadline at each member.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Literal

import numpy as np
import trio

from mycel.compute.collective.arithmetic import is_finite, storage
from mycel.compute.collective.attempt import (
    Array,
    Attempt,
    AttemptFailed,
    InputRefused,
    Rule,
    Staged,
    part_of,
)
from mycel.compute.collective.early import Early, read_gone, write_gone
from mycel.compute.collective.operation import Operation, Untrue
from mycel.compute.collective.plan import Plan, Task, draw_plan
from mycel.compute.collective.residual import Residuals
from mycel.compute.collective.ring import Kind, worthwhile_circle
from mycel.compute.collective.stock import Stock
from mycel.compute.collective.under_way import Held, Run
from mycel.protocol.errors import ConnectionLost, LocalProtocolError, MycelError
from mycel.protocol.lane import GONE, PART, READY, Body, Head, Lanes
from mycel.protocol.limits import DEFAULT_LANE_LIMITS, LaneLimits
from mycel.protocol.mesh import Mesh, PeerDown, PeerId

if TYPE_CHECKING:
    from trio._core._run import TaskStatus

LOOKS = 4
"""So often within the progress deadline it is looked whether anything moved."""


def _nothing() -> None:
    """What there is to do where nothing is."""


def _telling(attempt: Attempt) -> Attempt:
    """What its members tell each other within `attempt` before it begins."""
    return replace(attempt, tag=f"{attempt.tag}\0lines")


class RingMover:
    """`Mover` around rings, and through a star for what is small. `run` must be running while it is used.

    `nonfinite`: what is done with items that are infinite or not a number where no codec refuses them anyway.
    "propagate" puts them together as IEEE 754 does, "refuse" raises `InputRefused` at whoever has them.
    """

    def __init__(
        self,
        mesh: Mesh,
        lanes: Lanes,
        *,
        limits: LaneLimits = DEFAULT_LANE_LIMITS,
        nonfinite: Literal["propagate", "refuse"] = "propagate",
    ) -> None:
        self._mesh = mesh
        self._lanes = lanes
        self._limits = limits
        self._nonfinite = nonfinite
        self._stock = Stock(limits.stock_bytes)
        self._runs: dict[bytes, Run] = {}
        self._told: dict[Attempt, Staged] = {}
        self._early = Early(limits.early)
        self._residuals = Residuals(self._stock, limits.residuals)
        self._thread = threading.get_ident()
        self._token: trio.lowlevel.TrioToken | None = None
        self.strays = 0
        """Parts that came for no operation of this node, so far."""
        lanes.attach(self)

    async def run(self, *, task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Watch peers go until cancelled."""
        self._thread = threading.get_ident()
        self._token = trio.lowlevel.current_trio_token()
        async with self._mesh.events() as events:
            task_status.started()
            async for event in events:
                if isinstance(event, PeerDown):
                    self.lost(
                        event.peer, f"the connection to {event.peer} ended: {event.text or event.reason}"
                    )

    # Mover

    async def all_reduce(
        self, attempt: Attempt, array: Array, rule: Rule, into: Array | None = None
    ) -> Staged:
        """See `Mover.all_reduce`."""
        self._check_input(rule, array)
        plan = await self._plan(Task(Kind.REDUCE, attempt, rule, array.size))
        target = array if into is None else into
        if plan is None:
            return Held(partial(np.copyto, target, array), _nothing)
        begin = partial(Operation, plan, array, target, self._stock, is_scratch=into is not None)
        if not rule.feedback or plan.codec is None:
            return await self._carry_out(begin())
        residual = self._residuals.borrow((attempt.group, attempt.tag, array.size))
        return await self._carry_out(
            begin(residual=residual),
            on_keep=partial(self._residuals.keep, residual),
            on_drop=partial(self._residuals.drop, residual),
        )

    async def reduce_scatter(self, attempt: Attempt, array: Array, part: Array, rule: Rule) -> Staged:
        """See `Mover.reduce_scatter`."""
        self._check_input(rule, array)
        plan = await self._plan(Task(Kind.SCATTER, attempt, rule, array.size))
        own = part_of(array.size, len(attempt.order), attempt.index(self._mesh.peer_id))
        if plan is None:
            return Held(partial(np.copyto, part, array[own]), _nothing)
        scratch = self._stock.take(array.nbytes)
        work = scratch.view(array.dtype)

        def keep() -> None:
            part[...] = work[own]
            self._stock.give(scratch)

        operation = Operation(plan, array, work, self._stock, is_scratch=True)
        return await self._carry_out(operation, on_keep=keep, on_drop=partial(self._stock.give, scratch))

    async def all_gather(self, attempt: Attempt, part: Array, whole: Array, rule: Rule) -> Staged:
        """See `Mover.all_gather`."""
        self._check_input(rule, part)
        plan = await self._plan(Task(Kind.GATHER, attempt, rule, whole.size))
        if plan is None:
            return Held(partial(np.copyto, whole, part), _nothing)
        own = part_of(whole.size, len(attempt.order), attempt.index(self._mesh.peer_id))
        operation = Operation(plan, whole, whole, self._stock)
        return await self._carry_out(operation, begin=partial(operation.place_own, part, own.start))

    async def broadcast(self, attempt: Attempt, array: Array, root: PeerId, rule: Rule) -> Staged:
        """See `Mover.broadcast`."""
        if root == self._mesh.peer_id:
            self._check_input(rule, array)
        plan = await self._plan(Task(Kind.BROADCAST, attempt, rule, array.size, root))
        if plan is None:
            return Held(_nothing, _nothing)
        operation = Operation(plan, array, array, self._stock)
        if root != self._mesh.peer_id:
            return await self._carry_out(operation)
        return await self._carry_out(operation, begin=partial(operation.place_own, array, 0))

    async def abandon(self, attempt: Attempt) -> None:
        """See `Mover.abandon`. What comes of an attempt that is not under way is thrown away anyhow."""
        for run in list(self._runs.values()):
            if run.operation.plan.task.attempt in (attempt, _telling(attempt)):
                self._settle(run, AttemptFailed(None, "the attempt was abandoned"))
        await trio.lowlevel.checkpoint()

    async def _plan(self, task: Task) -> Plan | None:
        """How to go about `task`; None where there is nobody to go about it with, or nothing."""
        own, order = self._mesh.peer_id, task.attempt.order
        if own not in order:
            raise LocalProtocolError(f"{own} is no member of {task.attempt}")
        plan = draw_plan(task, tuple(range(len(order))), self._limits, own)
        if len(order) < 2 or not task.items:
            return None
        share = task.items * storage(task.rule.dtype).itemsize // len(order)
        if len(order) < 3 or share < self._limits.survey_bytes or plan.is_star:
            return plan
        return draw_plan(task, await self._survey(task.attempt), self._limits, own)

    async def _survey(self, attempt: Attempt) -> tuple[int, ...]:
        """The ring whose slowest line is the fastest, by what its members have measured.

        They tell each other through the star, within the attempt, so that all know the same. One round trip.
        """
        count, own = len(attempt.order), attempt.index(self._mesh.peer_id)
        rates = np.zeros((count, count), np.float32)
        for at, peer in enumerate(attempt.order):
            rates[own, at] = 0.0 if at == own else self._lanes.rate(peer) or 0.0
        task = Task(Kind.REDUCE, _telling(attempt), Rule("float32", "max"), count * count)
        plan = draw_plan(task, tuple(range(count)), self._limits, self._mesh.peer_id)
        if not plan.is_star:
            return plan.circle  # so many members that telling would be a bulk of its own
        flat = rates.reshape(-1)
        self._told[attempt] = await self._carry_out(Operation(plan, flat, flat, self._stock))
        return worthwhile_circle(rates.tolist())

    def _check_input(self, rule: Rule, array: Array) -> None:
        if self._nonfinite == "refuse" and not is_finite(rule.dtype, array):
            raise InputRefused(
                "an item is infinite or not a number; skip the step, or let such items through"
            )

    async def _carry_out(
        self,
        operation: Operation,
        *,
        begin: Callable[[], None] = _nothing,
        on_keep: Callable[[], None] = _nothing,
        on_drop: Callable[[], None] = _nothing,
    ) -> Staged:
        digest = operation.digest
        if digest in self._runs:
            raise LocalProtocolError(f"{operation.plan.task.attempt} is under way at this node already")
        run = self._runs[digest] = Run(operation)
        operation.on_refused = partial(self._refused, run)

        def release() -> None:
            told = self._told.pop(operation.plan.task.attempt, None)
            if told is not None:
                told.drop()  # by now all members know the ring, or it does not matter

        def drop() -> None:
            release()
            del self._runs[digest]
            operation.drop()
            on_drop()

        def keep() -> None:
            release()
            del self._runs[digest]
            operation.keep()
            on_keep()

        try:
            begin()
            await self._begin(run)
            await self._wait(run)
        except BaseException as error:  # why: a cancelled attempt leaves nothing behind either; raised again
            drop()
            self._tell_gone(run, error)
            raise
        return Held(keep, drop)

    async def _begin(self, run: Run) -> None:
        operation = run.operation
        if not operation.missing:
            self._settle(run, None)
        for peer in run.members:
            if peer not in self._mesh.peers:
                raise AttemptFailed(peer, f"{peer} is not connected")
        ready = Head(operation.digest, READY, length=len(operation.plan.describe()))
        for peer in run.sources:
            self._lanes.tell(peer, ready, operation.plan.describe())
        for peer in run.neighbours:
            for kind, body in self._early.pop(peer, operation.digest):
                self._on_control(peer, Head(operation.digest, kind), body)
        self._look_for_others(run)
        if not operation.plan.is_star:
            for peer in run.targets:
                try:
                    await self._lanes.reach(peer)
                except ConnectionLost as error:
                    raise AttemptFailed(peer, str(error)) from None

    async def _wait(self, run: Run) -> None:
        """Until the last piece is in its place. Raises what the attempt failed with."""
        pause = self._limits.progress_s / LOOKS
        seen, still = -1, 0
        while not run.over.is_set():
            with trio.move_on_after(pause):
                await run.over.wait()
            moved = sum(self._lanes.moved(peer) for peer in run.sources) - run.operation.missing
            still = still + 1 if moved == seen else 0
            seen = moved
            if still >= LOOKS and not run.over.is_set():
                self._settle(run, self._stalled(run))
        if run.failure is not None:
            raise run.failure

    def _stalled(self, run: Run) -> AttemptFailed:
        seconds = self._limits.progress_s
        if run.unready:
            peer = run.unready[0]
            return AttemptFailed(peer, f"{peer} did not begin within {seconds:g} s{run.hint}")
        peer = run.sources[0]
        return AttemptFailed(peer, f"nothing came from {peer} for {seconds:g} s{run.hint}")

    # Taker

    def take(self, peer: PeerId, head: Head, body: Body) -> None:
        """See `Taker.take`."""
        if head.kind != PART:
            self._on_control(peer, head, bytes(body.open()))
            return
        run = self._runs.get(head.op)
        place = None if run is None else run.place_of(peer)
        if run is None or place is None or not run.operation.gate.enter():
            self.strays += 1
            return
        operation = run.operation
        try:
            piece = operation.expect(place, head)
            parcels = [] if piece is None else operation.work(piece, body)
        except Untrue as error:
            self._in_trio(partial(self._settle, run, AttemptFailed(peer, f"{peer} sent {error}")))
            return
        except InputRefused as error:
            self._refused(run, error)
            return
        finally:
            operation.gate.leave()
        for parcel in parcels:
            if run.now_or_later(parcel):
                self._lanes.send(parcel)
        if not operation.missing:
            self._in_trio(partial(self._settle, run, None))

    def lost(self, peer: PeerId, why: str) -> None:
        """See `Taker.lost`: attempts that need `peer` fail at once."""
        for run in list(self._runs.values()):
            if peer in run.members:
                self._settle(run, AttemptFailed(peer, why))

    def _in_trio(self, action: Callable[[], None]) -> None:
        """Do it in trio's thread: now when this is it, soon otherwise, never when trio is gone."""
        if threading.get_ident() == self._thread or self._token is None:
            action()
            return
        with contextlib.suppress(trio.RunFinishedError):
            self._token.run_sync_soon(action)

    def _refused(self, run: Run, error: InputRefused) -> None:
        self._in_trio(partial(self._settle, run, error))

    def _settle(self, run: Run, failure: MycelError | None) -> None:
        if not run.over.is_set():
            run.failure = failure
            run.over.set()

    def _on_control(self, peer: PeerId, head: Head, body: bytes) -> None:
        run = self._runs.get(head.op)
        if run is None:
            self._early.add(peer, head.op, head.kind, body)
            for other in list(self._runs.values()):
                self._look_for_others(other)
            return
        if head.kind == READY:
            for parcel in run.release(peer):
                self._lanes.send(parcel)
            return
        suspect, why = read_gone(body)
        self._settle(run, AttemptFailed(suspect or peer, f"{peer} gave the attempt up: {why}"))

    def _look_for_others(self, run: Run) -> None:
        """Whether a neighbour of `run` is at something else under the same name."""
        for peer in run.neighbours:
            for description in self._early.descriptions(peer):
                said = run.operation.plan.compare(description)
                if said and said.is_same_attempt:
                    self._settle(run, AttemptFailed(peer, f"{peer} holds another array: {said.text}"))
                elif said:
                    run.hint = f"; it {said.text}"

    def _tell_gone(self, run: Run, error: BaseException) -> None:
        suspect = error.peer if isinstance(error, AttemptFailed) else self._mesh.peer_id
        why = str(error) or type(error).__name__
        body = write_gone(suspect, why)
        for peer in run.neighbours:
            self._lanes.tell(peer, Head(run.operation.digest, GONE, length=len(body)), body)
