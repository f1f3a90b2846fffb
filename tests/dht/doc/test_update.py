"""What may reach pycrdt, and what it makes of it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycrdt import Array, Doc, Map, Text

from mycel.dht.doc.content import Content, rebuilt
from mycel.dht.doc.update import CLIENT_ID, ROOT, check_update
from mycel.protocol.errors import RemoteProtocolError

keys = st.text(min_size=1, max_size=4)
changes = st.dictionaries(keys, st.none() | st.binary(max_size=20), max_size=4)


@given(st.lists(changes, max_size=12))
def test_updates_make_the_same_content_and_the_same_rebuilt_bytes(
    steps: list[dict[str, bytes | None]],
) -> None:
    model: dict[str, bytes] = {}
    writer, reader = Content(), Content()
    for step in steps:
        update = writer.change(step)
        if update:
            reader.apply(update)
            reader.apply(update)
        for key, value in step.items():
            if value is None:
                model.pop(key, None)
            else:
                model[key] = value
    assert writer.live == reader.live == model
    assert writer.live_bytes == reader.live_bytes >= len(rebuilt(model)) - 20
    snapshot = rebuilt(reader.live)
    assert snapshot == rebuilt(writer.live)
    again = Content()
    if snapshot:
        again.apply(snapshot)
    assert again.live == writer.live
    assert rebuilt(again.live) == snapshot


@given(st.binary(max_size=60))
def test_any_bytes_are_applied_or_refused(data: bytes) -> None:
    content = Content()
    try:
        content.apply(data)
    except RemoteProtocolError:
        return
    assert all(isinstance(value, bytes) for value in content.live.values())


@given(st.data())
def test_damaged_updates_are_applied_or_refused(data: st.DataObject) -> None:
    writer = Content()
    writer.change({"a": b"1", "b": b"2"})
    update = bytearray(writer.change({"a": b"3", "b": None, "c": b"x" * 200}))
    for _ in range(data.draw(st.integers(1, 3))):
        update[data.draw(st.integers(0, len(update) - 1))] = data.draw(st.integers(0, 255))
    content = Content()
    try:
        content.apply(bytes(update[: data.draw(st.integers(1, len(update)))]))
    except RemoteProtocolError:
        return
    assert all(isinstance(value, bytes) for value in content.live.values())


def test_deeply_nested_values_never_reach_pycrdt() -> None:
    # pycrdt 0.14.13 recurses: applying this one would end the process with a segmentation fault.
    plain = Content().change({"k": b"v"})
    value = plain.index(b"t\x01v")
    bomb = plain[:value] + b"\x75\x01" * 100_000 + plain[value:]
    with pytest.raises(RemoteProtocolError, match="not bytes"):
        check_update(bomb)


def foreign_updates() -> list[bytes]:
    """What pycrdt would take, and a document is not written in."""
    other, nested, text, array, root = (Doc(client_id=n) for n in (2, 1, 1, 1, 1))
    other.get(ROOT, type=Map)["k"] = b"v"
    nested.get(ROOT, type=Map)["k"] = Map({"a": b"b"})
    text.get(ROOT, type=Text).insert(0, "words")
    array.get(ROOT, type=Array).append(b"v")
    root.get("elsewhere", type=Map)["k"] = b"v"
    word = Doc(client_id=CLIENT_ID)
    word.get(ROOT, type=Map)["k"] = "not bytes"
    return [doc.get_update() for doc in (other, nested, text, array, root, word)]


@pytest.mark.parametrize("number", range(6))
def test_what_a_document_is_not_written_in_is_refused(number: int) -> None:
    with pytest.raises(RemoteProtocolError):
        check_update(foreign_updates()[number])
