"""identify and signed peer records, against py-libp2p."""

from __future__ import annotations

import pytest
from libp2p.peer.envelope import consume_envelope
from libp2p.peer.id import ID
from libp2p.peer.peer_record import PeerRecord as TheirRecord
from multiaddr import Multiaddr

from mycel.protocol import identify, varint
from mycel.protocol.errors import RemoteProtocolError
from mycel.protocol.identify import Identity, PeerRecord
from mycel.protocol.keys import OwnKey
from mycel.protocol.pb import identify_pb2, record_pb2

KEY = OwnKey(b"\x07" * 32)
ADDRS = (Multiaddr("/ip4/192.0.2.7/tcp/4001"), Multiaddr("/ip6/2001:db8::1/tcp/4001"))


def said(**changes: object) -> Identity:
    values = {
        "agent": "test/1",
        "protocols": ("/a/1", "/b/1"),
        "listen_addrs": ADDRS,
        "observed": Multiaddr("/ip4/198.51.100.4/tcp/55555"),
    }
    return Identity(**{**values, **changes})


def raw_of(message: bytes) -> bytes:
    cut = varint.split_prefixed(message, identify.MESSAGE_BYTES_MAX)
    assert cut is not None
    assert cut[1] == len(message)
    return cut[0]


def test_what_is_written_is_read():
    record = PeerRecord(KEY.peer_id, 42, ADDRS)
    message = identify.write(KEY.public, said(), identify.seal_record(KEY, record))
    assert identify.read(raw_of(message), KEY.public) == said(record=record)


def test_a_record_is_one_that_py_libp2p_accepts():
    sealed = identify.seal_record(KEY, PeerRecord(KEY.peer_id, 42, ADDRS))
    _, theirs = consume_envelope(sealed, "libp2p-peer-record")
    assert isinstance(theirs, TheirRecord)
    assert theirs.peer_id == ID.from_string(KEY.peer_id)
    assert theirs.seq == 42
    assert tuple(map(str, theirs.addrs)) == tuple(map(str, ADDRS))


def test_a_record_of_py_libp2p_is_accepted():
    from libp2p.crypto.ed25519 import create_new_key_pair
    from libp2p.peer.envelope import seal_record

    pair = create_new_key_pair(b"\x09" * 32)
    peer = ID.from_pubkey(pair.public_key)
    envelope = seal_record(TheirRecord(peer, list(ADDRS), 7), pair.private_key)
    assert identify.open_record(envelope.marshal_envelope()) == PeerRecord(peer.to_string(), 7, ADDRS)


def test_a_record_that_anybody_changed_is_refused():
    sealed = identify.seal_record(KEY, PeerRecord(KEY.peer_id, 42, ADDRS))
    for position in range(len(sealed)):
        for bit in (0x01, 0x80):
            bad = bytearray(sealed)
            bad[position] ^= bit
            try:
                record = identify.open_record(bytes(bad))
            except RemoteProtocolError:
                continue
            assert record == PeerRecord(KEY.peer_id, 42, ADDRS)  # a change outside of what is signed


def test_a_record_signed_by_somebody_else_is_refused():
    other = OwnKey(b"\x08" * 32)
    sealed = identify.seal_record(other, PeerRecord(KEY.peer_id, 42, ADDRS))
    with pytest.raises(RemoteProtocolError, match="own signer"):
        identify.open_record(sealed)
    envelope = record_pb2.Envelope.FromString(sealed)
    envelope.public_key.ParseFromString(KEY.public.serialized)
    with pytest.raises(RemoteProtocolError, match="signature"):
        identify.open_record(envelope.SerializeToString())


def test_identify_with_another_key_or_another_peers_record_is_refused():
    other = OwnKey(b"\x08" * 32)
    with pytest.raises(RemoteProtocolError, match="another public key"):
        identify.read(raw_of(identify.write(other.public, said())), KEY.public)
    stolen = identify.seal_record(other, PeerRecord(other.peer_id, 1, ADDRS))
    with pytest.raises(RemoteProtocolError, match="another peer's record"):
        identify.read(raw_of(identify.write(KEY.public, said(), stolen)), KEY.public)


def test_what_does_not_parse_is_left_out_and_what_is_too_much_is_cut():
    message = identify_pb2.Identify(
        listenAddrs=[b"\xff\xff", b"", b"\x04\x7f\x00", *[ADDRS[0].to_bytes()] * 200],
        protocols=["p" * 10_000] * 1000,
        agentVersion="a" * 10_000,
        observedAddr=b"nonsense",
    )
    read = identify.read(message.SerializeToString(), KEY.public)
    assert 0 < len(read.listen_addrs) <= identify.ADDRS_MAX
    assert set(read.listen_addrs) == {ADDRS[0]}
    assert len(read.protocols) == identify.PROTOCOLS_MAX
    assert max(map(len, read.protocols)) == len(read.agent) == identify.TEXT_MAX
    assert read.observed is None


def test_what_is_no_identify_message_is_refused():
    with pytest.raises(RemoteProtocolError):
        identify.read(b"\xff" * 50, KEY.public)
