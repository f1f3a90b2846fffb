"""The shelf: what goes, and what never does."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mycel.dht.block.shelf import Shelf
from mycel.protocol.cid import Cid, cid_of
from mycel.protocol.errors import LimitExceeded

CIDS = [cid_of(bytes([n])) for n in range(12)]


def fill(shelf: Shelf, *cids: Cid, nbytes: int = 10) -> list[Cid]:
    gone: list[Cid] = []
    for cid in cids:
        gone += shelf.reserve(nbytes)
        shelf.place(cid, nbytes)
    return gone


def test_the_least_recently_used_goes() -> None:
    shelf = Shelf(30)
    assert fill(shelf, *CIDS[:3]) == []
    shelf.touch(CIDS[0])
    assert fill(shelf, CIDS[3]) == [CIDS[1]]
    assert shelf.used_bytes == 30


def test_pinned_ones_stay_also_when_pinned_before_they_came() -> None:
    shelf = Shelf(30)
    shelf.pin("model", CIDS[:2])
    assert fill(shelf, *CIDS[:4]) == [CIDS[2]]
    shelf.pin("other", CIDS[3:4])
    with pytest.raises(LimitExceeded, match="quota"):
        shelf.reserve(10)
    assert all(cid in shelf for cid in (CIDS[0], CIDS[1], CIDS[3]))
    shelf.pin("third", CIDS[:1])
    shelf.unpin("model")
    assert shelf.reserve(10) == [CIDS[1]]


def test_without_a_quota_nothing_goes() -> None:
    assert fill(Shelf(), *CIDS, nbytes=1 << 40) == []


@given(
    st.integers(20, 60),
    st.lists(
        st.tuples(st.sampled_from(["put", "touch", "pin", "unpin", "fail"]), st.integers(0, 11)), max_size=60
    ),
)
def test_the_books_balance_and_the_quota_holds(quota: int, acts: list[tuple[str, int]]) -> None:
    shelf = Shelf(quota)
    sizes: dict[Cid, int] = {}
    pins: dict[str, Cid] = {}
    for act, n in acts:
        cid, size = CIDS[n], 3 + n
        if act == "touch":
            shelf.touch(cid)
        elif act == "pin":
            pins[f"{n % 3}"] = cid
            shelf.pin(f"{n % 3}", [cid])
        elif act == "unpin":
            pins.pop(f"{n % 3}", None)
            shelf.unpin(f"{n % 3}")
        elif cid not in shelf:
            try:
                gone = shelf.reserve(size)
            except LimitExceeded:
                pinned = {held: size for held, size in sizes.items() if held in pins.values()}
                assert sum(pinned.values()) + 3 + n > quota
                continue
            for old in gone:
                assert old not in pins.values()
                del sizes[old]
            if act == "fail":
                shelf.release(size)
            else:
                shelf.place(cid, size)
                sizes[cid] = size
        assert shelf.used_bytes == sum(sizes.values()) <= quota
        assert len(shelf) == len(sizes)
