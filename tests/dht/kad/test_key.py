"""Keys: distance, shared bits, and names that fall where they should."""

from __future__ import annotations

import hashlib

from hypothesis import given
from hypothesis import strategies as st

from mycel.dht.kad.key import BITS, key_of, key_of_peer, name_near, peer_of_bytes, shared_bits
from mycel.protocol.keys import peer_id_bytes

keys = st.integers(0, (1 << BITS) - 1)


@given(keys, keys)
def test_shared_bits_are_those_of_the_written_out_keys(one, other):
    texts = [f"{key:0256b}" for key in (one, other)]
    same = next((index for index in range(BITS) if texts[0][index] != texts[1][index]), BITS)
    assert shared_bits(one, other) == same


@given(keys, keys, keys)
def test_who_shares_more_bits_is_nearer(own, one, other):
    if shared_bits(own, one) > shared_bits(own, other):
        assert own ^ one < own ^ other


def test_a_peers_key_is_the_hash_of_its_id(contact):
    peer = contact(1).peer
    assert key_of_peer(peer) == int.from_bytes(hashlib.sha256(peer_id_bytes(peer)).digest(), "big")
    assert peer_of_bytes(peer_id_bytes(peer)) == peer


@given(keys, st.integers(0, 9), st.binary(min_size=16, max_size=16))
def test_names_fall_into_the_bucket_they_are_made_for(own, bits, entropy):
    name = name_near(own, bits, entropy)
    if name is not None:  # once in e**4 draws none is found
        assert shared_bits(own, key_of(name)) == bits
