"""What may reach pycrdt, and what it makes of it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycrdt import Array, Doc, Map, Text

from mycel.dht.doc.content import Content, Writer, rebuilt
from mycel.dht.doc.update import CLIENT_ID, ROOT, read_update
from mycel.protocol.errors import RemoteProtocolError

ONE_KEY = b"\x01\x01\x01\x00(\x01\x03doc\x01a\x01t\x01v"
"""An update that begins the key `a`, up to what it deletes."""

keys = st.text(min_size=1, max_size=4)
changes = st.dictionaries(keys, st.none() | st.binary(max_size=20), max_size=4)


@given(st.lists(changes, max_size=12))
def test_updates_make_the_same_content_and_the_same_rebuilt_bytes(
    steps: list[dict[str, bytes | None]],
) -> None:
    model: dict[str, bytes] = {}
    writer, reader = Writer(), Content()
    updates = []
    for step in steps:
        update = writer.change(step)
        if update:
            reader.apply(update)
            updates.append(update)
        for key, value in step.items():
            if value is None:
                model.pop(key, None)
            else:
                model[key] = value
    assert reader.live == model
    snapshot = rebuilt(reader.live)
    assert reader.live_bytes >= len(snapshot) - 20
    assert Content([snapshot]).live == model
    assert rebuilt(dict(reversed(model.items()))) == snapshot
    reloaded: Doc[Map[bytes]] = Doc()  # any Yjs implementation reads the same of it
    for update in updates:
        reloaded.apply_update(update)
    assert reloaded.get(ROOT, type=Map).to_py() == model


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
    writer, content = Writer(), Content()
    content.apply(writer.change({"a": b"1", "b": b"2"}))
    update = bytearray(writer.change({"a": b"3", "b": None, "c": b"x" * 200}))
    for _ in range(data.draw(st.integers(1, 3))):
        update[data.draw(st.integers(0, len(update) - 1))] = data.draw(st.integers(0, 255))
    try:
        content.apply(bytes(update[: data.draw(st.integers(1, len(update)))]))
    except RemoteProtocolError:
        return
    assert all(isinstance(value, bytes) for value in content.live.values())


def test_deeply_nested_values_never_reach_pycrdt() -> None:
    # pycrdt 0.14.13 recurses: applying this one would end the process with a segmentation fault.
    plain = Writer().change({"k": b"v"})
    value = plain.index(b"t\x01v")
    bomb = plain[:value] + b"\x75\x01" * 100_000 + plain[value:]
    with pytest.raises(RemoteProtocolError, match="not bytes"):
        read_update(bomb)


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


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"\x01\x00\x01\x7f\x00", "says nothing"),  # pycrdt 0.14.13 panics on these
        (ONE_KEY + b"\x01\x01\x01\x01\x01", "not there"),
        (ONE_KEY + b"\x01\x01\x02\x00\x01\x00\x01", "not there"),
        (b"\x00\x01\x01\x01\x00\x7f", "more than there is"),
        (b"\x00\x00\x00", "behind its end"),
        (ONE_KEY[:3] + b"\x07(\x01\x03doc\x01a\x01t\x01v\x00", "clock 7"),
        (b"\x01\x01\x01\x00\x88\x01\x05\x01t\x01v\x00", "latest"),
        (b"\x01\x02\x01\x00" + b"(\x01\x03doc\x01a\x01t\x01v" * 2 + b"\x00", "second time"),
    ],
)
def test_updates_that_continue_nothing_are_refused(data: bytes, why: str) -> None:
    with pytest.raises(RemoteProtocolError, match=why):
        Content().apply(data)


def test_the_update_that_the_refused_ones_are_made_of_is_fine() -> None:
    assert Content([ONE_KEY + b"\x00"]).live == {"a": b"v"}
    assert Content([ONE_KEY + b"\x01\x01\x01\x00\x01"]).live == {}


@pytest.mark.parametrize("number", range(6))
def test_what_a_document_is_not_written_in_is_refused(number: int) -> None:
    with pytest.raises(RemoteProtocolError):
        read_update(foreign_updates()[number])
