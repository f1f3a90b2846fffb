"""Signatures: RFC 8032's own vectors, and that bytes of one domain never stand for another's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mycel.protocol.identity import SigningKey, in_domain, public_of, verify, verify_peer
from mycel.protocol.keys import OwnKey
from mycel.protocol.mesh import PeerId

SEEDS = st.binary(min_size=32, max_size=32)

# RFC 8032, section 7.1, tests 1 and 3: secret, public, message, signature.
RFC8032 = [
    (
        "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        "",
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46b"
        "d25bf5f0595bbe24655141438e7a100b",
    ),
    (
        "c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7",
        "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
        "af82",
        "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac18ff9b538d16f290ae67f760984dc659"
        "4a7c15e9716ed28dc027beceea1ec40a",
    ),
]


@pytest.mark.parametrize(("secret", "public", "message", "signature"), RFC8032)
def test_signing_key_matches_rfc8032(secret: str, public: str, message: str, signature: str) -> None:
    key = SigningKey(bytes.fromhex(secret))
    assert key.public.hex() == public
    assert key.sign(bytes.fromhex(message)).hex() == signature
    assert verify(key.public, bytes.fromhex(message), bytes.fromhex(signature))


@given(seed=SEEDS, data=st.binary(max_size=64), bit=st.integers(0, 511))
def test_a_flipped_signature_bit_does_not_verify(seed: bytes, data: bytes, bit: int) -> None:
    key = SigningKey(seed)
    signature = bytearray(key.sign(data))
    assert verify(key.public, data, bytes(signature))
    signature[bit // 8] ^= 1 << bit % 8
    assert not verify(key.public, data, bytes(signature))


@given(public=st.binary(max_size=40), data=st.binary(max_size=40), signature=st.binary(max_size=80))
def test_verify_answers_for_any_bytes(public: bytes, data: bytes, signature: bytes) -> None:
    assert verify(public, data, signature) is False


@given(payload=st.binary(max_size=64), other=st.binary(max_size=64))
def test_domains_do_not_run_into_each_other(payload: bytes, other: bytes) -> None:
    assert in_domain("certificate 1", payload) != in_domain("certificate 10", other)
    assert not in_domain("certificate 1", payload).startswith(b"noise-libp2p-static-key:")


@given(seed=SEEDS)
def test_public_of_inverts_the_peer_id(seed: bytes) -> None:
    own = OwnKey(seed)
    assert public_of(own.peer_id) == SigningKey(seed).public
    assert verify_peer(own.peer_id, b"words", own.sign(b"words"))
    assert not verify_peer(own.peer_id, b"other words", own.sign(b"words"))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0OIl",
        "héllo",
        "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N",  # the hash of an RSA key
        "12D3KooWDU45KWVznP3JbRNgR38ZPFS4U9rYjD5NTJboByDKWqB",  # one character short
    ],
)
def test_public_of_refuses_what_is_no_ed25519_peer_id(text: str) -> None:
    with pytest.raises(ValueError, match="peer id"):
        public_of(PeerId(text))
    assert not verify_peer(PeerId(text), b"", bytes(64))


@pytest.mark.parametrize("size", [0, 31, 33])
def test_a_seed_has_32_bytes(size: int) -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        SigningKey(bytes(size))


def test_repr_keeps_the_seed_secret() -> None:
    seed = bytes(range(32))
    key = SigningKey(seed)
    assert key.seed == seed
    assert key.public.hex() not in repr(key)  # it is there in base58
    assert repr(seed) not in repr(key)
    assert "seed" not in repr(key)


def test_peer_ids_of_the_golden_vectors() -> None:
    vectors = json.loads((Path(__file__).parents[1] / "vectors" / "trust.json").read_text())
    for vector in vectors["peers"]:
        assert OwnKey(bytes.fromhex(vector["seed"])).peer_id == vector["peer_id"]
