"""Leases: whatever is lost, delayed or restarted, and however clocks run, nothing has two holders."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mycel.node.jobs.lease import (
    Answer,
    Ballot,
    Elector,
    Lease,
    Promise,
    Prospect,
    Vote,
    check_lease,
    vote_bytes,
)
from mycel.node.jobs.spec import Job, read_spec
from mycel.protocol.errors import Refused
from mycel.protocol.limits_jobs import JobLimits
from mycel.protocol.mesh import PeerId

LIMITS = JobLimits(drift=0.2)
"""Clocks that are far worse than real ones, so that what depends on them shows."""
JOB = "j" * 32


class World:
    """Electors that are candidates too, with clocks of their own, over a network that loses and delays."""

    def __init__(self, seed: int, count: int, loss: float) -> None:
        self.random = random.Random(seed)
        self.loss = loss
        self.peers = [PeerId(f"p{number}") for number in range(count)]
        drift = LIMITS.drift
        self.rate = {peer: self.random.uniform(1 - drift, 1 + drift) for peer in self.peers}
        self.offset = {peer: self.random.uniform(-1e6, 1e6) for peer in self.peers}
        self.disk: dict[PeerId, dict[str, Promise]] = {peer: {} for peer in self.peers}
        self.now = 0.0
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count()
        self.lives = dict.fromkeys(self.peers, 0)
        self.electors = {peer: Elector({}, self.clock(peer), LIMITS) for peer in self.peers}
        self.holder: dict[int, PeerId] = {}
        self.tenures: list[tuple[float, int, PeerId]] = []
        """From when, which epoch, whose."""
        self.held: dict[PeerId, tuple[int, Callable[[], bool]]] = {}
        self.held_s = 0.0
        self.cut: dict[PeerId, None] = {}
        """Who is off the net."""

    def clock(self, peer: PeerId) -> float:
        return self.offset[peer] + self.now * self.rate[peer]

    def at(self, delay_s: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._queue, (self.now + delay_s, next(self._count), act))

    def local(self, peer: PeerId, delay_s: float, act: Callable[[], None]) -> None:
        """After so long by the peer's clock, if it is not restarted meanwhile."""
        life = self.lives[peer]
        self.at(delay_s / self.rate[peer], lambda: act() if self.lives[peer] == life else None)

    def run(self, until: float) -> None:
        while self._queue and self._queue[0][0] < until:
            before = self.now
            self.now, _, act = heapq.heappop(self._queue)
            holders = [peer for peer, (_, is_held) in self.held.items() if is_held()]
            assert len(holders) <= 1, f"{holders} hold the lease at {self.now}"
            self.held_s += (self.now - before) * len(holders)
            act()

    def send(self, one: PeerId, other: PeerId, act: Callable[[], None]) -> None:
        is_lost = one != other and (one in self.cut or other in self.cut or self.random.random() < self.loss)
        if not is_lost:
            self.at(self.random.expovariate(20), act)

    def part(self, peer: PeerId) -> None:
        """Off the net, or on it again."""
        if self.cut.pop(peer, peer) is not None:
            self.cut[peer] = None

    def restart(self, peer: PeerId) -> None:
        """The process dies: only what is on its disk is left, and its clock begins anew."""
        self.lives[peer] += 1
        self.held.pop(peer, None)
        self.offset[peer] = self.random.uniform(-1e6, 1e6)
        self.electors[peer] = Elector(self.disk[peer], self.clock(peer), LIMITS)
        self.start(peer)

    def start(self, peer: PeerId) -> None:
        prospect = Prospect(self.peers, self.peers.index(peer), LIMITS)
        self.local(peer, prospect.rank * LIMITS.stand_s, lambda: self.stand(peer, prospect))

    def ask(self, peer: PeerId, ballot: Ballot, method: str, heard: Callable[[PeerId, Answer], None]) -> None:
        life = self.lives[peer]
        asked_at = self.clock(peer)

        def deliver(elector: PeerId) -> None:
            act = getattr(self.electors[elector], method)
            answer = act(JOB, ballot.epoch, peer, self.clock(elector))
            self.disk[elector] = dict(self.electors[elector].promises)
            self.send(elector, peer, lambda: hear(elector, answer))

        def hear(elector: PeerId, answer: Answer) -> None:
            if self.lives[peer] != life:
                return
            if answer.granted:
                ballot.granted(elector, asked_at)
            else:
                ballot.denied(elector)
            heard(elector, answer)

        for elector in self.peers:
            self.send(peer, elector, lambda elector=elector: deliver(elector))

    def stand(self, peer: PeerId, prospect: Prospect) -> None:
        ballot = Ballot(self.peers, prospect.next_epoch(), LIMITS)
        denials: dict[PeerId, Answer] = {}
        state = {"won": False}

        def heard(elector: PeerId, answer: Answer) -> None:
            if not answer.granted:
                denials[elector] = answer
            if not state["won"] and ballot.until > self.clock(peer):
                state["won"] = True
                self.win(peer, ballot, prospect)

        def close() -> None:
            if state["won"]:
                return
            state["won"] = True  # too late now
            for elector in ballot.promised:
                self.send(peer, elector, lambda e=elector: self.release(e, peer, ballot.epoch))
            self.local(peer, prospect.pause_s(denials), lambda: self.stand(peer, prospect))

        self.ask(peer, ballot, "ask", heard)
        self.local(peer, LIMITS.call_s, close)

    def release(self, elector: PeerId, peer: PeerId, epoch: int) -> None:
        self.electors[elector].release(JOB, epoch, peer, self.clock(elector))

    def win(self, peer: PeerId, ballot: Ballot, prospect: Prospect) -> None:
        assert self.holder.setdefault(ballot.epoch, peer) == peer, f"epoch {ballot.epoch} has two holders"
        prospect.note(ballot.epoch)
        life = self.lives[peer]
        is_held = lambda: self.lives[peer] == life and self.clock(peer) < ballot.until  # noqa: E731
        self.tenures.append((self.now, ballot.epoch, peer))
        self.held[peer] = (ballot.epoch, is_held)

        def renew() -> None:
            if is_held():
                self.ask(peer, ballot, "renew", lambda elector, answer: None)
                self.local(peer, LIMITS.renew_s, renew)
            else:
                self.local(peer, prospect.pause_s({}), lambda: self.stand(peer, prospect))

        renew()


