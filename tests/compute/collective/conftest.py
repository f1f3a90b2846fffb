"""Groups in a bottle: memberships with a clock and a network of their own, which loses and doubles."""

from __future__ import annotations

import heapq
import random
from dataclasses import dataclass, field

import pytest

from mycel.compute.collective.attempt import Attempt
from mycel.compute.collective.epoch import Epoch, Member, Message, Terms, place_of
from mycel.compute.collective.group import Membership, Policy
from mycel.compute.collective.ledger import Abandon, Begin, Entered, Left, Send, Settled
from mycel.protocol.limits_group import GroupLimits
from mycel.protocol.mesh import PeerId

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
        """The process dies; its peers see a reset."""
        node = self.nodes[PeerId(name)]
        node.alive = False
        for other in self.nodes.values():
            if other.alive and frozenset((node.name, other.name)) not in self.cut:
                other.core.down(self.now, node.name)
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
            when = self.now + self.random.uniform(*self.delay)
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
