"""What is kept for others: newest wins, and no author or provider takes more than its share."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from mycel.dht.kad.book import ProviderBook, RecordBook
from mycel.dht.kad.record import Record
from mycel.dht.kad.table import Contact
from mycel.protocol.errors import Refused
from mycel.protocol.limits import KadLimits
from mycel.protocol.mesh import PeerId

LIMITS = KadLimits(
    records=12,
    record_bytes=400,
    author_records=4,
    author_bytes=150,
    providers=3,
    provider_keys=4,
    provided_keys=5,
)
AUTHORS = [PeerId(f"author{n}") for n in range(4)]


def record(author, name, sequence, expires, size=10):
    return Record(name.encode(), author, sequence, int(expires * 1000), b"", b"r" * size)


class Books(RuleBasedStateMachine):
    """Any order of offers and time, against a plain dictionary."""

    def __init__(self):
        super().__init__()
        self.book = RecordBook(LIMITS)
        self.wall = 0.0
        self.model = {}

    @rule(
        author=st.sampled_from(AUTHORS),
        name=st.sampled_from("abcdef"),
        sequence=st.integers(0, 5),
        life=st.integers(1, 50),
        size=st.integers(1, 60),
    )
    def offer(self, author, name, sequence, life, size):
        one = record(author, f"{author}/{name}", sequence, self.wall + life, size)
        before = self.model.get(one.name)
        alive = before is not None and before.expires > self.wall
        try:
            held = self.book.take(one, self.wall, self.wall)
        except Refused:
            assert not (alive and before.order >= one.order)
            return
        self.model[one.name] = held
        assert held == (before if alive and before.order >= one.order else one)

    @rule(seconds=st.integers(0, 30))
    def wait(self, seconds):
        self.wall += seconds
        self.book.expire(self.wall)

    @invariant()
    def what_is_held_is_what_was_kept_and_lives(self):
        for name, one in self.model.items():
            assert self.book.get(name, self.wall) == (one if one.expires > self.wall else None)

    @invariant()
    def bounds_hold(self):
        alive = [one for one in self.model.values() if one.expires > self.wall]
        assert len(self.book) <= LIMITS.records
        assert self.book.size <= LIMITS.record_bytes
        for author in AUTHORS:
            mine = [one for one in alive if one.author == author]
            assert len(mine) <= LIMITS.author_records
            assert sum(len(one.name) + len(one.raw) for one in mine) <= LIMITS.author_bytes


TestBooks = Books.TestCase
TestBooks.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)


def test_who_was_told_last_is_due_last():
    book = RecordBook(LIMITS)
    for now, name in enumerate("abc"):
        book.take(record(AUTHORS[now], name, 1, 99), 0.0, float(now))
    book.told(b"a", 5.0)
    assert [one.name for one in book.due(4.0, 9)] == [b"b", b"c"]
    assert [one.name for one in book.due(9.0, 1)] == [b"b"]


def test_a_record_told_again_is_not_due():
    book = RecordBook(LIMITS)
    one = record(AUTHORS[0], "a", 1, 99)
    book.take(one, 0.0, 0.0)
    book.take(one, 0.0, 7.0)
    assert book.due(6.0, 9) == []


def refusal(book, name, peer, now=0.0):
    with pytest.raises(Refused) as caught:
        book.add(name, Contact(PeerId(peer)), now)
    return caught.value.reason


def test_providers_are_bounded_by_key_by_peer_and_in_all():
    book = ProviderBook(LIMITS)
    for n in range(3):
        book.add(b"key", Contact(PeerId(f"p{n}")), 0.0)
    assert refusal(book, b"key", "p3") == "full"
    for n in range(3):
        book.add(b"other %d" % n, Contact(PeerId("p0")), 0.0)
    assert refusal(book, b"one more", "p0") == "quota"
    book.add(b"fifth", Contact(PeerId("p9")), 0.0)
    assert refusal(book, b"sixth", "p8") == "full"
    assert refusal(book, b"", "p8") == "name"
    assert len(book) == 7


def test_providers_expire_and_free_their_places():
    book = ProviderBook(LIMITS)
    book.add(b"key", Contact(PeerId("p0")), 0.0)
    book.add(b"key", Contact(PeerId("p1")), 100.0)
    assert [one.peer for one in book.get(b"key", 200.0)] == ["p1", "p0"], "the freshest first"
    later = LIMITS.provider_s + 50
    assert [one.peer for one in book.get(b"key", later)] == ["p1"]
    book.expire(later)
    assert len(book) == 1
    book.expire(later + 100)
    assert len(book) == 0
