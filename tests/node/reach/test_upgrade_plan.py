"""When to punch and when to go back over a relay: the plan alone."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mycel.node.reach.upgrade_plan import Punch, Return, UpgradePlan
from mycel.protocol.limits_reach import PunchLimits
from mycel.protocol.mesh import PathKind, PeerId

LIMITS = PunchLimits()
LOW, HIGH = PeerId("a"), PeerId("z")
WAY = ("/relay/p2p-circuit/p2p/z",)
RELAYED, DIRECT = PathKind.RELAYED, PathKind.DIRECT


def make():
    return UpgradePlan(LIMITS)


def failed(plan, peer, now, reason="failed"):
    plan.on_failed(peer, reason, "no luck", now, 0.5)


def test_the_side_whose_turn_it_is_begins_and_the_other_waits_a_moment():
    plan = make()
    plan.on_path(HIGH, RELAYED, WAY, 1.0, leads=True)
    plan.on_path(LOW, RELAYED, (), 1.0, leads=False)
    assert plan.plan(1.0) == [Punch(HIGH)]
    assert plan.next_s() == 1.0 + LIMITS.yield_s
    assert plan.plan(1.0 + LIMITS.yield_s) == [Punch(LOW)]
    assert plan.next_s() == math.inf
    assert plan.plan(100.0) == []


def test_a_punch_that_failed_is_tried_again_ever_more_rarely():
    plan = make()
    plan.on_path(HIGH, RELAYED, WAY, 0.0, leads=True)
    now, waits = 0.0, []
    for _ in range(8):
        assert plan.plan(now) == [Punch(HIGH)]
        failed(plan, HIGH, now)
        waits.append(plan.next_s() - now)
        now = plan.next_s()
    assert waits[:3] == pytest.approx([LIMITS.again_s, 4 * LIMITS.again_s, 16 * LIMITS.again_s])
    assert waits[-1] == pytest.approx(LIMITS.again_max_s)


def test_a_punch_that_the_peer_asked_for_counts_for_this_side_too():
    plan = make()
    plan.on_path(LOW, RELAYED, WAY, 0.0, leads=False)
    plan.on_answered(LOW, "impossible", "no luck", 0.5, 0.5)
    assert plan.next_s() == pytest.approx(0.5 + LIMITS.again_max_s + LIMITS.yield_s)
    assert plan.standings()[0].trouble == "no luck"


def test_what_cannot_work_waits_for_another_network():
    plan = make()
    plan.on_path(HIGH, RELAYED, WAY, 0.0, leads=True)
    plan.plan(0.0)
    failed(plan, HIGH, 0.0, "impossible")
    assert plan.next_s() == pytest.approx(LIMITS.again_max_s)
    # Nor does a relayed connection that goes and comes bring it back.
    plan.on_present((), 10.0)
    plan.plan(10.0)
    plan.on_returned(HIGH)
    plan.on_path(HIGH, RELAYED, WAY, 11.0, leads=True)
    assert plan.plan(60.0) == []
    plan.on_network_changed(61.0)
    assert plan.plan(61.0) == [Punch(HIGH)]


def test_a_direct_connection_ends_the_trouble():
    plan = make()
    plan.on_path(HIGH, RELAYED, WAY, 0.0, leads=True)
    plan.plan(0.0)
    plan.on_path(HIGH, DIRECT, WAY, 0.3, leads=True)
    plan.on_punched(HIGH, 0.3)
    assert plan.next_s() == math.inf
    assert plan.standings()[0].trouble == ""


@pytest.mark.parametrize("path", [RELAYED, DIRECT])
def test_a_peer_behind_relays_that_is_lost_is_dialled_there_at_once_and_a_few_times(path):
    plan = make()
    plan.on_path(HIGH, path, WAY, 0.0, leads=True)
    plan.plan(0.0)
    plan.on_punched(HIGH, 0.3)
    plan.on_present((), 5.0)
    now, dials = 5.0, []
    while plan.next_s() < math.inf:
        now = max(now, plan.next_s())
        assert plan.plan(now) == [Return(HIGH, WAY)]
        dials.append(now)
        plan.on_not_returned(HIGH, now, refused=False)
    assert dials == [5.0, 5.5, 6.5, 8.5]
    assert plan.standings() == []


def test_a_peer_that_refuses_is_left_alone():
    plan = make()
    plan.on_path(HIGH, RELAYED, WAY, 0.0, leads=True)
    plan.plan(0.0)
    failed(plan, HIGH, 0.0)
    plan.on_present((), 1.0)
    assert plan.plan(1.0) == [Return(HIGH, WAY)]
    plan.on_not_returned(HIGH, 1.0, refused=True)
    assert plan.standings() == []
    assert plan.next_s() == math.inf


def test_a_peer_that_said_goodbye_is_let_go():
    plan = make()
    plan.on_path(HIGH, DIRECT, WAY, 0.0, leads=True)
    plan.on_goodbye(HIGH)
    plan.on_present((), 1.0)
    assert plan.plan(1.0) == []
    assert plan.standings() == []


def test_back_over_the_relay_it_is_punched_again():
    plan = make()
    plan.on_path(HIGH, RELAYED, WAY, 0.0, leads=True)
    plan.plan(0.0)
    plan.on_path(HIGH, DIRECT, WAY, 0.3, leads=True)
    plan.on_punched(HIGH, 0.3)
    plan.on_present((), 50.0)
    assert plan.plan(50.0) == [Return(HIGH, WAY)]
    plan.on_path(HIGH, RELAYED, WAY, 50.2, leads=True)
    plan.on_returned(HIGH)
    assert plan.plan(50.2) == [Punch(HIGH)]


def test_peers_that_never_needed_a_relay_are_nobodys_business():
    plan = make()
    plan.on_path(HIGH, DIRECT, (), 0.0, leads=True)
    plan.on_present((), 1.0)
    assert plan.standings() == []


_step = st.one_of(
    st.tuples(st.just("path"), st.sampled_from([LOW, HIGH]), st.sampled_from(PathKind), st.booleans()),
    st.tuples(st.just("present"), st.lists(st.sampled_from([LOW, HIGH]))),
    st.tuples(
        st.just("end"), st.sampled_from(["failed", "impossible", "busy", "lost", "worked"]), st.booleans()
    ),
    st.tuples(st.just("network")),
    st.tuples(st.just("time"), st.floats(0, 5000)),
)


@given(st.lists(_step, max_size=60))
def test_no_step_is_taken_twice_at_a_time_nor_more_often_than_allowed(events):
    plan, now = make(), 0.0
    under_way: dict[tuple[type, PeerId], object] = {}
    connected: dict[PeerId, PathKind] = {}
    punched = {}
    for event in events:
        match event:
            case ("path", peer, path, told):
                connected[peer] = path
                if path is DIRECT:
                    punched.pop(peer, None)
                plan.on_path(peer, path, WAY if told else (), now, leads=peer == HIGH)
            case ("present", peers):
                connected = {peer: path for peer, path in connected.items() if peer in peers}
                plan.on_present(peers, now)
            case ("end", how, refused):
                for (kind, peer), _ in list(under_way.items()):
                    del under_way[kind, peer]
                    if kind is Return and how == "worked":
                        plan.on_returned(peer)
                    elif kind is Return:
                        plan.on_not_returned(peer, now, refused=refused)
                    elif how == "worked":
                        plan.on_punched(peer, now)
                    else:
                        failed(plan, peer, now, how)
                        if connected.get(peer) is not DIRECT:
                            punched[peer] = now + LIMITS.yield_s * 0.75
            case ("network",):
                plan.on_network_changed(now)
                punched.clear()
            case ("time", seconds):
                now += seconds
        known = [one.peer for one in plan.standings()]  # who is gone for good is forgotten
        punched = {peer: until for peer, until in punched.items() if peer in known}
        for step in plan.plan(now):
            assert (type(step), step.peer) not in under_way
            under_way[type(step), step.peer] = step
            if isinstance(step, Punch):
                assert connected.get(step.peer) is PathKind.RELAYED
                assert now >= punched.get(step.peer, 0.0) or step.peer not in punched
            else:
                assert step.peer not in connected
                assert step.circuits == WAY
        assert plan.next_s() > now
        assert all(one.path is connected.get(one.peer) for one in plan.standings())
