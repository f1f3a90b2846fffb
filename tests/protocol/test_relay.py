"""The messages of circuit relay v2 and its vouchers, against py-libp2p's where that can be."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from multiaddr import Multiaddr

from mycel.protocol import relay, varint
from mycel.protocol.errors import RemoteProtocolError
from mycel.protocol.keys import OwnKey, peer_id_bytes
from mycel.protocol.relay import Kind, Limit, Message, Reservation, Status

RELAY, PEER, OTHER = (OwnKey(bytes([n]) * 32) for n in (1, 2, 3))
ADDR = Multiaddr(f"/ip4/192.0.2.1/tcp/4001/p2p/{RELAY.peer_id}")

limits = st.builds(Limit, st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1))
peers = st.binary(min_size=32, max_size=32).map(lambda seed: OwnKey(seed).peer_id)
statuses = st.builds(lambda status, limit: Message(Kind.STATUS, None, status, None, limit),
                     st.sampled_from(Status), limits)  # fmt: skip
connects = st.builds(lambda peer, limit: Message(Kind.CONNECT, peer, 0, None, limit), peers, limits)
reservations = st.builds(
    lambda expire, count, voucher: Message(
        Kind.STATUS, None, Status.OK, Reservation(expire, (ADDR,) * count, voucher)
    ),
    st.integers(0, 2**63), st.integers(0, relay.ADDRS_MAX), st.binary(max_size=300),
)  # fmt: skip


def body(raw):
    cut = varint.split_prefixed(raw, relay.MESSAGE_BYTES_MAX)
    assert cut is not None
    assert cut[1] == len(raw)
    return cut[0]


@given(statuses | connects | reservations | st.just(Message(Kind.RESERVE)))
def test_hop_messages_survive_the_wire(message):
    assert relay.read_hop(body(relay.write_hop(message))) == message


@given(statuses | connects)
def test_stop_messages_survive_the_wire(message):
    assert relay.read_stop(body(relay.write_stop(message))) == message


@given(st.binary(max_size=200))
def test_any_bytes_are_a_relay_message_or_a_clear_no(raw):
    for read in (relay.read_hop, relay.read_stop):
        with contextlib.suppress(RemoteProtocolError):
            assert isinstance(read(raw), Message)


@given(st.data())
def test_a_changed_relay_message_is_another_one_or_a_clear_no(data):
    raw = bytearray(body(relay.write_hop(data.draw(statuses | connects | reservations))))
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(RemoteProtocolError):
        assert isinstance(relay.read_hop(bytes(raw)), Message)


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"", "no known type"),
        (b"\x08\x07", "no known type"),
        (b"\x08\x01", "without a peer"),
        (b"\x08\x01\x12\x03\x0a\x01x", "names no peer"),
        (b"\x08\x02", "without a status"),
    ],
)
def test_what_is_wrong_with_a_relay_message_is_named(raw, said):
    with pytest.raises(RemoteProtocolError, match=said):
        relay.read_hop(raw)


def test_a_status_that_nobody_knows_is_shown_by_its_number():
    message = relay.read_hop(b"\x08\x02\x28\xe7\x07")
    assert message.status == 999
    assert relay.meaning(message.status) == "status 999"
    assert "NO_RESERVATION" in relay.meaning(Status.NO_RESERVATION)


def test_addresses_of_a_reservation_that_do_not_parse_are_left_out():
    from mycel.protocol.pb import circuit_pb2

    raw = circuit_pb2.HopMessage(
        type=circuit_pb2.HopMessage.STATUS,
        status=Status.OK.value,
        reservation=circuit_pb2.Reservation(expire=5, addrs=[b"\xff\xff", ADDR.to_bytes(), b""]),
    )
    found = relay.read_hop(raw.SerializeToString()).reservation
    assert found == Reservation(5, (ADDR,))


def test_a_voucher_is_the_relays_word_about_one_peer():
    voucher = relay.seal_voucher(RELAY.public, RELAY.sign, PEER.peer_id, 1_700_000_000)
    assert relay.open_voucher(voucher, relay=RELAY.peer_id, peer=PEER.peer_id) == 1_700_000_000
    for wrong in (
        {"relay": OTHER.peer_id, "peer": PEER.peer_id},
        {"relay": RELAY.peer_id, "peer": OTHER.peer_id},
    ):
        with pytest.raises(RemoteProtocolError):
            relay.open_voucher(voucher, **wrong)
    forged = relay.seal_voucher(RELAY.public, OTHER.sign, PEER.peer_id, 1_700_000_000)
    with pytest.raises(RemoteProtocolError, match="does not hold"):
        relay.open_voucher(forged, relay=RELAY.peer_id, peer=PEER.peer_id)


def test_every_flipped_bit_of_a_voucher_is_noticed():
    voucher = relay.seal_voucher(RELAY.public, RELAY.sign, PEER.peer_id, 1_700_000_000)
    for at in range(len(voucher) * 8):
        changed = bytearray(voucher)
        changed[at // 8] ^= 1 << at % 8
        try:
            expire = relay.open_voucher(bytes(changed), relay=RELAY.peer_id, peer=PEER.peer_id)
        except RemoteProtocolError:
            continue
        assert (
            expire == 1_700_000_000
        )  # a bit that means nothing, such as one of a protobuf tag's unused kind


def test_messages_and_vouchers_are_those_of_py_libp2p():
    from libp2p.peer.envelope import unmarshal_envelope
    from libp2p.relay.circuit_v2.pb import circuit_pb2 as theirs

    message = Message(
        Kind.STATUS, PEER.peer_id, Status.OK, Reservation(1_700_000_000, (ADDR,), b"word"), Limit(120, 131072)
    )
    read = theirs.HopMessage.FromString(body(relay.write_hop(message)))
    assert read.type == theirs.HopMessage.STATUS
    assert read.reservation.expire == 1_700_000_000
    assert list(read.reservation.addrs) == [ADDR.to_bytes()]
    assert (read.limit.duration, read.limit.data) == (120, 131072)
    stop = theirs.StopMessage.FromString(body(relay.write_stop(Message(Kind.CONNECT, PEER.peer_id))))
    assert stop.type == theirs.StopMessage.CONNECT
    assert stop.peer.id == peer_id_bytes(PEER.peer_id)
    voucher = relay.seal_voucher(RELAY.public, RELAY.sign, PEER.peer_id, 1_700_000_000)
    unmarshal_envelope(voucher).validate("libp2p-relay-rsvp")
    with pytest.raises(ValueError, match="signature"):
        unmarshal_envelope(voucher).validate("libp2p-peer-record")


def test_addresses_through_a_relay_name_that_relay_and_no_further_one():
    said = [
        ADDR,
        Multiaddr(f"/ip4/192.0.2.9/tcp/1/p2p/{OTHER.peer_id}"),
        Multiaddr("/ip4/192.0.2.7/tcp/1"),
        Multiaddr(f"/ip4/192.0.2.8/tcp/1/p2p/{OTHER.peer_id}/p2p-circuit/p2p/{RELAY.peer_id}"),
    ]
    found = relay.relayed_addrs(RELAY.peer_id, [Multiaddr("/ip4/192.0.2.5/tcp/2")], said)
    assert [str(addr) for addr in found] == [
        f"/ip4/192.0.2.5/tcp/2/p2p/{RELAY.peer_id}/p2p-circuit",
        f"{ADDR}/p2p-circuit",
    ]
