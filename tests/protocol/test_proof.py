"""The proof on a punched socket: the pair proves itself, nobody else does, in any cut of roles and bytes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mycel.protocol.errors import RemoteProtocolError
from mycel.protocol.mesh import PeerId
from mycel.protocol.proof import CHOSEN, Proof, proof_key

A, B = PeerId("A"), PeerId("B")
KEY = proof_key(A, B, (b"a" * 32, b"b" * 32))


def pair(key=KEY, other=KEY):
    return Proof(key, asks=True, nonce=b"n" * 16), Proof(other, asks=False, nonce=b"m" * 16)


def test_two_peers_with_one_key_choose_a_socket():
    asks, answers = pair()
    assert len(asks.outgoing) == len(answers.outgoing) == asks.needs == answers.needs == 48
    answers.receive(asks.outgoing)
    assert answers.is_proven
    assert not answers.is_done
    asks.receive(answers.outgoing)
    assert asks.is_done
    assert answers.needs == 1
    answers.receive(CHOSEN)
    assert answers.is_done


def test_the_key_belongs_to_one_exchange_of_two_peers_in_their_roles():
    shares = b"a" * 32, b"b" * 32
    keys = [
        KEY,
        proof_key(B, A, shares),
        proof_key(A, PeerId("C"), shares),
        proof_key(A, B, (b"x" * 32, b"b" * 32)),
        proof_key(A, B, (b"b" * 32, b"a" * 32)),
    ]
    assert len(set(keys)) == len(keys)


def test_another_key_proves_nothing_to_either_side():
    asks, answers = pair(other=b"k" * 32)
    with pytest.raises(RemoteProtocolError, match="stranger"):
        answers.receive(asks.outgoing)
    with pytest.raises(RemoteProtocolError, match="stranger"):
        asks.receive(answers.outgoing)


def test_what_one_side_said_cannot_be_said_back_to_it():
    for side in pair():
        with pytest.raises(RemoteProtocolError, match="stranger"):
            side.receive(side.outgoing)


def test_a_socket_is_chosen_by_its_byte_only():
    asks, answers = pair()
    answers.receive(asks.outgoing)
    with pytest.raises(RemoteProtocolError, match="not chosen"):
        answers.receive(b"\x02")


@given(st.integers(0, 47), st.integers(1, 255))
def test_every_flipped_bit_of_a_proof_is_noticed(index, flip):
    asks, answers = pair()
    data = bytearray(asks.outgoing)
    data[index] ^= flip
    with pytest.raises(RemoteProtocolError, match="stranger"):
        answers.receive(bytes(data))
    assert not answers.is_proven
