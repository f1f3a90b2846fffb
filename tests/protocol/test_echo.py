"""The bytes of an address echo: what was seen comes back, and nothing else passes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mycel.protocol import echo
from mycel.protocol.address import tcp_addr
from mycel.protocol.errors import RemoteProtocolError

KEY_ID, KEY, NONCE = b"i" * 8, b"k" * 16, b"n" * 16
SEEN = tcp_addr("11.1.2.3", 40000)
hosts = st.one_of(
    st.ip_addresses(v=4).map(str), st.ip_addresses(v=6).filter(lambda ip: not ip.ipv4_mapped).map(str)
)


@given(hosts, st.integers(1, 65535), st.integers(0, 1), st.binary(min_size=16, max_size=16))
def test_what_was_seen_comes_back(host, port, index, nonce):
    seen = tcp_addr(host, port)
    question = echo.ask(KEY_ID, KEY, nonce, index)
    assert len(question) == echo.QUESTION_BYTES
    assert echo.key_id_of(question) == KEY_ID
    answer = echo.answer(question, KEY, index, seen)
    assert len(answer) == echo.ANSWER_BYTES
    assert echo.read_answer(answer, KEY, nonce, index) == seen


@given(st.integers(0, echo.QUESTION_BYTES - 1), st.integers(1, 255))
def test_a_question_with_a_changed_byte_is_refused_unless_it_names_another_key(at, change):
    question = bytearray(echo.ask(KEY_ID, KEY, NONCE, 0))
    question[at] ^= change
    if at < echo.KEY_ID_BYTES:
        assert echo.key_id_of(bytes(question)) != KEY_ID
        return
    with pytest.raises(RemoteProtocolError):
        echo.answer(bytes(question), KEY, 0, SEEN)


@given(st.integers(0, echo.ANSWER_BYTES - 1), st.integers(1, 255))
def test_an_answer_with_a_changed_byte_is_refused(at, change):
    answer = bytearray(echo.answer(echo.ask(KEY_ID, KEY, NONCE, 1), KEY, 1, SEEN))
    answer[at] ^= change
    with pytest.raises(RemoteProtocolError):
        echo.read_answer(bytes(answer), KEY, NONCE, 1)


def test_a_question_to_one_port_is_none_to_the_other():
    with pytest.raises(RemoteProtocolError):
        echo.answer(echo.ask(KEY_ID, KEY, NONCE, 0), KEY, 1, SEEN)


def test_an_answer_of_one_port_is_none_of_the_other_nor_to_another_nonce():
    answer = echo.answer(echo.ask(KEY_ID, KEY, NONCE, 0), KEY, 0, SEEN)
    with pytest.raises(RemoteProtocolError):
        echo.read_answer(answer, KEY, NONCE, 1)
    with pytest.raises(RemoteProtocolError):
        echo.read_answer(answer, KEY, b"m" * 16, 0)


@pytest.mark.parametrize("size", [0, 1, echo.QUESTION_BYTES - 1, echo.QUESTION_BYTES + 1])
def test_questions_of_another_size_are_refused(size):
    with pytest.raises(RemoteProtocolError):
        echo.answer(b"x" * size, KEY, 0, SEEN)


@pytest.mark.parametrize("size", [0, echo.ANSWER_BYTES - 1, echo.ANSWER_BYTES + 1])
def test_answers_of_another_size_are_refused(size):
    with pytest.raises(RemoteProtocolError):
        echo.read_answer(b"x" * size, KEY, NONCE, 0)


def test_the_address_does_not_stand_in_the_answer_for_a_nat_to_rewrite():
    answer = echo.answer(echo.ask(KEY_ID, KEY, NONCE, 0), KEY, 0, SEEN)
    assert bytes([11, 1, 2, 3]) not in answer
