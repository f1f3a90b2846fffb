"""Groups to test: memberships in a bottle (a clock and a network of their own, which loses and doubles), and
whole stacks over the simulated mesh."""

from __future__ import annotations

import heapq
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import trio

from mycel.compute.collective.attempt import Attempt
from mycel.compute.collective.epoch import Epoch, Member, Message, Terms, place_of
from mycel.compute.collective.group import Membership
from mycel.compute.collective.ledger import Abandon, Begin, Entered, Left, Send, Settled
from mycel.compute.collective.mover import RingMover
from mycel.compute.collective.policy import Policy
from mycel.compute.collective.service import Group
from mycel.compute.collective.streams import StreamLanes
from mycel.protocol.errors import DialError
from mycel.protocol.limits import LaneLimits
from mycel.protocol.limits_group import GroupLimits
from mycel.protocol.mesh import PeerId
from mycel.protocol.rpc import Rpc
from mycel.simnet.mesh import MeshOptions, MeshWorld, SimMesh, mesh_world

LIMITS = GroupLimits()


@dataclass
class Node:
    """One peer: its membership, and what its mover and its caller have seen."""

    name: PeerId
    core: Membership
    began: dict[Attempt, Terms] = field(default_factory=dict)
    held: dict[Attempt, None] = field(default_factory=dict)
    ended: list[Settled] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    epochs: list[Epoch] = field(default_factory=list)
    passed: dict[bytes, None] = field(default_factory=dict)
    """Lineages whose successor it has entered, from within."""
    known: dict[tuple[bytes, str, int], None] = field(default_factory=dict)
    """Operations whose end it has seen."""
    alive: bool = True

    def last(self, tag: str) -> str:
        """How its latest call of `tag` ended, "" where none has."""
        return next((settled.ending for settled in reversed(self.ended) if settled.tag == tag), "")


