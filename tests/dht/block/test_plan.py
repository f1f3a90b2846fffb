"""The plan: who is asked for what. A small world of peers plays against it, by the thousand."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mycel.dht.block.manifest import Want
from mycel.dht.block.plan import ASKERS_MAX, Ask, Plan, TakeBack
from mycel.protocol.cid import Cid, cid_of
from mycel.protocol.limits import DEFAULT_BLOCK_LIMITS, BlockLimits
from mycel.protocol.mesh import PeerId

SIZE = 1 << 20
A, B, C = PeerId("a"), PeerId("b"), PeerId("c")


def blocks(count: int) -> list[Cid]:
    return [cid_of(n.to_bytes(4, "big")) for n in range(count)]


def plan_of(cids: Sequence[Cid], seed: bytes = b"", **limits: float) -> Plan:
    return Plan([Want(cid, SIZE) for cid in cids], seed, BlockLimits(**limits))


def cids_of(asks: Sequence[Ask], peer: PeerId) -> list[Cid]:
    return [ask.cid for ask in asks if ask.peer == peer]


def test_the_rarest_goes_first() -> None:
    cids = blocks(6)
    plan = plan_of(cids, ahead_bytes_min=SIZE)
    for peer, has in ((A, cids), (B, cids[:5]), (C, cids[:4])):
        plan.add(peer)
        plan.on_have(peer, has)
    asks = plan.asks(0.0)
    assert cids_of(asks, A) == [cids[5]]
    assert cids_of(asks, B) == [cids[4]]
    assert cids_of(asks, C)[0] in cids[:4]


def test_news_of_more_holders_changes_the_order() -> None:
    cids = blocks(2)
    plan = plan_of(cids, ahead_bytes_min=SIZE)
    first = cids_of(_asks_of_one(plan_of(cids, ahead_bytes_min=SIZE), cids), A)[0]
    other = next(cid for cid in cids if cid != first)
    plan.add(A)
    plan.on_have(A, cids)
    plan.add(B)
    plan.on_time(0.0)
    plan.on_have(B, [first])
    plan.drop(C)
    assert cids_of(plan.asks(0.0), A) == [other]


def _asks_of_one(plan: Plan, cids: Sequence[Cid]) -> list[Ask]:
    plan.add(A)
    plan.on_have(A, cids)
    return plan.asks(0.0)


def test_nodes_draw_different_orders() -> None:
    cids = blocks(50)
    orders = [cids_of(_asks_of_one(plan_of(cids, seed), cids), A) for seed in (b"x", b"y")]
    assert orders[0] != orders[1]
    assert orders[0] == cids_of(_asks_of_one(plan_of(cids, b"x"), cids), A)


def test_a_peer_is_asked_as_far_ahead_as_it_is_fast() -> None:
    cids = blocks(300)
    plan = plan_of(cids)
    asks = _asks_of_one(plan, cids)
    assert len(asks) == DEFAULT_BLOCK_LIMITS.ahead_bytes_min // SIZE
    now = 0.0
    for _ in range(40):  # 50 MiB/s
        now += 0.02
        plan.on_arrival(A, asks[0].cid, now)
        plan.on_stored(asks.pop(0).cid)
        asks += plan.asks(now)
    assert plan.rate(A) == pytest.approx(50 * SIZE, rel=0.05)
    assert len(asks) == pytest.approx(50 * DEFAULT_BLOCK_LIMITS.ahead_s, abs=3)
    for _ in range(20):  # in bursts of four
        now += 0.08
        for _ in range(4):
            plan.on_arrival(A, asks[0].cid, now)
            plan.on_stored(asks.pop(0).cid)
        asks += plan.asks(now)
    assert plan.rate(A) == pytest.approx(50 * SIZE, rel=0.1)


def test_a_silent_peers_blocks_are_asked_of_others_and_it_gets_no_more() -> None:
    cids = blocks(4)
    plan = plan_of(cids)
    _asks_of_one(plan, cids)
    assert plan.seconds_to_stall(1.0) == DEFAULT_BLOCK_LIMITS.stall_s - 1.0
    plan.add(B)
    plan.on_have(B, cids)
    assert plan.asks(1.0) == []
    plan.on_time(DEFAULT_BLOCK_LIMITS.stall_s)
    asks = plan.asks(DEFAULT_BLOCK_LIMITS.stall_s)
    assert sorted(cids_of(asks, B)) == sorted(cids)
    assert cids_of(asks, A) == []
    plan.on_arrival(A, cids[0], 11.0)  # it was only slow
    assert plan.on_stored(cids[0]) == [TakeBack(B, cids[0])]


def test_the_last_block_is_asked_of_a_faster_peer_too() -> None:
    cids = blocks(12)
    plan = plan_of(cids, ahead_bytes_min=2 * SIZE)
    for peer in (A, B):
        plan.add(peer)
        plan.on_have(peer, cids)
    asks = plan.asks(0.0)
    slow = cids_of(asks, A)
    now = 0.0
    while queue := cids_of(asks, B):
        now += 0.1
        plan.on_arrival(B, queue[0], now)
        backs = plan.on_stored(queue[0])
        asks = [ask for ask in asks if ask.cid != queue[0]] + plan.asks(now)
        assert all(back.peer == A and back.cid in slow for back in backs)
    assert plan.is_done


def test_a_corrupt_block_drops_its_sender() -> None:
    cids = blocks(3)
    plan = plan_of(cids)
    asks = _asks_of_one(plan, cids)
    plan.on_arrival(A, asks[0].cid, 1.0)
    plan.on_corrupt(A, asks[0].cid)
    plan.on_have(A, cids)
    assert plan.asks(2.0) == []
    assert plan.sources == 0
    plan.add(B)
    plan.on_have(B, cids)
    assert sorted(cids_of(plan.asks(2.0), B)) == sorted(cids)


def test_a_spare_copy_is_asked_for_again_when_the_first_was_corrupt() -> None:
    cids = blocks(1)
    plan = plan_of(cids, stall_s=1.0)
    assert _asks_of_one(plan, cids) == [Ask(A, cids[0])]
    plan.add(B)
    plan.on_have(B, cids)
    plan.on_time(1.0)
    assert plan.asks(1.0) == [Ask(B, cids[0])]
    plan.on_arrival(A, cids[0], 1.5)
    plan.on_arrival(B, cids[0], 1.6)
    plan.on_spare(B, cids[0])
    plan.on_corrupt(A, cids[0])
    assert plan.asks(2.0) == [Ask(B, cids[0])]


class World:
    """Peers with some of the blocks, at random: honest ones, liars, mutes, and those that leave."""

    def __init__(self, chance: random.Random, peers: int, count: int) -> None:
        self.chance = chance
        self.cids = blocks(count)
        self.plan = plan_of(self.cids, seed=chance.randbytes(4))
        self.peers = [PeerId(f"p{n}") for n in range(peers)]
        self.kind = {
            peer: chance.choice(["honest", "honest", "liar", "mute", "leaver"]) for peer in self.peers
        }
        self.kind[self.peers[0]] = "honest"
        self.owed: dict[PeerId, list[Cid]] = {}
        self.said: dict[PeerId, list[Cid]] = {}
        self.now = 0.0
        self.stored: list[Cid] = []
        for peer in self.peers:
            self.plan.add(peer)
            self.say(
                peer,
                self.cids if peer == self.peers[0] else chance.sample(self.cids, chance.randint(0, count)),
            )

    def say(self, peer: PeerId, cids: list[Cid]) -> None:
        self.said[peer] = cids
        self.owed[peer] = []
        self.plan.on_have(peer, cids)

    def drop(self, peer: PeerId) -> None:
        self.plan.drop(peer)
        self.owed.pop(peer)

    def ask(self) -> None:
        askers: dict[Cid, int] = {}
        for ask in self.plan.asks(self.now):
            assert ask.cid in self.said[ask.peer], "asked for what it did not say it has"
            assert ask.cid not in self.owed[ask.peer], "asked twice"
            assert ask.cid not in self.stored, "asked for what is here"
            self.owed[ask.peer].append(ask.cid)
        for peer, owed in self.owed.items():
            assert len(owed) * SIZE <= max(
                2 * DEFAULT_BLOCK_LIMITS.ahead_bytes_min, DEFAULT_BLOCK_LIMITS.ahead_bytes_max
            )
            for cid in owed:
                askers[cid] = askers.get(cid, 0) + (self.kind[peer] != "mute")
        assert all(count <= ASKERS_MAX + 1 for count in askers.values())

    def step(self) -> None:
        """Somebody answers, or time passes."""
        self.ask()
        able = [peer for peer, owed in self.owed.items() if owed and self.kind[peer] != "mute"]
        if not able:
            self.now += DEFAULT_BLOCK_LIMITS.stall_s
            self.plan.on_time(self.now)
            return
        peer = self.chance.choice(able)
        self.now += self.chance.random()
        self.plan.on_time(self.now)
        cid = self.owed[peer].pop(self.chance.randrange(len(self.owed[peer])))
        assert self.plan.was_asked(peer, cid)
        if self.kind[peer] == "leaver" and self.chance.random() < 0.3:
            self.drop(peer)
        elif self.kind[peer] == "liar" and self.chance.random() < 0.5:
            self.plan.on_arrival(peer, cid, self.now)
            self.plan.on_corrupt(peer, cid)
            self.owed.pop(peer)
        elif peer != self.peers[0] and self.chance.random() < 0.1:
            self.plan.on_gone(peer, cid)
            self.said[peer] = [other for other in self.said[peer] if other != cid]
        else:
            self.plan.on_arrival(peer, cid, self.now)
            if self.plan.is_wanted(cid):
                self.stored.append(cid)
                for back in self.plan.on_stored(cid):
                    assert back.cid in self.owed[back.peer]


@given(st.integers(0, 1 << 32), st.integers(1, 6), st.integers(0, 60))
def test_as_long_as_one_honest_peer_has_it_all_everything_comes_once(
    seed: int, peers: int, count: int
) -> None:
    world = World(random.Random(seed), peers, count)
    for _ in range(20 * count + 100):
        if world.plan.is_done:
            break
        world.step()
    assert world.plan.is_done, f"{len(world.plan.left)} left"
    assert sorted(world.stored) == sorted(world.cids)
