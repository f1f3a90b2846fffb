"""Who may have a reservation or a circuit, and how fast: the deciding parts of a relay."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from mycel.protocol.limits_reach import RelayLimits
from mycel.protocol.mesh import Access, PeerId
from mycel.protocol.rate import BURST_S, Bucket
from mycel.protocol.relay import Limit, Status
from mycel.protocol.relay_book import STRANGERS, Book, Booked

LIMITS = RelayLimits(reservations=8, circuits=8, circuits_per_peer=4, reservation_s=100)
PEERS = [PeerId(f"peer{n}") for n in range(12)]
STRANGE = {PeerId(f"peer{n}") for n in range(0, 12, 2)}

any_peer = st.sampled_from(PEERS)


def access(peer):
    return Access.STRANGER if peer in STRANGE else Access.MEMBER


class Books(RuleBasedStateMachine):
    """Any order of requests, ends and time: no bound is ever passed, and nothing is lost."""

    def __init__(self):
        super().__init__()
        self.now = 0.0
        self.book = Book(LIMITS, self.now)
        self.places = {}
        self.circuits = []

    @rule(peer=any_peer)
    def reserve(self, peer):
        found = self.book.reserve(peer, access(peer), self.now)
        held = {one for one, until in self.places.items() if until > self.now}
        strangers = len(held & STRANGE)
        free = len(held) < 8 and (peer not in STRANGE or strangers < 8 // STRANGERS)
        assert (found is not Status.RESERVATION_REFUSED) == (peer in held or free)
        if not isinstance(found, Status):
            self.places[peer] = found.until

    @rule(peer=any_peer)
    def leave(self, peer):
        self.book.release(peer)
        self.places.pop(peer, None)

    @rule(seconds=st.floats(0, 60))
    def wait(self, seconds):
        self.now += seconds

    @rule(source=any_peer, onward=any_peer)
    def connect(self, source, onward):
        found = self.book.connect(source, access(source), onward, self.now)
        held = self.places.get(onward, 0.0) > self.now
        assert (found is Status.NO_RESERVATION) == (not held)
        if isinstance(found, Booked):
            self.circuits.append(found)

    @rule(data=st.data())
    def end(self, data):
        if self.circuits:
            booked = data.draw(st.sampled_from(self.circuits))
            self.book.end(booked)
            self.book.end(booked)
            self.circuits.remove(booked)

    @invariant()
    def bounds_hold(self):
        assert self.book.circuits == len(self.circuits) <= 8
        assert sum(one.strange for one in self.circuits) <= 8 // STRANGERS
        ends = Counter(peer for one in self.circuits for peer in {one.source, one.target})
        for peer, count in ends.items():
            assert count <= (1 if peer in STRANGE else 4)


TestBooks = Books.TestCase


def test_a_reservation_can_be_renewed_when_all_are_taken():
    book = Book(RelayLimits(reservations=1, reservation_s=100), 0.0)
    assert book.reserve(PEERS[1], Access.MEMBER, 0.0).until == 100
    assert book.reserve(PEERS[3], Access.MEMBER, 50.0) is Status.RESERVATION_REFUSED
    assert book.reserve(PEERS[1], Access.MEMBER, 50.0).until == 150
    assert book.reserve(PEERS[3], Access.MEMBER, 150.0).until == 250


def test_a_place_is_free_as_soon_as_its_peer_is_gone():
    book = Book(RelayLimits(reservations=1), 0.0)
    book.reserve(PEERS[1], Access.MEMBER, 0.0)
    assert book.release(PEERS[1])
    assert not book.release(PEERS[1])
    assert not isinstance(book.reserve(PEERS[3], Access.MEMBER, 0.0), Status)


@pytest.mark.parametrize(
    ("limits", "member", "stranger"),
    [
        (RelayLimits(), Limit(), Limit(600, 16 << 20)),
        (RelayLimits(circuit_s=60, circuit_bytes=100), Limit(60, 100), Limit(60, 100)),
        (RelayLimits(circuit_s=6000, circuit_bytes=1 << 40), Limit(6000, 1 << 40), Limit(600, 16 << 20)),
    ],
)
def test_strangers_are_bounded_at_least_as_much_as_members(limits, member, stranger):
    book = Book(limits, 0.0)
    assert book.limit(Access.MEMBER) == member
    assert book.limit(Access.STRANGER) == stranger
    book.reserve(PEERS[1], Access.MEMBER, 0.0)
    assert book.connect(PEERS[3], Access.MEMBER, PEERS[1], 0.0).limit == member
    assert book.connect(PEERS[0], Access.STRANGER, PEERS[1], 0.0).limit == stranger


def test_both_ends_of_a_circuit_share_their_rates_over_all_their_circuits():
    book = Book(RelayLimits(), 0.0)
    book.reserve(PEERS[1], Access.MEMBER, 0.0)
    book.reserve(PEERS[3], Access.MEMBER, 0.0)
    one = book.connect(PEERS[5], Access.MEMBER, PEERS[1], 0.0)
    two = book.connect(PEERS[5], Access.MEMBER, PEERS[3], 0.0)
    assert one.buckets[0] is two.buckets[0]
    assert one.buckets[1] is two.buckets[1]
    assert one.buckets[2] is not two.buckets[2]
    assert Book(RelayLimits(bytes_per_s=0, bytes_per_s_per_peer=0), 0.0)._is_paced is False


@given(
    st.floats(1, 1e9),
    st.lists(st.tuples(st.integers(1, 1 << 20), st.floats(0, 10)), min_size=1, max_size=50),
)
def test_a_bucket_never_lets_more_through_than_its_rate(rate, pieces):
    now, spent = 0.0, 0
    bucket = Bucket(rate, now)
    for size, pause in pieces:
        now += pause
        when = bucket.ready_at(now)
        assert when >= now
        now = max(now, when)
        # what went before this piece is paid for
        assert spent <= rate * (now + BURST_S) * (1 + 1e-6) + 1
        bucket.spend(size)
        spent += size


def test_a_bucket_without_a_rate_is_never_empty():
    bucket = Bucket(0, 0.0)
    bucket.spend(1 << 60)
    assert bucket.ready_at(1.0) == 1.0
