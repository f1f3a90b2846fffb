"""Lookups in networks of numbers: any order of answers, the silent, the late, and liars."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from mycel.dht.kad.key import key_of
from mycel.dht.kad.lookup import Lookup
from mycel.dht.kad.table import Table
from mycel.protocol.limits import KadLimits

LIMITS = KadLimits(bucket=8, quorum=5)
ASKER = 0


class World:
    """Peers with true tables, asked in an order drawn from a seed. Time is counted in late questions."""

    def __init__(self, contact, size, silent=(), liars=None, seed=0):
        self.contact, self.rng = contact, random.Random(seed)
        self.size, self.silent, self.liars = size, silent, liars or {}
        order = list(range(1, size))
        self.rng.shuffle(order)
        self.tables = {}
        for number in range(size):
            self.tables[number] = Table(contact(number).peer, LIMITS)
            for other in order:
                self.tables[number].on_alive(contact(other), "", 0.0)
        self.number = {contact(number).peer: number for number in range(size)}
        self.now = 0.0
        self.lates = 0

    def lookup(self, name, width=8, seeds=3):
        target = key_of(name)
        return Lookup(
            target, self.contact(ASKER).peer, self.tables[ASKER].closest(target, seeds), LIMITS, width
        )

    def run(self, lookup):
        out = []
        for _ in range(10_000):
            for contact in lookup.plan(self.now):
                lookup.asked(contact.peer, self.now + 1.0)
                out.append(contact)
            assert len(out) <= LIMITS.questions
            if lookup.is_done:
                return lookup.nearest()
            answering = [one for one in out if self.number.get(one.peer, -1) not in (-1, *self.silent)]
            if answering:
                one = self.rng.choice(answering)
                out.remove(one)
                number = self.number[one.peer]
                near = self.tables[number].closest(lookup.target, LIMITS.bucket)
                lookup.answered(one.peer, self.liars.get(number, near))
            else:
                assert lookup.late_next < float("inf"), "it waits for nothing"
                self.now = lookup.late_next
                self.lates += 1
        raise AssertionError("the lookup does not end")

    def truth(self, lookup, count):
        alive = [self.contact(n) for n in range(1, self.size) if n not in self.silent]
        return sorted(alive, key=lambda one: one.key ^ lookup.target)[:count]


@settings(deadline=None, max_examples=25)
@given(st.binary(max_size=4), st.integers(0, 99), st.integers(2, 60))
def test_it_finds_the_nearest_whatever_the_order_of_answers(contact, name, seed, size):
    world = World(contact, size, seed=seed)
    lookup = world.lookup(name)
    assert world.run(lookup) == world.truth(lookup, 8)


@settings(deadline=None, max_examples=25)
@given(st.binary(max_size=4), st.integers(0, 99), st.sets(st.integers(1, 44), max_size=15))
def test_the_silent_cost_a_few_lates_and_nobody_is_missed(contact, name, seed, silent):
    world = World(contact, 45, silent=silent, seed=seed)
    lookup = world.lookup(name, width=5, seeds=20)
    found = world.run(lookup)
    alive = world.truth(lookup, 5)
    assert len(set(found) & set(alive)) >= 4, "tables hold a few of the silent instead of the living"
    assert world.lates <= len(silent)


def asked_in_a_world_with_a_liar(contact, paths):
    """Who answers when the first peer asked names only friends right next to the key, who do the same."""
    size, name = 40, b"sought"
    target = key_of(name)
    limits = KadLimits(bucket=8, quorum=5, paths=paths)
    friends = sorted(map(contact, range(1000, 3000)), key=lambda one: one.key ^ target)[: limits.bucket]
    world = World(contact, size)
    seeds = world.tables[ASKER].closest(target, 3)
    lookup = Lookup(target, contact(ASKER).peer, seeds, limits, 8)
    first = lookup.plan(0.0)
    lookup = Lookup(target, contact(ASKER).peer, seeds, limits, 8)
    world.number |= {friend.peer: 1000 + n for n, friend in enumerate(friends)}
    world.liars = dict.fromkeys([world.number[first[0].peer], *range(1000, 1008)], friends)
    world.tables |= dict.fromkeys(range(1000, 1008), world.tables[ASKER])
    answered = []
    hear = lookup.answered
    lookup.answered = lambda peer, closer: answered.append(peer) or hear(peer, closer)
    world.run(lookup)
    truth = [one.peer for one in world.truth(lookup, 8) if one.peer != first[0].peer]
    return [peer for peer in truth if peer in answered]


def test_a_liar_with_friends_leads_one_path_astray_and_the_others_arrive(contact):
    assert asked_in_a_world_with_a_liar(contact, 1) == []
    assert len(asked_in_a_world_with_a_liar(contact, 3)) >= 7


def test_peers_that_do_not_exist_cost_a_late_each_and_hide_nobody(contact):
    size, name = 40, b"sought"
    fakes = sorted(map(contact, range(1000, 3000)), key=lambda one: one.key ^ key_of(name))[:8]
    first = World(contact, size).lookup(name).plan(0.0)[0]
    liar = next(n for n in range(size) if contact(n).peer == first.peer)
    world = World(contact, size, liars={liar: fakes})
    lookup = world.lookup(name)
    found = world.run(lookup)
    assert found == world.truth(lookup, 8)


def test_nobody_is_asked_twice_and_not_oneself(contact):
    world = World(contact, 40)
    lookup = world.lookup(b"name")
    asked = []
    plan = lookup.plan
    lookup.plan = lambda now: [one for one in plan(now) if asked.append(one.peer) is None]
    world.run(lookup)
    assert len(asked) == len(set(asked)) == lookup.questions
    assert contact(ASKER).peer not in asked


def test_a_path_asks_one_while_it_gets_nearer_and_all_the_rest_at_once_when_it_does_not(contact):
    target = key_of(b"name")
    ranked = sorted(map(contact, range(1, 60)), key=lambda one: -(one.key ^ target))
    limits = KadLimits(bucket=8, paths=1)
    lookup = Lookup(target, contact(0).peer, ranked[:4], limits, 8)
    (first,) = lookup.plan(0.0)
    assert lookup.plan(0.0) == []
    lookup.answered(first.peer, ranked[10:12])
    (second,) = lookup.plan(0.0)
    assert second == ranked[11]
    lookup.answered(second.peer, ranked[2:9])
    assert len(lookup.plan(0.0)) == 6, "of the eight nearest two have answered"


def test_the_late_hold_nothing_up_and_count_when_they_come(contact):
    target = key_of(b"name")
    ranked = sorted(map(contact, range(1, 60)), key=lambda one: one.key ^ target)
    lookup = Lookup(target, contact(0).peer, ranked[:6], KadLimits(paths=1), 3)
    (first,) = lookup.plan(0.0)
    lookup.asked(first.peer, 1.0)
    assert lookup.late_next == 1.0
    (second,) = lookup.plan(1.0)
    lookup.asked(second.peer, 2.0)
    lookup.answered(second.peer, [])
    for contact_ in lookup.plan(1.1):
        lookup.asked(contact_.peer, 2.1)
        lookup.answered(contact_.peer, [])
    for contact_ in lookup.plan(1.2):
        lookup.asked(contact_.peer, 2.2)
        lookup.answered(contact_.peer, [])
    assert lookup.is_done
    assert first not in lookup.nearest()
    lookup.answered(first.peer, [])
    assert lookup.nearest()[0] == first


def test_when_most_are_late_they_are_waited_for(contact):
    target = key_of(b"name")
    lookup = Lookup(target, contact(0).peer, [contact(1), contact(2)], KadLimits(), 8)
    for one in lookup.plan(0.0):
        lookup.asked(one.peer, 1.0)
    assert lookup.plan(2.0) == []
    assert not lookup.is_done
    lookup.answered(contact(1).peer, [])
    assert lookup.is_done


def test_peers_that_name_ever_nearer_friends_do_not_keep_a_lookup_for_ever(contact):
    target = key_of(b"name")
    ranked = sorted(map(contact, range(1, 400)), key=lambda one: -(one.key ^ target))
    limits = KadLimits(bucket=8, lookup_questions=50)
    lookup = Lookup(target, contact(0).peer, ranked[:3], limits, 8)
    asked = 0
    while not lookup.is_done:
        plan = lookup.plan(0.0)
        assert plan, "it waits for nobody"
        for one in plan:
            asked += 1
            lookup.asked(one.peer, 1.0)
            place = ranked.index(one)
            lookup.answered(one.peer, ranked[place + 1 : place + 4])
    assert asked == lookup.questions == 50


def test_a_stopped_lookup_asks_no_more_until_it_is_widened(contact):
    target = key_of(b"name")
    ranked = sorted(map(contact, range(1, 9)), key=lambda one: one.key ^ target)
    lookup = Lookup(target, contact(0).peer, ranked, KadLimits(), 2)
    lookup.stop()
    assert lookup.is_done
    assert lookup.plan(0.0) == []
    lookup.widen(4)
    assert not lookup.is_done
    assert lookup.plan(0.0)
