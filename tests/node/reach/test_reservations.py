"""Where a node keeps reservations: the plan, without a relay."""

from __future__ import annotations

import math

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from multiaddr import Multiaddr

from mycel.node.reach.reservations import Candidate, Reservations
from mycel.protocol.limits_reach import RelayLimits
from mycel.protocol.mesh import PeerId

LIMITS = RelayLimits(retry_s=1.0, retry_max_s=16.0)
ADDRS = [Multiaddr("/ip4/192.0.2.1/tcp/1")]


def relays(*places):
    return [Candidate(PeerId(f"relay{n}"), place) for n, place in enumerate(places)]


def names(found):
    return [one.peer for one in found]


def wanting(count):
    plan = Reservations(LIMITS)
    plan.wanted = count
    return plan


def test_as_many_as_wanted_are_asked_and_no_more():
    plan = wanting(2)
    three = relays("a", "b", "c")
    assert names(plan.plan(three, 0.0)) == ["relay0", "relay1"]
    assert plan.plan(three, 0.0) == []
    plan.on_granted(PeerId("relay0"), ADDRS, 100, 0.0)
    plan.on_granted(PeerId("relay1"), ADDRS, 100, 0.0)
    assert plan.plan(three, 1.0) == []
    assert plan.addrs == ADDRS * 2


def test_relays_at_different_addresses_are_preferred():
    plan = wanting(2)
    assert names(plan.plan(relays("a", "a", "b"), 0.0)) == ["relay0", "relay2"]
    assert names(wanting(2).plan(relays("a", "a"), 0.0)) == ["relay0", "relay1"]


def test_a_lost_relay_is_replaced_at_once():
    plan = wanting(1)
    plan.plan(relays("a", "b"), 0.0)
    plan.on_granted(PeerId("relay0"), ADDRS, 100, 0.0)
    assert plan.on_lost(PeerId("relay0"))
    assert not plan.on_lost(PeerId("relay0"))
    assert names(plan.plan(relays("a", "b")[1:], 0.1)) == ["relay1"]


def test_a_relay_that_refuses_is_asked_again_after_a_while_that_doubles():
    plan = wanting(1)
    one = relays("a")
    now, waits = 0.0, []
    for _ in range(7):
        assert names(plan.plan(one, now)) == ["relay0"]
        plan.on_failed(PeerId("relay0"), now)
        assert plan.plan(one, now) == []
        waits.append(plan.next_at(one) - now)
        now = plan.next_at(one)
    assert waits == [1, 2, 4, 8, 16, 16, 16]


def test_a_reservation_is_renewed_when_half_of_it_is_gone_and_counts_while_that_fails():
    plan = wanting(1)
    one = relays("a")
    plan.plan(one, 0.0)
    plan.on_granted(PeerId("relay0"), ADDRS, 100, 0.0)
    assert plan.next_at(one) == 50
    assert plan.plan(one, 49.0) == []
    assert names(plan.plan(one, 50.0)) == ["relay0"]
    plan.on_failed(PeerId("relay0"), 50.0)
    assert plan.addrs == ADDRS
    assert names(plan.plan(one, 51.0)) == ["relay0"]
    plan.on_granted(PeerId("relay0"), ADDRS, 100, 51.0)
    assert plan.next_at(one) == 101


def test_a_reservation_that_was_not_renewed_ends():
    plan = wanting(1)
    plan.plan(relays("a"), 0.0)
    plan.on_granted(PeerId("relay0"), ADDRS, 100, 0.0)
    assert plan.plan([], 99.0) == relays("a")
    plan.plan([], 100.0)
    assert plan.addrs == []


def test_an_answer_that_was_not_waited_for_changes_nothing():
    plan = wanting(1)
    plan.on_granted(PeerId("relay0"), ADDRS, 100, 0.0)
    plan.on_failed(PeerId("relay0"), 0.0)
    assert plan.addrs == []
    assert names(plan.plan(relays("a"), 0.0)) == ["relay0"]


def test_nothing_is_asked_where_nothing_is_wanted():
    plan = wanting(0)
    assert plan.plan(relays("a"), 0.0) == []
    assert plan.next_at(relays("a")) == math.inf


class Plans(RuleBasedStateMachine):
    """Any order of grants, refusals, losses and time: enough are asked, never too many, none twice."""

    def __init__(self):
        super().__init__()
        self.now = 0.0
        self.plan = wanting(2)
        self.all = relays("a", "a", "b", "c")
        self.alive = list(self.all)
        self.asked = []

    def _step(self):
        asked = self.plan.plan(self.alive, self.now)
        assert not {one.peer for one in asked} & {one.peer for one in self.asked}
        self.asked += asked

    @rule(data=st.data(), seconds=st.floats(10, 1000))
    def granted(self, data, seconds):
        if self.asked:
            one = data.draw(st.sampled_from(self.asked))
            self.asked.remove(one)
            self.plan.on_granted(one.peer, ADDRS, seconds, self.now)
        self._step()

    @rule(data=st.data())
    def failed(self, data):
        if self.asked:
            one = data.draw(st.sampled_from(self.asked))
            self.asked.remove(one)
            self.plan.on_failed(one.peer, self.now)
        self._step()

    @rule(data=st.data())
    def lost(self, data):
        one = data.draw(st.sampled_from(self.all))
        self.alive = [other for other in self.alive if other != one]
        self.asked = [other for other in self.asked if other != one]
        self.plan.on_lost(one.peer)
        self._step()

    @rule(data=st.data())
    def back(self, data):
        one = data.draw(st.sampled_from(self.all))
        if one not in self.alive:
            self.alive.append(one)
        self._step()

    @rule(seconds=st.floats(0, 100))
    def wait(self, seconds):
        self.now += seconds
        self._step()

    @invariant()
    def enough_and_not_too_many(self):
        fresh = [one for one in self.asked if one.peer not in self.plan.relays]
        assert len(self.plan.relays) + len(fresh) <= 2
        assert len(self.plan.addrs) == len(self.plan.relays)
        if len(self.plan.relays) + len(fresh) < 2 and self.now > 0:
            idle = [one for one in self.alive if one.peer not in self.plan.relays and one not in self.asked]
            if idle:
                assert self.plan.next_at(self.alive) < math.inf


TestPlans = Plans.TestCase