def holder_of(world: World) -> int:
    """The place of whoever holds the lease, else the first."""
    held = [peer for peer, (_, is_held) in world.held.items() if is_held()]
    return world.peers.index(held[0]) if held else 0


@settings(max_examples=100)
@given(
    seed=st.integers(0, 1 << 32),
    count=st.sampled_from([1, 3, 5]),
    loss=st.sampled_from([0.0, 0.1, 0.5]),
    faults=st.lists(
        st.tuples(st.floats(0.1, 20), st.sampled_from(["restart", "part", "part holder", "restart others"])),
        max_size=10,
    ),
)
def test_no_epoch_and_no_moment_has_two_holders_and_epochs_rise(seed, count, loss, faults):
    world = World(seed, count, loss)
    for peer in world.peers:
        world.start(peer)

    def fail(kind: str) -> None:
        place = holder_of(world) if "holder" in kind or "others" in kind else world.random.randrange(count)
        if kind.startswith("part"):
            world.part(world.peers[place])
        elif kind == "restart":
            world.restart(world.peers[place])
        else:
            for peer in [peer for number, peer in enumerate(world.peers) if number != place]:
                world.restart(peer)

    for when, kind in faults:
        world.at(when, lambda kind=kind: fail(kind))
    world.run(30.0)
    epochs = [epoch for _, epoch, _ in world.tenures]
    assert epochs == sorted(epochs)
    assert len(epochs) == len(dict.fromkeys(epochs))
    if loss < 0.5 and not any(kind.startswith("part") for _, kind in faults):
        assert world.held_s > 5.0


def test_a_coordinator_that_is_cut_off_has_stopped_when_electors_that_started_anew_promise_another():
    for seed in range(40):
        world = World(seed, 3, 0.0)
        for peer in world.peers:
            world.start(peer)
        world.at(5.0, lambda world=world: world.part(world.peers[holder_of(world)]))
        if seed % 2:
            for number in (1, 2):
                world.at(5.1, lambda world=world, number=number: world.restart(world.peers[number]))
        world.run(25.0)
        assert len(world.tenures) >= 2
        assert world.tenures[1][0] - 5.0 >= LIMITS.lease_s / (1 + LIMITS.drift) - LIMITS.renew_s


