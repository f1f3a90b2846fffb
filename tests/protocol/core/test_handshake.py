"""From the first byte to a multiplexed connection."""

from __future__ import annotations

import pytest
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import X25519PrivateKey
from libp2p.security.noise.messages import NoiseHandshakePayload, verify_handshake_payload_sig

from mycel.protocol import multistream, noise
from mycel.protocol.errors import LocalProtocolError, Refused, RemoteProtocolError
from mycel.protocol.keys import OwnKey


@pytest.mark.parametrize("muxers", [True, False], ids=["muxer in the handshake", "muxer negotiated"])
@pytest.mark.parametrize("cut", [None, 1, 7, 100], ids=lambda cut: f"cut {cut}")
def test_both_sides_prove_who_they_are_in_any_cut_of_the_bytes(make_wire, muxers, cut):
    wire = make_wire(muxers=muxers)
    wire.settle(cut=(lambda left: cut) if cut else None)
    assert wire.near.opened.peer_id == wire.far.key.peer_id
    assert wire.far.opened.peer_id == wire.near.key.peer_id
    channel = wire.near.open()
    assert channel.try_send(b"hello")
    wire.settle(cut=(lambda left: cut) if cut else None)
    assert wire.far.got[1] == b"hello"


def test_the_dialers_first_packet_holds_negotiation_and_the_first_noise_message(make_wire):
    wire = make_wire()
    first = wire.near.take_output()
    assert first.startswith(b"\x13/multistream/1.0.0\n\x07/noise\n\x00\x20")
    assert len(first) == 20 + 8 + 2 + 32
    assert wire.far.take_output() == b""


def test_the_dialer_is_open_after_one_answer_and_the_listener_after_the_next_packet(make_wire):
    wire = make_wire()
    wire.carry(wire.near, wire.far)
    assert wire.far.opened is None
    wire.carry(wire.far, wire.near)
    assert wire.near.opened is not None
    wire.near.open().try_send(b"rides along")
    wire.carry(wire.near, wire.far)
    assert wire.far.opened is not None
    assert wire.far.got[1] == b"rides along"


def test_another_peer_than_expected_is_refused_before_it_learns_who_we_are(make_wire):
    wire = make_wire()
    other = make_wire(seed=8)
    wire.carry(wire.near, other.far)
    with pytest.raises(Refused, match="expected peer") as caught:
        wire.carry(other.far, wire.near)
    assert caught.value.reason == "identity"
    assert wire.near.opened is None


def test_the_payloads_are_what_py_libp2p_signs_and_verifies():
    key = OwnKey(b"\1" * 32)
    private = b"\2" * 32
    static = noise.Static(key, private, muxers=("/yamux/1.0.0",))
    payload = NoiseHandshakePayload.deserialize(static.payload)
    their_view = X25519PrivateKey.from_bytes(private).get_public_key()
    assert payload.id_pubkey.serialize() == key.public.serialized
    assert verify_handshake_payload_sig(payload, their_view)
    assert payload.extensions.stream_muxers == ["/yamux/1.0.0"]


def test_an_identity_that_did_not_sign_the_static_key_is_refused():
    alice, mallory = OwnKey(b"\1" * 32), OwnKey(b"\2" * 32)
    stolen = noise.Static(alice, b"\3" * 32)
    forged = noise.Static(mallory, b"\4" * 32)
    forged.payload = stolen.payload  # alice's identity over mallory's channel
    near = noise.Handshake(noise.Static(OwnKey(b"\5" * 32), b"\6" * 32), initiator=True, ephemeral=b"\7" * 32)
    far = noise.Handshake(forged, initiator=False, ephemeral=b"\x08" * 32)
    answer = far.receive(near.start()[2:])
    with pytest.raises(RemoteProtocolError, match="did not sign"):
        near.receive(answer[2:])


def test_a_handshake_used_out_of_turn_is_our_own_bug():
    static = noise.Static(OwnKey(b"\1" * 32), b"\2" * 32)
    far = noise.Handshake(static, initiator=False, ephemeral=b"\3" * 32)
    with pytest.raises(LocalProtocolError):
        far.start()
    with pytest.raises(LocalProtocolError):
        far.keys()


def test_a_peer_with_none_of_our_muxers_is_told_so(make_wire):
    wire = make_wire()
    wire.far.setup.static.payload = noise.Static(wire.far.key, b"\2" * 32, muxers=("/mplex/6.7.0",)).payload
    wire.far.setup.static.private = b"\2" * 32
    wire.far.connection = type(wire.far.connection)(
        wire.far.setup, wire.far, expected=None, dialer=False, ephemeral=b"\3" * 32
    )
    with pytest.raises(RemoteProtocolError, match="mplex"):
        wire.settle()


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (b"GET / HTTP/1.1\r\n\r\n" * 80, "expected|bytes"),
        (b"\x13/multistream/2.0.0\n", "expected /multistream/1.0.0"),
        (b"\x01\n" + b"\x00" * 3, "expected /multistream"),
        (b"\x03\xff\xfe\n", "UTF-8"),
        (b"\x03abc", "newline"),
        (b"\xff" * 12, "varint"),
        (b"\x80\x00", "varint"),
        (b"\x81\x10" + b"x" * 3000, "2049 bytes"),
        (multistream.message(multistream.HEADER) + b"\x0b/plaintext\n" * 17, "17|16 protocols"),
        (multistream.proposal("/noise") + b"\xff\xff" + b"x" * 100, "65535 bytes"),
        (multistream.proposal("/noise") + b"\x00\x05hello", "Noise handshake failed"),
        (multistream.proposal("/noise") + b"\x00\x21" + b"e" * 33, "payload"),
        (multistream.proposal("/noise") + b"\x00\x20" + bytes(32), "shared key"),
    ],
)
def test_nonsense_in_the_place_of_a_handshake_is_dropped_with_a_reason(make_wire, sent, reason):
    wire = make_wire()
    with pytest.raises(RemoteProtocolError, match=reason):
        wire.far.connection.receive(memoryview(bytearray(sent)), 0.0)


def test_security_that_is_not_ours_is_declined_and_noise_still_possible(make_wire):
    wire = make_wire()
    start = wire.near.take_output()
    header, rest = start[:20], start[20:]
    offer = header + b"\x0d/secio/1.0.0\n"[:1] + b"/secio/1.0.0\n"
    wire.far.connection.receive(memoryview(bytearray(offer)), 0.0)
    assert wire.far.take_output() == header + b"\x03na\n"
    wire.far.connection.receive(memoryview(bytearray(rest)), 0.0)
    assert wire.far.take_output().startswith(b"\x07/noise\n")


def test_keys_of_py_libp2p_and_ours_are_the_same():
    theirs = create_new_key_pair(b"\x0b" * 32)
    ours = OwnKey(b"\x0b" * 32)
    assert ours.public.serialized == theirs.public_key.serialize()
    assert ours.sign(b"data") == theirs.private_key.sign(b"data")
