"""Sheets that others pass on: what counts, for how long, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mycel.dht import sheet as sheets_module
from mycel.dht.sheet import TTL_S, Sheet, Sheets, Word, sign_sheet
from mycel.protocol.board import Fact
from mycel.protocol.keys import OwnKey
from mycel.protocol.mesh import PeerId

WALL = 1_800_000_000.0
KEY = OwnKey(bytes(32))
A, Y, Z = KEY.peer_id, PeerId("y"), PeerId("z")


def word_of(sequence: int, value: bytes = b"1", *, age_s: float = 0.0, **other: Any) -> Word:
    sheet = Sheet(A, sequence, other.get("issued", WALL), other.get("facts", (("k", value),)))
    word = sign_sheet(sheet, other.get("sign", KEY.sign), other.get("chain", b"member"))
    return msgspec.structs.replace(word, age_s=age_s)


def is_signed(peer: PeerId, data: bytes, signature: bytes) -> bool:
    return peer == A and KEY.sign(data) == signature


def sheets_of(hears: Callable[[PeerId], bool] = lambda author: False) -> Sheets:
    return Sheets(is_signed, lambda _, chain: chain == b"member", hears)


def shown(sheets: Sheets) -> list[bytes | None]:
    return [fact.value for fact in sheets.under("")]


def test_the_newest_word_counts_and_each_is_looked_at_once() -> None:
    sheets = sheets_of()
    assert sheets.take(word_of(5, b"1"), Y, 100, WALL) == [Fact(A, "k", b"1")]
    assert sheets.take(word_of(4, b"0"), Z, 101, WALL) == []
    changed = word_of(6, facts=(("l", b"2"),))
    assert sheets.take(changed, Z, 102, WALL) == [Fact(A, "k", None), Fact(A, "l", b"2")]
    sheets._verify = lambda *_: pytest.fail("a word that is known is not verified again")
    assert sheets.take(changed, Y, 103, WALL) == []
    assert (sheets.known, sheets.refused) == ({A: 6}, {})
    passed_on = sheets.word(A, 112)
    assert passed_on is not None
    assert passed_on.age_s == 10


def test_a_word_counts_for_its_time_whoever_passes_it_on() -> None:
    sheets = sheets_of()
    sheets.take(word_of(5, age_s=40), Y, 100, WALL)
    assert sheets.expire(100 + 19.9) == []
    assert sheets.expire(100 + 20.1) == [Fact(A, "k", None)]
    assert sheets.take(word_of(5), Z, 121, WALL) == []  # though somebody calls it fresh
    assert sheets.take(word_of(6, age_s=30), Z, 121, WALL) == []  # it was signed before that one ran out
    assert sheets.take(word_of(7), Z, 122, WALL) != []


def test_facts_end_where_they_came_from() -> None:
    sheets = sheets_of()
    sheets.take(word_of(5), Y, 100, WALL)
    assert sheets.on_gone([A], Z, 101) == []
    assert sheets.on_gone([A, PeerId("other")], Y, 102) == [Fact(A, "k", None)]
    assert sheets.oldest_source(1e9) is None


def test_who_is_connected_speaks_for_itself() -> None:
    connected = [True]
    sheets = sheets_of(lambda author: connected[0])
    assert sheets.take(word_of(5), Y, 100, WALL) == []
    connected[0] = False
    assert sheets.on_down(A, 7, 101) == []
    assert sheets.take(word_of(7), Y, 102, WALL) == []  # no more than it had said
    assert sheets.take(word_of(8, age_s=2), Y, 102, WALL) == []  # before the connection ended
    assert sheets.take(word_of(8, age_s=1), Y, 103, WALL) == [Fact(A, "k", b"1")]
    assert sheets.on_up(A) == [Fact(A, "k", None)]


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        (word_of(5, sign=lambda data: bytes(64)), "forged"),
        (word_of(5, chain=b"stranger"), "foreign"),
        (word_of(5, chain=bytes(5000)), "oversized"),
        (Word(bytes(300_000), b"", b"", 0.0), "oversized"),
        (Word(b"\xff", b"", b"member", 0.0), "malformed"),
        (word_of(5, age_s=float("nan")), "malformed"),
        (word_of(5, age_s=-1.0), "malformed"),
        (word_of(5, issued=float("inf")), "malformed"),
        (word_of(5, facts=(("", b"1"),)), "malformed"),
        (word_of(5, facts=(("k", bytes(20_000)),)), "malformed"),
        (word_of(5, issued=WALL - 500), "skewed"),
        (word_of(5, issued=WALL + 500), "skewed"),
    ],
)
def test_what_does_not_hold_is_refused_and_counted(word: Word, reason: str) -> None:
    sheets = sheets_of()
    assert sheets.take(word, Y, 100, WALL) == []
    assert (sheets.refused, shown(sheets)) == ({reason: 1}, [])


def test_authors_and_bytes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sheets_module, "AUTHORS_MAX", 3)
    monkeypatch.setattr(sheets_module, "TOTAL_BYTES_MAX", 4000)
    sheets = Sheets(lambda *_: True, lambda *_: True, lambda _: False)

    def say(author: str, sequence: int, size: int) -> None:
        sheet = Sheet(PeerId(author), sequence, WALL, (("k", bytes(size)),))
        sheets.take(sign_sheet(sheet, KEY.sign, b""), Y, 100, WALL)

    for author in "abcd":
        say(author, 1, 1000)
    assert (sorted(sheets.known), sheets.refused) == (["a", "b", "c"], {"full": 1})
    say("a", 2, 3000)
    assert (sheets.known[PeerId("a")], sheets.refused) == (1, {"full": 2})
    sheets.on_up(PeerId("b"))
    say("a", 3, 2000)
    assert sheets.known[PeerId("a")] == 3
    for n in range(20):
        sheets.on_down(PeerId(f"e{n}"), 1, 100)
    assert len(sheets._ended) == 3


steps = st.lists(
    st.one_of(
        st.tuples(st.just("sign"), st.just(0), st.just(0.0)),
        st.tuples(st.just("wait"), st.just(0), st.floats(0.1, 40)),
        st.tuples(st.just("take"), st.integers(0, 30), st.floats(0, 20)),
        st.tuples(st.sampled_from(["up", "down", "gone", "expire"]), st.just(0), st.just(0.0)),
    ),
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(steps)
def test_the_dead_do_not_come_back_and_the_old_does_not_either(
    story: list[tuple[str, int, float]],
) -> None:
    connected = False
    sheets = sheets_of(lambda author: connected)
    signed: list[tuple[float, Word]] = []
    now, last, ended = 1000.0, 0, 0.0
    for what, number, seconds in story:
        if what == "sign":
            signed.append((now, word_of(len(signed) + 1, b"%d" % len(signed))))
        elif what == "wait":
            now += seconds
        elif what == "take" and signed:
            at, word = signed[number % len(signed)]
            age = now - at + seconds  # each who passes it on says at least how old it is
            sheets.take(msgspec.structs.replace(word, age_s=age), Y, now, WALL)
        elif what == "up":
            connected = True
            sheets.on_up(A)
        elif what == "down" and connected:
            connected, ended = False, now
            sheets.on_down(A, 0, now)
        elif what == "gone":
            sheets.on_gone([A], Y, now)
        elif what == "expire":
            sheets.expire(now)
            assert all(now - signed[held - 1][0] < TTL_S for held in sheets.known.values())
        assert not (connected and sheets.known)
        for held in sheets.known.values():
            assert held >= last
            assert signed[held - 1][0] > ended
            last = held
            assert shown(sheets) == [b"%d" % (held - 1)]
