"""Records: only their author makes them, everybody can check them, and the newer wins everywhere."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mycel.dht.kad.record import name_of, read, seal
from mycel.protocol.errors import Refused
from mycel.protocol.keys import OwnKey, key_of
from mycel.protocol.limits import DEFAULT_KAD_LIMITS, KadLimits

LIMITS = DEFAULT_KAD_LIMITS
WALL = 1_800_000_000.0
AUTHOR = OwnKey(bytes(32))
OTHER = OwnKey(bytes(31) + b"x")


def verify(peer, data, signature):
    return key_of(peer).verify(data, signature)


def sealed(sequence=1, expires=WALL + 60, value=b"v", *, key=AUTHOR, author=AUTHOR, name="n"):
    raw_name = name_of(author.peer_id, name, LIMITS)
    return seal(author.peer_id, raw_name, (sequence, expires, value), key.sign)


def check(name, raw, wall=WALL):
    return read(name, raw, wall, verify, LIMITS)


def reason_of(name, raw, wall=WALL):
    with pytest.raises(Refused) as caught:
        check(name, raw, wall)
    return caught.value.reason


@given(
    st.integers(0, 2**63 - 1),
    st.floats(1, LIMITS.life_s),
    st.binary(max_size=64),
    st.text(min_size=1, max_size=9),
)
def test_what_an_author_seals_anybody_reads(sequence, life, value, name):
    record = sealed(sequence, WALL + life, value, name=name)
    assert check(record.name, record.raw) == record


def test_a_record_in_anothers_name_is_refused():
    forged = sealed(key=OTHER)
    assert reason_of(forged.name, forged.raw) == "signature"


def test_a_record_under_another_name_is_refused():
    record = sealed()
    assert reason_of(name_of(AUTHOR.peer_id, "m", LIMITS), record.raw) == "signature"
    assert reason_of(name_of(OTHER.peer_id, "n", LIMITS), record.raw) == "signature"


@given(st.integers(0), st.integers(0, 7))
def test_no_bit_of_a_record_can_be_changed(place, bit):
    record = sealed()
    raw = bytearray(record.raw)
    raw[place % len(raw)] ^= 1 << bit
    try:
        changed = check(record.name, bytes(raw))
    except Refused:
        return
    assert (changed.sequence, changed.expires_ms, changed.value) == (1, record.expires_ms, b"v")


@pytest.mark.parametrize(
    ("expires", "reason"),
    [(WALL, "expired"), (WALL - 1, "expired"), (WALL + LIMITS.life_s + LIMITS.skew_s + 1, "future")],
)
def test_an_expiry_of_a_wrong_clock_is_refused(expires, reason):
    record = sealed(expires=expires)
    assert reason_of(record.name, record.raw) == reason


def test_an_expiry_of_a_slightly_fast_clock_is_taken():
    record = sealed(expires=WALL + LIMITS.life_s + LIMITS.skew_s - 1)
    assert check(record.name, record.raw) == record


@pytest.mark.parametrize(
    "name",
    [b"", b"/mycel/", b"/mycel/12D3/x", b"/pk/abc", b"/mycel/" + AUTHOR.peer_id.encode() + b"/", b"\xff" * 9],
)
def test_a_name_of_another_form_is_refused(name):
    assert reason_of(name, sealed().raw) == "name"


@pytest.mark.parametrize("raw", [b"", b"\x90", b"\xc1", b"\x95\x01\x02", b"\xdd" * 40, b"\x91" * 5000])
def test_bytes_that_are_no_record_are_refused(raw):
    assert reason_of(sealed().name, raw) == "form"


def test_another_version_and_numbers_out_of_bounds_are_refused():
    for parts in ([3, 1, 2_000_000_000_000, b"", b""], [1, -1, 2_000_000_000_000, b"", b""]):
        assert reason_of(sealed().name, msgspec.msgpack.encode(parts)) == "form"


def test_an_oversized_value_is_refused_before_its_signature_is_looked_at():
    record = sealed(value=bytes(LIMITS.value_bytes + 1), key=OTHER)
    assert reason_of(record.name, record.raw) == "size"


def test_newer_is_a_higher_sequence_then_a_later_expiry():
    old, renewed, new = sealed(1), sealed(1, WALL + 90), sealed(2, WALL + 30)
    assert sorted([new, renewed, old], key=lambda record: record.order) == [old, renewed, new]


def test_a_name_has_a_length():
    with pytest.raises(ValueError, match="1 to 256 bytes"):
        name_of(AUTHOR.peer_id, "", KadLimits())
    with pytest.raises(ValueError, match="1 to 256 bytes"):
        name_of(AUTHOR.peer_id, "x" * 257, KadLimits())
