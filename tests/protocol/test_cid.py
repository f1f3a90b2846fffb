"""CIDs: the published vectors, and what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mycel.protocol.cid import CID_BYTES, cid_from, cid_of, cid_text, cids_from, parse_cid
from mycel.protocol.errors import RemoteProtocolError

EMPTY = "bafkreihdwdcefgh4dqkjv67uzcmw7ojee6xedzdetojuzjevtenxquvyku"
"""The raw block of no bytes, as every IPFS implementation names it."""


def test_known_names() -> None:
    assert cid_text(cid_of(b"")) == EMPTY
    assert parse_cid(EMPTY) == cid_of(b"")


@given(st.binary(max_size=100))
def test_text_and_bytes_name_the_same(data: bytes) -> None:
    cid = cid_of(data)
    assert len(cid) == CID_BYTES
    assert parse_cid(cid_text(cid)) == cid == cid_from(bytes(cid))
    assert cids_from(cid + cid_of(b"x")) == [cid, cid_of(b"x")]


@given(st.text(max_size=70))
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(RemoteProtocolError):
        parse_cid(text)


@pytest.mark.parametrize(
    "text",
    [
        EMPTY.upper(),
        EMPTY[:-1],
        EMPTY + "a",
        EMPTY[:-1] + "v",  # a bit set that no byte has
        "bafybeihdwdcefgh4dqkjv67uzcmw7ojee6xedzdetojuzjevtenxquvyku",  # another codec
        "QmbFMke1KXqnYyBBWxB74N4c5SBnJMVAiMNRcGu6x1AwQH",
    ],
)
def test_other_spellings_and_kinds_are_refused(text: str) -> None:
    with pytest.raises(RemoteProtocolError):
        parse_cid(text)


@pytest.mark.parametrize(
    "raw", [b"", b"\x01\x55\x12\x20", b"\x01\x70\x12\x20" + bytes(32), bytes(36), bytes(37)]
)
def test_other_bytes_are_refused(raw: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        cid_from(raw)
