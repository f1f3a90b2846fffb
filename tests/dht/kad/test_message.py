"""Messages on the wire: round trips, bounds, and garbage."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mycel.dht.kad.message import ADDRS_MAX, Kind, Message, read, write
from mycel.dht.kad.table import Contact
from mycel.protocol import varint
from mycel.protocol.errors import RemoteProtocolError
from mycel.protocol.limits import DEFAULT_KAD_LIMITS as LIMITS
from mycel.protocol.pb import kad_pb2


def body(message):
    raw, end = varint.split_prefixed(message, 1 << 20)
    assert end == len(message)
    return raw


@given(
    st.sampled_from(list(Kind)),
    st.binary(max_size=99),
    st.none() | st.binary(max_size=99),
    st.lists(st.integers(1, 99), max_size=20),
    st.lists(st.integers(1, 99), max_size=20),
)
def test_a_message_comes_back_as_it_was_written(contact, kind, name, record, closer, providers):
    message = Message(kind, name, record, tuple(map(contact, closer)), tuple(map(contact, providers)))
    assert read(body(write(message)), LIMITS) == message


def test_bytes_follow_the_libp2p_specification():
    """type 1, key 2, record 3 (key 1, value 2), closer peers 8, provider peers 9 (id 1, addrs 2)."""
    peer = bytes([0x0A, 2]) + b"\x00\x00" + bytes([0x12, 1]) + b"a"
    raw = bytes([0x08, 1, 0x12, 1]) + b"k" + bytes([0x1A, 6, 0x0A, 1]) + b"k" + bytes([0x12, 1]) + b"v"
    raw += bytes([0x42, len(peer)]) + peer
    found = read(raw, LIMITS)
    assert (found.kind, found.name, found.record) == (Kind.GET_VALUE, b"k", b"v")
    assert found.closer[0].addrs == (b"a",)


@given(st.binary(max_size=200))
def test_garbage_is_read_or_refused_and_nothing_else(raw):
    try:
        message = read(raw, LIMITS)
    except RemoteProtocolError:
        return
    assert len(message.closer) <= LIMITS.bucket


def test_peers_and_addresses_beyond_the_bounds_are_cut(contact):
    many = tuple(Contact(contact(n).peer, tuple(b"%d" % m for m in range(30))) for n in range(1, 40))
    found = read(body(write(Message(Kind.FIND_NODE, b"k", closer=many))), LIMITS)
    assert len(found.closer) == LIMITS.bucket
    assert all(len(one.addrs) == ADDRS_MAX for one in found.closer)


def test_peers_without_a_true_id_are_left_out(contact):
    raw = kad_pb2.Message(type="FIND_NODE", closer_peers=[{"id": b"nobody"}, {"id": b"\x00\x00"}])
    assert len(read(raw.SerializeToString(), LIMITS).closer) == 1


@pytest.mark.parametrize(
    "message",
    [
        kad_pb2.Message(key=bytes(LIMITS.name_bytes + 129)),
        kad_pb2.Message(key=b"a", record={"key": b"b"}),
    ],
)
def test_keys_that_cannot_be_are_refused(message):
    with pytest.raises(RemoteProtocolError):
        read(message.SerializeToString(), LIMITS)
