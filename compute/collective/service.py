"""A group as its callers see it: operations that end on all members alike, whoever dies meanwhile.

`Membership` decides and this acts: messages go out as calls, a mover carries out attempts, and what it staged
is kept or dropped when the operation has ended. An operation is one call, however many epochs and attempts it
takes; it waits for the members to arrive for as long as they take, since only bytes that should move and do
not have a deadline, and that is the mover's.

    async with trio.open_nursery() as nursery:
        group = Group(mesh, rpc, mover, "demo")
        await nursery.start(group.run)
        await group.gather_members(2)
        outcome = await group.all_reduce(gradients)      # a numpy array, in place

What a caller gets: `Outcome`, and its array holds the same bytes as everybody's. Or `OperationRefused`, on
all members: one of them will not have it, its array is as it was. Or `Fenced`: this node is not one of the
group any more (it was silent, cut off, or stopped for a while); what the others decided it cannot know, its
array is as it was, and it comes in again by itself as a newcomer, who must take over the others' state
first. A caller that is cancelled before the end has its array as it was, too.
"""

from __future__ import annotations

from types import NoneType
from typing import TYPE_CHECKING

import numpy as np
import trio

from mycel.compute.collective.asked import read_place, read_rule
from mycel.compute.collective.attempt import (
    Array,
    Attempt,
    AttemptFailed,
    Mover,
    Rule,
    Staged,
    as_items,
    part_of,
)
from mycel.compute.collective.epoch import Bundle, Epoch, Kind, Message, Terms
from mycel.compute.collective.group import Membership
from mycel.compute.collective.ledger import Abandon, Action, Begin, Entered, Left, Send, Settled
from mycel.compute.collective.outcome import Fenced, GroupClosed, Operation, OperationRefused, Outcome
from mycel.compute.collective.policy import Policy
from mycel.compute.collective.redial import Redial
from mycel.protocol.errors import LimitExceeded, LocalProtocolError, MycelError, UsageProblem
from mycel.protocol.limits_group import DEFAULT_GROUP_LIMITS, GroupLimits
from mycel.protocol.mesh import Access, Mesh, PeerDown, PeerId
from mycel.protocol.method import Call, Method
from mycel.protocol.rpc import Rpc

if TYPE_CHECKING:
    from trio._core._run import TaskStatus


_NOTHING = np.zeros(0, np.uint8)


