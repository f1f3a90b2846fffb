"""Keys and peer ids, against py-libp2p and libp2p's own test vectors."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st
from libp2p.crypto import rsa, secp256k1
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.peer.id import ID

from mycel.protocol import varint
from mycel.protocol.errors import RemoteProtocolError
from mycel.protocol.keys import (
    OwnKey,
    PublicKey,
    key_of,
    peer_id_bytes,
    peer_id_text,
    serialize,
)

# libp2p specs/peer-ids, "Test vectors"
SPEC_ED25519 = bytes.fromhex("080112201ed1e8fae2c4a144b8be8fd4b47bf3d3b34b871c3cacf6010f0e42d474fce27e")
SPEC_SECP256K1 = bytes.fromhex("08021221037777e994e452c21604f91de093ce415f5432f701dd8cd1a7a6fea0e630bfca99")
SPEC_ECDSA = bytes.fromhex(
    "0803125b3059301306072a8648ce3d020106082a8648ce3d03010703420004de3d300fa36ae0e8f5d530899d83abab44abf3161f16"
    "2a4bc901d8e6ecda020e8b6d5f8da30525e71d6851510c098e5c47c646a597fb4dcec034e9f77c409e62"
)


@given(st.binary(min_size=32, max_size=32))
def test_ed25519_peer_ids_are_those_of_py_libp2p(seed):
    ours, theirs = OwnKey(seed), create_new_key_pair(seed)
    assert ours.peer_id == ID.from_pubkey(theirs.public_key).to_string()
    assert peer_id_bytes(ours.peer_id) == ID.from_pubkey(theirs.public_key).to_bytes()
    assert key_of(ours.peer_id).verify(b"x", ours.sign(b"x"))


@pytest.mark.parametrize(
    "make",
    [lambda: secp256k1.create_new_key_pair(b"\x05" * 32), lambda: rsa.create_new_key_pair(2048)],
    ids=["secp256k1", "rsa"],
)
def test_foreign_keys_verify_and_name_the_same_peer(make):
    theirs = make()
    key = PublicKey(theirs.public_key.serialize())
    assert key.peer_id == ID.from_pubkey(theirs.public_key).to_string()
    signature = theirs.private_key.sign(b"data")
    assert key.verify(b"data", signature)
    assert not key.verify(b"date", signature)


def test_ecdsa_keys_verify():
    private = ec.generate_private_key(ec.SECP256R1())
    raw = private.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    key = PublicKey(b"\x08\x03\x12" + varint.prefixed(raw))
    signature = private.sign(b"data", ec.ECDSA(hashes.SHA256()))
    assert key.verify(b"data", signature)
    assert not key.verify(b"date", signature)


@pytest.mark.parametrize("raw", [SPEC_ED25519, SPEC_SECP256K1, SPEC_ECDSA])
def test_the_specs_keys_load(raw):
    key = PublicKey(raw)
    assert key.serialized == raw
    assert not key.verify(b"data", b"\0" * 64)


def test_a_peer_id_of_a_long_key_is_its_hash_and_holds_no_key():
    key = PublicKey(SPEC_ECDSA)
    assert key.peer_id.startswith("Qm")
    assert key_of(key.peer_id) is None


def test_a_signature_of_another_length_does_not_hold():
    key = OwnKey(b"\1" * 32)
    for signature in (b"", b"x", b"\0" * 63, b"\0" * 65):
        assert not key.public.verify(b"data", signature)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\x08\x01",
        b"\x08\x01\x12\x1f" + b"x" * 31,
        b"\x08\x09\x12\x20" + b"x" * 32,
        b"\x08\x00\x12\x04abcd",
        b"\x08\x02\x12\x21" + b"\xff" * 33,
        SPEC_ECDSA.replace(b"\x08\x03", b"\x08\x00", 1),
        SPEC_ED25519 + b"\xff",
        b"\x08\x01\x12\x20" + b"x" * 5000,
    ],
)
def test_what_is_no_key_is_refused(raw):
    with pytest.raises(RemoteProtocolError):
        PublicKey(raw)


def test_weak_rsa_is_refused():
    with pytest.raises(RemoteProtocolError, match="1024 bits"):
        PublicKey(rsa.create_new_key_pair(1024).public_key.serialize())


@given(st.binary(max_size=60))
def test_bytes_that_are_no_peer_id_are_refused(raw):
    try:
        text = peer_id_text(raw)
    except ValueError:
        return
    assert peer_id_bytes(text) == raw


@pytest.mark.parametrize("text", ["", "nonsense", "0OIl", "12D3KooW", "Qm" + "a" * 20])
def test_text_that_is_no_peer_id_is_refused(text):
    with pytest.raises(ValueError, match="peer id"):
        peer_id_bytes(text)


def test_a_seed_has_32_bytes():
    with pytest.raises(ValueError, match="32"):
        OwnKey(b"short")
    assert PublicKey(serialize(b"\x01" * 32)).serialized[:4] == b"\x08\x01\x12\x20"