class Bottle:
    """Nodes, and what is on its way between them. `checks` holds what must never happen."""

    def __init__(self, policy: Policy, seed: int = 0) -> None:
        self.policy = policy
        self.random = random.Random(seed)
        self.now = 0.0
        self.loss = self.doubling = 0.0
        self.delay = (0.01, 0.01)
        self.lag: dict[tuple[str, str], float] = {}
        """What messages from one to another take besides."""
        self.moves_at_once = True
        self.nodes: dict[PeerId, Node] = {}
        self.cut: set[frozenset[PeerId]] = set()
        self._queue: list[tuple[float, int, PeerId, PeerId, Message]] = []
        self._count = 0
        self.staged: dict[tuple[bytes, str, int], set[PeerId]] = {}
        self.kept: dict[tuple[bytes, str, int], str] = {}
        self.lines: dict[int, bytes] = {}
        self.members: dict[bytes, tuple[Member, ...]] = {}

    def start(self, name: str, *, founds: bool | None = None) -> Node:
        """A process starts, or starts again, knowing nothing; everybody it can reach is connected."""
        peer = PeerId(name)
        policy = self.policy
        if founds is not None:
            policy = Policy(policy.quorum, policy.admits, policy.least, founds)
        node = Node(peer, Membership("group", peer, self.random.randbytes, policy, LIMITS))
        self.nodes[peer] = node
        for other in list(self.nodes.values()):
            if other.alive and other.name != peer and frozenset((peer, other.name)) not in self.cut:
                node.core.up(self.now, other.name)
                other.core.up(self.now, peer)
                self.act(other)
        self.act(node)
        return node

    def kill(self, name: str) -> None:
        """The process dies; its peers see a reset, and dial it in vain."""
        node = self.nodes[PeerId(name)]
        node.alive = False
        for other in self.nodes.values():
            if other.alive and frozenset((node.name, other.name)) not in self.cut:
                other.core.down(self.now, node.name)
                other.core.miss(self.now, node.name)
                self.act(other)

    def hush(self, name: str) -> None:
        """The process stands still; its peers' connections end after a while, and dialling it does."""
        node = self.nodes[PeerId(name)]
        node.alive = False
        for other in self._alive():
            if frozenset((node.name, other.name)) not in self.cut:
                other.core.down(self.now, node.name, was_silent=True)
                self.act(other)

    def part(self, names: list[str]) -> None:
        """Cut these off from all others; what is on its way between them is lost."""
        side = {PeerId(name) for name in names}
        for a in self.nodes.values():
            for b in self.nodes.values():
                pair = frozenset((a.name, b.name))
                if a.name in side and b.name not in side and pair not in self.cut:
                    self.cut.add(pair)
                    for one, other in ((a, b), (b, a)):
                        if one.alive and other.alive:
                            one.core.down(self.now, other.name)
                            self.act(one)

    def heal(self) -> None:
        """Undo every cut."""
        cut, self.cut = sorted(self.cut, key=sorted), set()
        for pair in cut:
            a, b = (self.nodes[name] for name in sorted(pair))
            if a.alive and b.alive:
                a.core.up(self.now, b.name)
                b.core.up(self.now, a.name)
                self.act(a)
                self.act(b)

    def act(self, node: Node) -> None:
        """Do what the node wants done."""
        while actions := node.core.take():
            for action in actions:
                match action:
                    case Send(peer=peer, message=message):
                        self._send(node.name, peer, message)
                    case Begin(attempt=attempt, terms=terms):
                        node.began[attempt] = terms
                        if self.moves_at_once:
                            self.move(node, attempt)
                    case Abandon(attempt=attempt):
                        node.began.pop(attempt, None)
                        node.held.pop(attempt, None)
                    case Settled():
                        self._check_settled(node, action)
                        node.ended.append(action)
                    case Entered(epoch=epoch):
                        self._check_epoch(node, epoch)
                        node.epochs.append(epoch)
                    case Left(why=why):
                        node.left.append(why)

    def move(self, node: Node, attempt: Attempt) -> None:
        """The node's mover is done with an attempt."""
        del node.began[attempt]
        node.held[attempt] = None
        key = (attempt.lineage, attempt.tag, attempt.number)
        self.staged.setdefault(key, set()).add(node.name)  # before the vote goes out
        if not node.core.staged(self.now, attempt):
            node.held.pop(attempt, None)
        self.act(node)

    def break_off(self, node: Node, attempt: Attempt, peer: PeerId | None) -> None:
        """The node's mover fails."""
        del node.began[attempt]
        node.core.failed(self.now, attempt, peer, "broken by the test")
        self.act(node)

    def run(self, seconds: float) -> None:
        """Let time pass."""
        until = self.now + seconds
        ticks_now = 0
        while True:
            ticks = [(max(node.core.next_at, self.now), node.name) for node in self._alive()]
            tick = min(ticks, default=(until, PeerId("")))
            if min(tick[0], self._queue[0][0] if self._queue else until) >= until:
                self.now = until
                return
            if self._queue and self._queue[0][0] <= tick[0]:
                self.now, _, source, target, message = heapq.heappop(self._queue)
                node = self.nodes[target]
                if node.alive and self.nodes[source].alive and frozenset((source, target)) not in self.cut:
                    node.core.receive(self.now, source, message)
                    self.act(node)
            else:
                ticks_now = ticks_now + 1 if tick[0] == self.now else 0
                assert ticks_now < 100, "it would be called again at once, for ever"
                self.now = tick[0]
                node = self.nodes[tick[1]]
                node.core.tick(self.now)
                self.act(node)

    def _alive(self) -> list[Node]:
        return [node for node in self.nodes.values() if node.alive]

    def _send(self, source: PeerId, target: PeerId, message: Message) -> None:
        copies = 0 if self.random.random() < self.loss else 1
        copies += self.random.random() < self.doubling
        if target not in self.nodes:
            return
        for _ in range(copies):
            self._count += 1
            when = self.now + self.random.uniform(*self.delay) + self.lag.get((source, target), 0.0)
            heapq.heappush(self._queue, (when, self._count, source, target, message))

    def _check_settled(self, node: Node, settled: Settled) -> None:
        attempt = settled.attempt
        key = (attempt.lineage, attempt.tag, attempt.number)
        if self.policy.quorum == "majority":
            assert self.kept.setdefault(key, settled.ending) == settled.ending, f"two ends of {key}"
            for other in self.nodes.values():
                assert key[0] not in other.passed or key in other.known, f"{other.name} knows no end of {key}"
        node.known[key] = None
        if settled.ending == "kept" and not attempt.tag.startswith(("barrier", "border")):
            assert attempt in node.held, "kept what is not held"
            del node.held[attempt]

    def _check_epoch(self, node: Node, epoch: Epoch) -> None:
        before = self.members.get(epoch.parent, ())
        self.members[place_of(epoch).lineage] = epoch.members
        staying = {member.peer for member in epoch.members if member in before}
        for verdict in epoch.verdicts:
            if verdict.ending == "kept" and not verdict.tag.startswith(("barrier", "border")):
                key = (epoch.parent, verdict.tag, verdict.number)
                assert staying <= self.staged[key], (
                    f"{sorted(staying)} kept {verdict}, only {sorted(self.staged[key])} hold it"
                )
        if self.policy.quorum == "majority":
            if node.epochs and place_of(node.epochs[-1]).lineage == epoch.parent:
                node.passed[epoch.parent] = None
                for key in self.kept:
                    assert key[0] != epoch.parent or key in node.known, f"{node.name} knows no end of {key}"
            lineage = place_of(epoch).lineage
            assert self.lines.setdefault(epoch.number, lineage) == lineage, f"two epochs {epoch.number}"


