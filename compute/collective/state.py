"""The state that a group shares: named tensors which are the same on all members, or are made so.

`sync` is called by all members at the same border of their work. They tell each other the root hash of what
they hold and how many syncs that has been through; the state of the most syncs counts, and among equal ones
that of the most members. Whoever holds another one (a newcomer, or a member that missed something) fetches
what differs, chunk by chunk, from several of the others at once, and checks each chunk against its hash. The
others do not wait for that: those who are asked keep a copy of the state as it was at this sync, until the
one who lacked it has it or the next sync comes, and go on.

A member that was left out counts as one that has been through no sync, however far it got alone or with
others: where two parts of a group meet again, the state of the line that stays is the one that counts.

Nothing is written into the caller's tensors before all of it has come and has been checked.

A group whose members share state lets newcomers in at borders only (`Policy.admits`): a newcomer's first
call is `sync`, and so everybody's next one must be. In training that overlaps a reduction with computing, a
newcomer's state lacks the reduction under way: `Synced.behind` says that there was one, and then everybody
calls `sync` once more when the reduction has been applied.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import msgspec
import numpy as np
import trio

from mycel.compute.collective.attempt import Array
from mycel.compute.collective.inventory import (
    Digest,
    Inventory,
    bytes_of,
    differing,
    digest,
    root_of,
    span_of,
    take_stock,
)
from mycel.compute.collective.outcome import Fenced
from mycel.compute.collective.service import Group
from mycel.protocol.errors import MycelError, Refused, UsageProblem
from mycel.protocol.mesh import PeerId
from mycel.protocol.method import Call, Method
from mycel.protocol.rpc import Rpc
from mycel.protocol.tensor import Tensor

if TYPE_CHECKING:
    from trio._core._run import TaskStatus

Result = TypeVar("Result")

SERVERS = 4
"""Members that one who lacks the state fetches it from, and that therefore keep a copy."""

ASKED = 4
"""Chunks asked of one of them at once: a megabyte each, so a line of 1 Gbit/s stays full at 30 ms."""

BORDER_TAG = "state/border"
"""What members wait under for those who are not at the border yet."""

CHUNK_S = 20.0
"""A chunk takes 4 s at 2 Mbit/s; whoever does not send one within this is asked no more."""

INLINE_BYTES = 8 << 20
"""States up to this are hashed and copied in trio's thread, in 10 ms; larger ones beside it."""


class StateLost(MycelError):
    """Nobody who holds the group's state sent it to the end. The caller's tensors are as they were."""


@dataclass(frozen=True, slots=True)
class Synced:
    """How a sync went."""

    replaced: bool
    """This node's tensors were overwritten with the group's."""
    behind: tuple[PeerId, ...]
    """Members whose state was not the group's, this node among them or not."""
    members: tuple[PeerId, ...]


class _Ask(msgspec.Struct, frozen=True):
    root: Digest
    tensor: int = -1
    chunk: int = 0


class _Chunk(msgspec.Struct, frozen=True):
    data: Tensor


@dataclass(slots=True)
class _Copy:
    """The state as it was at a sync, for those who lack it."""

    inventory: Inventory
    data: list[bytes]


