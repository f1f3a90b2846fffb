"""Facts: order, bounds, endings."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mycel.dht.facts import FACTS_PER_AUTHOR_MAX, VALUE_BYTES_MAX, Facts, Statement
from mycel.protocol.board import Fact
from mycel.protocol.errors import RemoteProtocolError
from mycel.protocol.mesh import PeerId

A, B = PeerId("a"), PeerId("b")


def test_an_older_statement_changes_nothing() -> None:
    facts = Facts()
    assert facts.state(A, Statement(5, "k", b"new")) == Fact(A, "k", b"new")
    assert facts.state(A, Statement(4, "k", b"old")) is None
    assert facts.state(A, Statement(6, "k", b"new")) is None  # the same again is no change
    assert facts.under("") == [Fact(A, "k", b"new")]


def test_facts_are_ordered_by_key_then_author() -> None:
    facts = Facts()
    for author in (B, A):
        for key in ("z/1", "a/1", "a/2"):
            facts.state(author, Statement(1, key, b"v"))
    assert [(fact.key, fact.author) for fact in facts.under("a/")] == [
        ("a/1", A), ("a/1", B), ("a/2", A), ("a/2", B),
    ]  # fmt: skip


def test_an_author_that_goes_takes_its_facts_along() -> None:
    facts = Facts()
    facts.state(A, Statement(1, "x", b"1"))
    facts.state(A, Statement(2, "y", b"1"))
    facts.state(A, Statement(3, "y", None))
    facts.state(B, Statement(1, "x", b"2"))
    assert facts.forget(A) == [Fact(A, "x", None)]
    assert facts.under("") == [Fact(B, "x", b"2")]


def test_an_author_may_not_say_too_much() -> None:
    facts = Facts()
    for n in range(FACTS_PER_AUTHOR_MAX):
        facts.state(A, Statement(n + 1, f"k{n}", b""))
    with pytest.raises(RemoteProtocolError, match="more than"):
        facts.state(A, Statement(10_000, "one more", b""))
    facts.state(B, Statement(1, "another author may", b""))
    with pytest.raises(RemoteProtocolError, match="bytes"):
        facts.state(B, Statement(2, "k", bytes(VALUE_BYTES_MAX + 1)))
    with pytest.raises(RemoteProtocolError, match="key"):
        facts.state(B, Statement(2, "", b""))


@given(st.permutations([(n, key) for n, key in enumerate("aabbcabca")]))
def test_any_order_of_arrival_ends_alike(statements: list[tuple[int, str]]) -> None:
    facts = Facts()
    for n, key in statements:
        facts.state(A, Statement(n, key, str(n).encode()))
    assert [(fact.key, fact.value) for fact in facts.under("")] == [("a", b"8"), ("b", b"6"), ("c", b"7")]
