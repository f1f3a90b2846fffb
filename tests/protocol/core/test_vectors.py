"""Golden bytes of the wire: what one seeded conversation looks like must never change by accident.

To renew them after a wanted change delete tests/vectors/core.json and run this file once.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from multiaddr import Multiaddr

from mycel.protocol import identify, multistream, varint
from mycel.protocol.identify import Identity, PeerRecord
from mycel.protocol.keys import OwnKey
from mycel.protocol.sealed import Opener

VECTORS = Path(__file__).parents[2] / "vectors" / "core.json"


def conversation(make_wire, *, muxers):
    """Every packet of a handshake and of one request and answer, in hex, sender first."""
    wire = make_wire(muxers=muxers, seed=2026)
    packets = []

    def carry(source, target):
        data = source.take_output()
        if data:
            packets.append(("near" if source is wire.near else "far", data.hex()))
            target.connection.receive(memoryview(bytearray(data)), wire.now)
        return bool(data)

    def settle():
        while carry(wire.near, wire.far) | carry(wire.far, wire.near):
            pass

    settle()
    channel = wire.near.open()
    channel.prefix = multistream.proposal("/golden/1")
    channel.try_send(b"request", end=True)
    settle()
    (inbound,) = wire.far.inbound
    inbound.prefix = multistream.proposal("/golden/1")
    inbound.try_send(b"answer", end=True)
    wire.near.connection.session.ping(wire.now)
    settle()
    wire.near.connection.session.go_away(0)
    settle()
    return packets


def make_vectors(make_wire):
    key = OwnKey(bytes(range(32)))
    addrs = (Multiaddr("/ip4/192.0.2.1/tcp/4001"), Multiaddr("/dns4/example.org/tcp/443"))
    record = identify.seal_record(key, PeerRecord(key.peer_id, 7, addrs))
    said = Identity("golden/1", ("/ipfs/ping/1.0.0",), addrs, Multiaddr("/ip4/198.51.100.9/tcp/1234"))
    return {
        "peer id of the key 00..1f": key.peer_id,
        "public key": key.public.serialized.hex(),
        "multistream proposal of /noise": multistream.proposal("/noise").hex(),
        "varint 300": varint.encode(300).hex(),
        "signed peer record": record.hex(),
        "identify": identify.write(key.public, said, record).hex(),
        "conversation, muxer in the handshake": conversation(make_wire, muxers=True),
        "conversation, muxer negotiated": conversation(make_wire, muxers=False),
    }


def test_the_wire_is_what_it_was(make_wire):
    vectors = json.loads(json.dumps(make_vectors(make_wire)))
    if not VECTORS.exists():
        VECTORS.write_text(json.dumps(vectors, indent=1) + "\n")
        pytest.fail("there were no vectors; they are written now: look at them and commit them")
    assert vectors == json.loads(VECTORS.read_text())


def test_the_vectors_hold_what_the_specs_say():
    """The parts that can be read without a key, by hand."""
    vectors = json.loads(VECTORS.read_text())
    packets = [(who, bytes.fromhex(data)) for who, data in vectors["conversation, muxer in the handshake"]]
    assert packets[0][0] == "near"
    assert packets[0][1][:28] == b"\x13/multistream/1.0.0\n\x07/noise\n"
    assert packets[0][1][28:30] == b"\x00\x20"
    assert packets[1][0] == "far"
    assert packets[1][1][:28] == packets[0][1][:28]
    assert vectors["varint 300"] == "ac02"
    assert vectors["peer id of the key 00..1f"].startswith("12D3KooW")


def test_a_message_of_one_known_key_opens():
    """ChaCha20-Poly1305 with the nonce 0 of four zero bytes and a little-endian counter, as Noise has it."""
    key = bytes(range(32))
    sealed = b"".join(
        len(body).to_bytes(2, "big") + body
        for number in range(3)
        for body in [ChaCha20Poly1305(key).encrypt(bytes(4) + number.to_bytes(8, "little"), b"abc", None)]
    )
    got = []
    Opener(key).receive(memoryview(bytearray(sealed)), lambda plain: got.append(bytes(plain)))
    assert got == [b"abc"] * 3