class SharedState:
    """The state of `group`. `run` must be running; one `sync` at a time."""

    def __init__(self, group: Group, rpc: Rpc) -> None:
        if group.policy.admits != "border":
            raise UsageProblem('a group that shares state needs Policy(admits="border")')
        self._group = group
        self._rpc = rpc
        self._list = Method(f"state.list/{group.name}", _Ask, Inventory)
        self._get = Method(f"state.get/{group.name}", _Ask, _Chunk)
        self._syncs = 0
        self._fenced = group.fenced
        self._copies: dict[bytes, _Copy] = {}
        self._kept = trio.lowlevel.ParkingLot()
        self.fetched_bytes = 0
        """What this node had to fetch so far."""

    async def run(self, *, task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve the state to those who lack it, until cancelled."""
        self._rpc.serve(self._list, self._on_list)
        self._rpc.serve(self._get, self._on_get)
        try:
            task_status.started()
            await trio.sleep_forever()
        finally:
            self._rpc.stop_serving(self._list)
            self._rpc.stop_serving(self._get)

    async def sync(self, state: Mapping[str, Array]) -> Synced:
        """Make `state` the same on all members. See the top of the file.

        `state` maps names to contiguous arrays, which are written to in place. Raises `OperationRefused` and
        `Fenced` as the group does, `StateLost`, and `RemoteProtocolError` where the group's tensors have
        other names or sizes; the tensors are as they were then.
        """
        await self._group.border(tag=BORDER_TAG)
        if self._group.fenced != self._fenced:  # what it did beside the group does not count
            self._fenced, self._syncs = self._group.fenced, 0
        self._copies.clear()
        inventory = await _beside(state, take_stock)
        own = np.frombuffer(self._syncs.to_bytes(8, "big") + root_of(inventory), np.uint8)
        outcome, gathered = await self._group.all_gather(own, tag="state/roots")
        told = [row.tobytes() for row in gathered.reshape(len(outcome.contributors), -1)]
        chosen = _choose(told)
        behind = tuple(
            peer for peer, word in zip(outcome.contributors, told, strict=True) if word[8:] != chosen[8:]
        )
        holders = [peer for peer in outcome.contributors if peer not in behind]
        me = self._group.me
        if me in behind:
            await self._fetch(state, inventory, chosen[8:], holders)
        elif behind and me in holders[:SERVERS]:
            data = await _beside(state, _copy_of)
            self._copies[chosen[8:]] = _Copy(inventory, data)
            self._kept.unpark_all()
        self._syncs = int.from_bytes(chosen[:8], "big") + 1
        return Synced(me in behind, behind, outcome.contributors)

    async def agree(self, state: Mapping[str, Array]) -> Synced:
        """`sync`, by whoever was left out until it is in again. Raises as `sync`, `Fenced` apart."""
        while True:
            try:
                return await self.sync(state)
            except Fenced:  # it comes in again by itself, at the others' next border
                continue

    async def _fetch(
        self, state: Mapping[str, Array], own: Inventory, root: bytes, holders: list[PeerId]
    ) -> None:
        """Bring `state` to `root`, from all of the first holders at once."""
        servers = holders[:SERVERS]
        theirs = await self._fetch_inventory(root, servers)
        wanted = differing(own, theirs)
        todo = list(reversed(wanted))
        came: dict[tuple[int, int], bytes] = {}
        failures: dict[PeerId, str] = {}

        async def ask(peer: PeerId) -> None:
            while todo and peer not in failures:
                tensor, chunk = piece = todo.pop()
                try:
                    request = _Ask(root, tensor, chunk)
                    answer = await self._rpc.call(peer, self._get, request, deadline_s=CHUNK_S)
                    data = bytes(answer.data.data)
                    if digest(data) != theirs[tensor].digests[chunk]:
                        failures[peer] = f"{peer} sent a chunk that is not what its hash says"
                except MycelError as error:
                    failures.setdefault(peer, f"{peer}: {error}")
                if peer in failures:
                    todo.append(piece)
                    return
                came[piece] = data
                self.fetched_bytes += len(data)

        while len(came) < len(wanted):
            left = [peer for peer in servers if peer not in failures]
            if not left:
                raise StateLost("; ".join(failures.values()) or "nobody holds the group's state; sync again")
            async with trio.open_nursery() as nursery:
                for peer in left * ASKED:
                    nursery.start_soon(ask, peer)
        for (tensor, chunk), data in came.items():
            bytes_of(state[theirs[tensor].name])[span_of(chunk)] = data

    async def _fetch_inventory(self, root: bytes, servers: list[PeerId]) -> Inventory:
        failures = []
        for peer in servers:
            try:
                inventory = await self._rpc.call(peer, self._list, _Ask(root), deadline_s=CHUNK_S)
                if root_of(inventory) == root:
                    return inventory
                failures.append(f"{peer} sent an inventory that is not what its hash says")
            except MycelError as error:
                failures.append(f"{peer}: {error}")
        raise StateLost("; ".join(failures) or "nobody holds the group's state; sync again")

    async def _on_list(self, call: Call, ask: _Ask) -> Inventory:
        return (await self._copy(call.peer, ask.root)).inventory

    async def _on_get(self, call: Call, ask: _Ask) -> _Chunk:
        copy = await self._copy(call.peer, ask.root)
        if not 0 <= ask.tensor < len(copy.data) or ask.chunk < 0:
            raise Refused(f"no tensor {ask.tensor}, chunk {ask.chunk}", reason="unknown")
        data = memoryview(copy.data[ask.tensor])[span_of(ask.chunk)]
        return _Chunk(Tensor("uint8", (len(data),), data))

    async def _copy(self, peer: PeerId, root: bytes) -> _Copy:
        """The copy that `peer` asks for; it may be quicker at the border's end than this node is."""
        epoch = self._group.epoch
        if epoch is None or peer not in epoch.peers:
            raise Refused("only members of the group get its state", reason="access")
        with trio.move_on_after(CHUNK_S / 4):
            while root not in self._copies:
                await self._kept.park()
        if root not in self._copies:
            raise Refused("this state is not kept here any more; sync again", reason="gone")
        return self._copies[root]


def _choose(told: list[bytes]) -> bytes:
    """Whose state counts, of (syncs, root) as all members told them: the same answer on all."""
    latest = max(word[:8] for word in told)
    words = [word for word in told if word[:8] == latest]
    return max(dict.fromkeys(words), key=words.count)


def _copy_of(state: Mapping[str, Array]) -> list[bytes]:
    return [bytes(bytes_of(state[name])) for name in sorted(state)]


async def _beside(state: Mapping[str, Array], work: Callable[[Mapping[str, Array]], Result]) -> Result:
    """What `work` makes of `state`, without holding trio's thread up."""
    if sum(array.nbytes for array in state.values()) <= INLINE_BYTES:
        return work(state)
    return await trio.to_thread.run_sync(work, state)
