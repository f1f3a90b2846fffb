"""The routing table: who stays, who goes, who is told to others."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mycel.dht.kad.key import key_of, shared_bits
from mycel.dht.kad.table import Table, group_of
from mycel.protocol.limits import KadLimits

LIMITS = KadLimits(bucket=4, group=2, failures=3)


@pytest.fixture
def table(contact):
    return Table(contact(0).peer, LIMITS)


@pytest.fixture
def far(contact):
    """Contacts that all fall into the farthest bucket."""
    own = contact(0).key
    return [one for one in map(contact, range(1, 80)) if shared_bits(own, one.key) == 0]


def fill(table, contacts, host="10.0.0.1"):
    return [table.on_alive(one, host, float(now)) for now, one in enumerate(contacts)]


def test_a_full_bucket_keeps_whom_it_has(table, far):
    assert fill(table, far[:6]) == [True] * 4 + [False] * 2
    assert {one.peer for one in table.all()} == {one.peer for one in far[:4]}


def test_who_fails_gives_its_place_to_who_waits(table, far):
    fill(table, far[:6])
    table.on_failure(far[1].peer)
    assert far[1].peer not in table
    assert far[5].peer in table, "the newest of those who wait"


def test_without_anybody_waiting_a_peer_may_fail_twice(table, far):
    fill(table, far[:3])
    for _ in range(2):
        table.on_failure(far[0].peer)
    assert far[0].peer in table
    assert far[0] not in table.closest(far[0].key, 4), "but nobody is told of it"
    table.on_failure(far[0].peer)
    assert far[0].peer not in table


def test_an_answer_wipes_failures_out(table, far):
    fill(table, far[:1])
    table.on_failure(far[0].peer)
    table.on_failure(far[0].peer)
    table.on_alive(far[0], "", 9.0)
    table.on_failure(far[0].peer)
    assert far[0].peer in table


def test_those_who_failed_are_asked_when_there_is_nobody_else(table, far):
    fill(table, far[:2])
    for one in far[:2]:
        table.on_failure(one.peer)
    assert len(table.closest(far[0].key, 4)) == 2


def test_a_public_network_has_few_places_in_a_bucket(table, far):
    assert fill(table, far[:3], host="8.8.4.4") == [True, True, False]
    assert table.on_alive(far[3], "8.8.5.4", 9.0)
    assert table.on_alive(far[4], "127.0.0.1", 9.0)


@pytest.mark.parametrize(
    ("host", "group"),
    [
        ("8.8.4.4", "8.8.4.0/24"),
        ("2a00:1450:4001:81b::200e", "2a00:1450:4001::/48"),
        ("10.1.2.3", ""),
        ("192.168.0.9", ""),
        ("fe80::1", ""),
        ("", ""),
    ],
)
def test_groups_are_public_networks(host, group):
    assert group_of(host) == group


def test_who_goes_in_order_is_forgotten_at_once(table, far):
    fill(table, far[:2])
    table.forget(far[0].peer)
    assert [one.peer for one in table.all()] == [far[1].peer]


def test_buckets_nobody_looked_through_are_stale_down_to_the_deepest(table, contact):
    own = contact(0).key
    fill(table, [contact(n) for n in range(1, 200)])
    deepest = max(shared_bits(own, one.key) for one in table.all())
    assert table.stale_buckets(0.0) == list(range(deepest + 1))
    table.looked(next(one.key for one in table.all() if shared_bits(own, one.key) == 1), 5.0)
    assert 1 not in table.stale_buckets(4.0)
    assert 1 in table.stale_buckets(6.0)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(1, 60), st.sampled_from("afg")), max_size=200), st.binary(max_size=4))
def test_bounds_hold_and_the_closest_are_the_closest(contact, events, name):
    table = Table(contact(0).peer, LIMITS)
    own, target = contact(0).key, key_of(name)
    for now, (number, what) in enumerate(events):
        if what == "f":
            table.on_failure(contact(number).peer)
        else:
            table.on_alive(contact(number), "8.8.4.4" if what == "g" else "", float(now))
    held = list(table.all())
    for bits in range(256):
        assert sum(shared_bits(own, one.key) == bits for one in held) <= LIMITS.bucket
    found = table.closest(target, 5)
    assert [one.key ^ target for one in found] == sorted(one.key ^ target for one in found)
    assert len({one.peer for one in held}) == len(held) == len(table)


@pytest.mark.parametrize("target", [b"a", b"b", b"c", b"d", b"e"])
def test_the_closest_are_the_first_of_all_in_order(table, contact, target):
    fill(table, [contact(n) for n in range(1, 300)])
    key = key_of(target)
    failed = [one.peer for one in table.all()[::3]]
    for peer in failed:
        table.on_failure(peer)
    good = [one for one in table.all() if one.peer not in failed]
    assert table.closest(key, 9) == sorted(good, key=lambda one: one.key ^ key)[:9]


def test_looking_for_oneself_is_looking_through_the_neighbourhood(table, contact):
    own = contact(0).key
    fill(table, [contact(n) for n in range(1, 200)])
    near = [one for one in table.all() if shared_bits(own, one.key) >= table.neighbourhood]
    assert 0 < len(near) <= LIMITS.bucket
    assert {one.peer for one in near} == {one.peer for one in table.closest(own, len(near))}
    table.looked_around(5.0)
    assert table.stale_buckets(4.0) == list(range(table.neighbourhood))