class Group:
    """One node's part in the group `name` among the members of its swarm. `run` must be running."""

    def __init__(
        self,
        mesh: Mesh,
        rpc: Rpc,
        mover: Mover,
        name: str,
        policy: Policy | None = None,
        limits: GroupLimits = DEFAULT_GROUP_LIMITS,
    ) -> None:
        self._mesh = mesh
        self._rpc = rpc
        self._mover = mover
        self._limits = limits
        self.name = name
        self.me = mesh.peer_id
        self.policy = policy or Policy()
        self._tell = Method(f"group/{name}", Bundle, NoneType)
        self._core = Membership(name, mesh.peer_id, mesh.entropy, self.policy, limits)
        self._operations: dict[str, Operation] = {}
        self._staged: dict[Attempt, Staged] = {}
        self._scopes: dict[Attempt, trio.CancelScope] = {}
        self._nursery: trio.Nursery | None = None
        self._poke = trio.Event()
        self._news = trio.lowlevel.ParkingLot()
        self._redial = Redial(mesh, limits, self._on_miss)
        self.fenced = 0  # how often this node found itself left out

    @property
    def epoch(self) -> Epoch | None:
        """The epoch that this node is in, None while it is outside."""
        return self._core.epoch

    @property
    def waits_for(self) -> str:
        """What keeps the group from going on, "" where nothing does."""
        return self._core.waits_for

    async def run(self, *, task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Take part until cancelled; then leave, which the others need not wait for."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                self._rpc.serve(self._tell, self._take, inline=True)
                nursery.start_soon(self._keep_time)
                nursery.start_soon(self._watch_peers)
                task_status.started()
        finally:
            self._nursery = None
            self._rpc.stop_serving(self._tell)
            self._core.leave()
            with trio.move_on_after(self._limits.grace_s, shield=True):
                async with trio.open_nursery() as farewell:
                    for peer, bundle in self._obey():
                        farewell.start_soon(self._post, peer, bundle)

    async def gather_members(self, count: int = 1) -> Epoch:
        """Wait until this node is in an epoch of at least `count` members."""
        while self.epoch is None or len(self.epoch.members) < count:
            await self._news.park()
        return self.epoch

    async def all_reduce(
        self,
        array: Array,
        *,
        op: str = "avg",
        tag: str = "",
        codec: str | None = None,
        dtype: str = "",
        into: Array | None = None,
    ) -> Outcome:
        """Put all members' arrays together, item by item; the result replaces `array`.

        Or stands in `into`, as large, which costs less: then `array` stays as it is. `codec`: "int8", "int4",
        or with "+feedback", which adds what was lost at this tag to the next operation. `dtype` says what the
        items are where numpy has no word for it ("bfloat16", in an array of 16-bit items). Raises
        `OperationRefused`, `Fenced`; `UsageProblem` for an array, a rule or a tag that cannot be worked with;
        in all cases `array` is as it was.
        """
        rule = read_rule(array, dtype, op, codec)
        place = None if into is None else read_place(into, array)
        outcome, _ = await self._call("all_reduce", tag, as_items(array), rule, into=place)
        return outcome

    async def reduce_scatter(
        self, array: Array, *, op: str = "avg", tag: str = "", codec: str | None = None, dtype: str = ""
    ) -> tuple[Outcome, Array]:
        """As `all_reduce`, for one part each: contributor i gets `part_of(array.size, members, i)`.

        `array` stays as it is. Raises as `all_reduce`.
        """
        return await self._call("reduce_scatter", tag, as_items(array), read_rule(array, dtype, op, codec))

    async def all_gather(
        self, part: Array, *, tag: str = "", codec: str | None = None, dtype: str = ""
    ) -> tuple[Outcome, Array]:
        """Every contributor's `part`, one after the other in their order, flat. Raises as `all_reduce`."""
        return await self._call("all_gather", tag, as_items(part), read_rule(part, dtype, "avg", codec))

    async def broadcast(
        self, array: Array, root: PeerId, *, tag: str = "", codec: str | None = None, dtype: str = ""
    ) -> Outcome:
        """`root`'s array, in everybody's. Raises as `all_reduce`; also refused where `root` is gone."""
        rule = read_rule(array, dtype, "avg", codec)
        outcome, _ = await self._call("broadcast", tag, as_items(array), rule, root=root)
        return outcome

    async def barrier(self, *, tag: str = "barrier") -> Outcome:
        """Return once all members have called it. Raises `OperationRefused`, `Fenced`."""
        outcome, _ = await self._call("barrier", tag, _NOTHING, Rule("uint8"))
        return outcome

    async def border(self, *, tag: str = "border") -> Outcome:
        """As `barrier`; before it returns, newcomers are let in and have called it too.
        The only place where they come in under `Policy.admits = "border"`. Raises as `barrier`.
        """
        outcome, _ = await self._call("border", tag, _NOTHING, Rule("uint8"))
        return outcome

    def is_awaited(self, tag: str) -> bool:
        """Whether another member waits for this one to call an operation of `tag`. Costs nothing."""
        return self._core.is_awaited(tag)

    async def _call(
        self, kind: Kind, tag: str, array: Array, rule: Rule, *, root: str = "", into: Array | None = None
    ) -> tuple[Outcome, Array]:
        if self._nursery is None:
            raise GroupClosed(f"the group {self.name} does not run at this node; start Group.run first")
        if len(tag) > self._limits.tag_chars:
            raise UsageProblem(f"a tag has {self._limits.tag_chars} characters at most, not {len(tag)}")
        if tag in self._operations:
            raise UsageProblem(f"tag {tag!r} is in use; give operations that run at once different tags")
        while self._core.is_open(tag):  # given up here, and not ended yet
            await self._news.park()
        items = array.size if kind not in ("barrier", "border") else 0
        dtype = rule.dtype if items else ""
        op = rule.op if kind in ("all_reduce", "reduce_scatter") else ""
        terms = Terms(kind, dtype, items, op, rule.codec or "", PeerId(root), rule.feedback)
        operation = self._operations[tag] = Operation(terms, rule, array, into)
        try:
            self._core.call(trio.current_time(), tag, terms)
            self._act()
            await operation.done.wait()
            await trio.lowlevel.checkpoint()  # what tells the others of it goes out first: a caller may now
            await trio.lowlevel.checkpoint()  # keep trio's thread busy for as long as it likes
        finally:
            if operation.outcome is None:
                await self._give_up(tag, operation)
            del self._operations[tag]
        if operation.outcome is None:
            raise operation.error or GroupClosed(f"the group {self.name} was left")
        return operation.outcome, array if operation.result is None else operation.result

    async def _give_up(self, tag: str, operation: Operation) -> None:
        """It failed, or its caller was cancelled: nothing touches the array after this."""
        if not operation.done.is_set():
            operation.done.set()
            self._core.withdraw(trio.current_time(), tag, f"{self._mesh.peer_id} gave it up")
        for attempt in [a for a in (*self._scopes, *self._staged) if a.tag == tag]:
            self._stop(attempt)
        self._act()
        with trio.CancelScope(shield=True):
            async with operation.turn:
                pass

    # What the membership wants done

    def _act(self) -> None:
        for peer, bundle in self._obey():
            if self._nursery is not None:
                self._nursery.start_soon(self._post, peer, bundle)
        self._poke.set()

    def _obey(self) -> list[tuple[PeerId, Bundle]]:
        """Do what is to be done; what is to be sent is left."""
        post: dict[PeerId, list[Message]] = {}
        while actions := self._core.take():
            for action in actions:
                if isinstance(action, Send):
                    post.setdefault(action.peer, []).append(action.message)
                else:
                    self._do(action)
        return [(peer, Bundle(tuple(post[peer]))) for peer in post if peer in self._mesh.peers]

    def _do(self, action: Action) -> None:
        match action:
            case Begin(attempt=attempt):
                if self._nursery is not None:
                    self._scopes[attempt] = trio.CancelScope()
                    self._nursery.start_soon(self._attempt, attempt, self._scopes[attempt])
            case Abandon(attempt=attempt):
                self._stop(attempt)
                if self._nursery is not None:
                    self._nursery.start_soon(self._mover.abandon, attempt)
            case Settled():
                self._settle(action)
            case Entered(epoch=epoch):
                self._redial.dial(epoch, self._nursery)
                self._news.unpark_all()
            case Left(why=why):
                self.fenced += 1
                for operation in self._operations.values():
                    operation.error = Fenced(why)
                    operation.done.set()
                self._news.unpark_all()

    def _stop(self, attempt: Attempt) -> None:
        scope = self._scopes.pop(attempt, None)
        if scope is not None:
            scope.cancel()
        staged = self._staged.pop(attempt, None)
        if staged is not None:
            staged.drop()

    def _settle(self, settled: Settled) -> None:
        operation = self._operations.get(settled.tag)
        staged = self._staged.pop(settled.attempt, None)
        self._news.unpark_all()
        if operation is None or operation.done.is_set():
            if staged is not None:
                staged.drop()
            return
        if settled.ending == "kept":
            if staged is not None:
                staged.keep()
            attempt = settled.attempt
            name = f"{attempt.lineage.hex()}/{attempt.tag}/{attempt.number}"
            operation.outcome = Outcome(attempt.order, attempt.epoch, settled.attempts, name)
        else:
            if staged is not None:
                staged.drop()
            operation.error = OperationRefused(settled.why)
        operation.done.set()

    async def _attempt(self, attempt: Attempt, scope: trio.CancelScope) -> None:
        """Let the mover work, and vote."""
        with scope:
            operation = self._operations.get(attempt.tag)
            if operation is None:
                return  # given up before it began
            async with operation.turn:
                try:
                    staged = await self._move(attempt, operation)
                except AttemptFailed as error:
                    self._core.failed(trio.current_time(), attempt, error.peer, error.why)
                except MycelError as error:
                    why = f"{self._mesh.peer_id}: {error}"
                    self._core.withdraw(trio.current_time(), attempt.tag, why)
                else:
                    self._staged[attempt] = staged
                    if not self._core.staged(trio.current_time(), attempt):
                        self._stop(attempt)
        self._scopes.pop(attempt, None)
        self._act()

    async def _move(self, attempt: Attempt, operation: Operation) -> Staged:
        array, rule = operation.array, operation.rule
        count = len(attempt.order)
        match operation.terms.kind:
            case "all_reduce":
                return await self._mover.all_reduce(attempt, array, rule, operation.into)
            case "reduce_scatter":
                own = part_of(array.size, count, attempt.index(self._mesh.peer_id))
                operation.result = np.empty(own.stop - own.start, array.dtype)
                return await self._mover.reduce_scatter(attempt, array, operation.result, rule)
            case "all_gather":
                operation.result = np.empty(count * array.size, array.dtype)
                return await self._mover.all_gather(attempt, array, operation.result, rule)
            case "broadcast":
                return await self._mover.broadcast(attempt, array, operation.terms.root, rule)
        raise LocalProtocolError(f"{operation.terms.kind} moves nothing")

    # Messages, time, peers

    async def _post(self, peer: PeerId, bundle: Bundle) -> None:
        try:
            await self._rpc.call(peer, self._tell, bundle, deadline_s=self._limits.patience_s)
        except MycelError:  # lost, as messages may be: reminders, or the peer's end, make up for it
            return

    def _take(self, call: Call, bundle: Bundle) -> None:
        now = trio.current_time()
        self._redial.note(call.peer)
        for message in bundle.messages:
            self._core.receive(now, call.peer, message)
        self._act()

    async def _keep_time(self) -> None:
        self._core.join(trio.current_time())
        self._act()
        try:
            while True:
                self._poke = trio.Event()
                with trio.move_on_at(self._core.next_at):
                    await self._poke.wait()
                now = trio.current_time()
                if now >= self._core.next_at:
                    self._core.tick(now)
                    self._act()
                await trio.lowlevel.checkpoint()
        finally:
            self._nursery = None  # it is about to close

    async def _watch_peers(self) -> None:
        known: dict[PeerId, None] = {}
        while True:
            try:
                async with self._mesh.events() as events:
                    self._compare(known)
                    async for event in events:
                        if isinstance(event, PeerDown) and known.pop(event.peer, False) is None:
                            self._lose(event)
                        self._compare(known)
            except LimitExceeded:
                continue  # too far behind: look again from the start

    def _compare(self, known: dict[PeerId, None]) -> None:
        """Tell the membership who has come and gone."""
        now = trio.current_time()
        here = {p: info for p, info in self._mesh.peers.items() if info.access >= Access.MEMBER}
        for peer in [peer for peer in known if peer not in here]:
            del known[peer]
            self._core.down(now, peer)
        for peer in here:
            self._redial.note(peer, anew=True)
            if peer not in known:
                known[peer] = None
                self._core.up(now, peer)
        self._act()

    def _lose(self, event: PeerDown) -> None:
        """A peer's connection broke: it may be back before the next epoch leaves it out."""
        self._core.down(trio.current_time(), event.peer, was_silent=event.reason == "silent")
        self._redial.lost(event, self.epoch, self._nursery)

    def _on_miss(self, peer: PeerId) -> None:
        self._core.miss(trio.current_time(), peer)
        self._act()