def test_a_dead_coordinator_is_replaced_two_seconds_later_and_without_faults_nobody_else_coordinates():
    world = World(1, 5, 0.0)
    for peer in world.peers:
        world.start(peer)
    world.run(20.0)
    assert [(epoch, peer) for _, epoch, peer in world.tenures] == [(1, "p0")]
    world.lives[world.peers[0]] += 1  # it dies, and stays dead as a candidate
    world.run(30.0)
    assert len(world.tenures) == 2
    assert 20.0 < world.tenures[1][0] < 20.0 + LIMITS.lease_s * 2 + 3 * LIMITS.stand_s


def test_an_elector_promises_an_epoch_once_and_waits_a_whole_lease_after_a_restart():
    elector = Elector({}, 0.0, LIMITS)
    assert elector.ask(JOB, 3, PeerId("a"), 1.0).granted
    assert not elector.ask(JOB, 3, PeerId("a"), 1.5).granted, "it may have died and forgotten"
    denied = elector.ask(JOB, 4, PeerId("b"), 2.0)
    assert (denied.granted, denied.epoch, denied.holder) == (False, 3, "a")
    assert denied.wait_s == pytest.approx(1.0)
    again = Elector(elector.promises, 100.0, LIMITS)
    assert not again.ask(JOB, 4, PeerId("b"), 101.9).granted
    assert again.renew(JOB, 3, PeerId("a"), 101.9).granted
    assert not again.ask(JOB, 3, PeerId("b"), 200.0).granted, "an old epoch, though its promise is over"
    assert again.ask(JOB, 4, PeerId("b"), 200.0).granted
    assert not again.renew(JOB, 3, PeerId("a"), 200.0).granted
    again.release(JOB, 3, PeerId("a"), 200.0)
    assert not again.ask(JOB, 5, PeerId("c"), 200.0).granted, "a release by who holds it no longer"
    again.release(JOB, 4, PeerId("b"), 200.0)
    assert again.ask(JOB, 5, PeerId("c"), 200.0).granted
    assert not again.ask(JOB, LIMITS.epoch_max + 1, PeerId("c"), 200.0).granted


def test_a_slow_clocks_holder_stops_before_a_fast_clocks_elector_promises_another():
    ballot = Ballot([PeerId("a")], 1, LIMITS)
    ballot.granted(PeerId("a"), 100.0)
    held_s = (ballot.until - 100.0) / (1 - LIMITS.drift)
    assert 0.5 * LIMITS.lease_s < held_s <= LIMITS.lease_s / (1 + LIMITS.drift) + 1e-9


def test_a_lease_proves_itself_by_signatures_of_a_majority_of_the_jobs_electors():
    electors = tuple(PeerId(name) for name in "abc")
    spec = read_spec({"kind": "generate", "model": "m", "prompts": "p.txt"})
    job = Job(JOB, PeerId("s"), 0.0, electors, "generate", spec, {})

    def sign(elector: str, epoch: int = 7, holder: str = "a") -> Vote:
        return Vote(elector, f"{elector} says ".encode() + vote_bytes(JOB, epoch, PeerId(holder)))

    def verify(peer: PeerId, data: bytes, signature: bytes) -> bool:
        return signature == f"{peer} says ".encode() + data

    check_lease(Lease(JOB, 7, "a", (sign("a"), sign("c"))), job, verify)
    forged = [
        Lease(JOB, 7, "a", (sign("a"), sign("a"))),
        Lease(JOB, 7, "a", (sign("a"), sign("x"), sign("y"))),
        Lease(JOB, 8, "a", (sign("a"), sign("b"))),
        Lease(JOB, 7, "b", (sign("a"), sign("b"))),
        Lease(JOB, 7, "x", (sign("a", 7, "x"), sign("b", 7, "x"))),
        Lease("k" * 32, 7, "a", (sign("a"), sign("b"))),
    ]
    for lease in forged:
        with pytest.raises(Refused) as refused:
            check_lease(lease, job, verify)
        assert refused.value.reason == "unproven"