@pytest.fixture
def bottle_of() -> type[Bottle]:
    """Make a bottle: `bottle_of(policy, seed)`."""
    return Bottle


def terms_of(tag: str, items: int) -> Terms:
    if tag.startswith(("barrier", "border")):
        return Terms("barrier" if tag.startswith("barrier") else "border")
    return Terms("all_reduce", "float32", items, "avg")


class Script:
    """Plays lines of text in a bottle: see test_group.py."""

    def __init__(self, bottle: Any) -> None:
        self.bottle = bottle

    def play(self, text: str) -> None:
        for line in text.strip().splitlines():
            words = line.split("#")[0].split()
            if words:
                try:
                    getattr(self, f"do_{words[0]}")(*words[1:])
                except AssertionError as error:
                    raise AssertionError(f"{line.strip()!r} at {self.bottle.now:.2f} s: {error}") from error

    def node(self, name: str) -> Any:
        return self.bottle.nodes[PeerId(name)]

    def do_start(self, *names: str) -> None:
        for name in names:
            node = self.bottle.start(name)
            node.core.join(self.bottle.now)
            self.bottle.act(node)

    def do_follow(self, *names: str) -> None:
        for name in names:
            node = self.bottle.start(name, founds=False)
            node.core.join(self.bottle.now)
            self.bottle.act(node)

    def do_call(self, what: str, *names: str) -> None:
        tag, _, items = what.partition("/")
        for name in names:
            node = self.node(name)
            assert not node.core.is_open(tag), f"{name} has called {tag} already"
            node.core.call(self.bottle.now, tag, terms_of(tag, int(items or 8)))
            self.bottle.act(node)

    def do_run(self, seconds: str) -> None:
        self.bottle.run(float(seconds))

    def do_kill(self, *names: str) -> None:
        for name in names:
            self.bottle.kill(name)

    def do_hush(self, *names: str) -> None:
        for name in names:
            self.bottle.hush(name)

    def do_part(self, *names: str) -> None:
        self.bottle.part(list(names))

    def do_cut(self, one: str, other: str) -> None:
        """Between these two alone."""
        self.bottle.cut.add(frozenset((PeerId(one), PeerId(other))))
        for name, lost in ((one, other), (other, one)):
            self.node(name).core.down(self.bottle.now, PeerId(lost))
            self.bottle.act(self.node(name))

    def do_heal(self) -> None:
        self.bottle.heal()

    def do_leave(self, name: str) -> None:
        self.node(name).core.leave()
        self.bottle.act(self.node(name))

    def do_hold(self) -> None:
        self.bottle.moves_at_once = False

    def attempt(self, name: str, tag: str) -> Any:
        return next(attempt for attempt in self.node(name).began if attempt.tag == tag)

    def do_move(self, tag: str, *names: str) -> None:
        for name in names:
            self.bottle.move(self.node(name), self.attempt(name, tag))

    def do_break(self, name: str, tag: str, *peer: str) -> None:
        suspect = PeerId(peer[0]) if peer else None
        self.bottle.break_off(self.node(name), self.attempt(name, tag), suspect)

    def do_give_up(self, name: str, tag: str) -> None:
        self.node(name).core.withdraw(self.bottle.now, tag, f"{name} gave up")
        self.bottle.act(self.node(name))

    def do_epoch(self, number: str, *names: str) -> None:
        for name in names:
            epoch = self.node(name).core.epoch
            assert epoch is not None, f"{name} is outside"
            assert (epoch.number, sorted(epoch.peers)) == (int(number), sorted(names)), f"{name}: {epoch}"

    def do_together(self, *names: str) -> None:
        epochs = [self.node(name).core.epoch for name in names]
        assert None not in epochs, epochs
        assert epochs.count(epochs[0]) == len(epochs), epochs
        assert sorted(epochs[0].peers) == sorted(names), epochs[0]

    def do_out(self, *names: str) -> None:
        for name in names:
            assert self.node(name).core.epoch is None, f"{name} is in {self.node(name).core.epoch}"

    def do_ended(self, tag: str, ending: str, *names: str) -> None:
        for name in names:
            assert self.node(name).last(tag) == ending, f"{name}: {self.node(name).ended}"
            assert not self.node(name).core.is_open(tag), f"{name} has another one open"

    def do_open(self, tag: str, *names: str) -> None:
        for name in names:
            assert self.node(name).core.is_open(tag), f"{name}: {self.node(name).ended}"


class Peer:
    """One process: a mesh, calls, lanes, a mover, a group."""

    def __init__(self, world: MeshWorld, mesh: SimMesh, policy: Policy) -> None:
        self.world = world
        self.mesh = mesh
        self.rpc = Rpc(mesh)
        self.lanes = StreamLanes(mesh)
        self.mover = RingMover(mesh, self.lanes, limits=LaneLimits())
        self.group = Group(mesh, self.rpc, self.mover, "demo", policy)
        self.scopes: list[trio.CancelScope] = []
        self.is_running = trio.Event()

    def scope(self) -> trio.CancelScope:
        """What runs in this process runs in one of these."""
        self.scopes.append(trio.CancelScope())
        return self.scopes[-1]

    def stop(self) -> None:
        """End the process in order."""
        for scope in self.scopes:
            scope.cancel()

    @property
    def number(self) -> int:
        return self.mesh.index + 1

    async def run(self, others: list[SimMesh]) -> None:
        with self.scope():
            async with trio.open_nursery() as nursery:
                await nursery.start(self.rpc.run)
                await nursery.start(self.lanes.run)
                await nursery.start(self.mover.run)
                for other in others:
                    with suppress(DialError):  # it has died meanwhile
                        await self.mesh.connect(other.listen_addrs)
                await nursery.start(self.group.run)
                self.is_running.set()
                await trio.sleep_forever()

    def kill(self) -> None:
        self.world.kill(self.mesh)
        self.stop()

    def array(self, items: int = 1000) -> Any:
        return np.full(items, float(self.number), np.float32)


class Swarm:
    """Peers of one world."""

    def __init__(self, world: MeshWorld, nursery: trio.Nursery) -> None:
        self.world = world
        self.nursery = nursery
        self.peers: list[Peer] = []

    def start(self, policy: Policy = Policy(), again: Peer | None = None) -> Peer:
        mesh = self.world.add() if again is None else self.world.restart(again.mesh)
        peer = Peer(self.world, mesh, policy)
        others = [other.mesh for other in self.peers if other.mesh.is_alive and other.mesh is not mesh]
        self.peers.append(peer)
        self.nursery.start_soon(peer.run, others)
        return peer

    def calls_of(self, peers: Sequence[Any], method: str) -> list[int]:
        """How many calls of a method each has answered."""
        return [peer.peer.rpc.calls.get(method, 0) for peer in peers]

    async def gather(self, count: int, policy: Policy = Policy()) -> list[Peer]:
        peers = [self.start(policy) for _ in range(count)]
        for peer in peers:
            await peer.group.gather_members(count)
        return peers


@asynccontextmanager
async def open_swarm(**options: Any) -> AsyncIterator[Swarm]:
    async with (
        mesh_world(MeshOptions(latency_s_max=0.02, **options)) as world,
        trio.open_nursery() as nursery,
    ):
        yield Swarm(world, nursery)
        nursery.cancel_scope.cancel()


@pytest.fixture
def swarm() -> Callable[..., AbstractAsyncContextManager[Swarm]]:
    """Opens a swarm: `async with swarm(bytes_per_s=1e7) as world`, under `mycel.simnet.clock.run`."""
    return open_swarm


@pytest.fixture
def script_of() -> type[Script]:
    """Play scripts in a bottle: `script_of(bottle).play(text)`."""
    return Script
