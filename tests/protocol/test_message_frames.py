"""Frames: any cut of the bytes gives the same frames, and no bytes give anything but frames or a clear no."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mycel.protocol.errors import RemoteProtocolError
from mycel.protocol.frame import ALIGN, HEAD, HEAD_BYTES, REQUEST, SMALL_BYTES, FrameReader, pack, split

SIZE_MAX = 1 << 20

frames = st.fixed_dictionaries(
    {
        "kind": st.integers(0, 5),
        "call": st.integers(0, (1 << 64) - 1),
        "body": st.binary(max_size=200),
        "raws": st.lists(st.binary(max_size=100), max_size=4),
        "name": st.binary(max_size=20),
        "deadline_ms": st.integers(0, (1 << 32) - 1),
    }
)


def wire(fields) -> bytes:
    return b"".join(pack(**fields))


def seen(frame):
    return {
        "kind": frame.kind,
        "call": frame.call,
        "body": bytes(frame.body),
        "raws": [bytes(raw) for raw in frame.raws],
        "name": frame.name,
        "deadline_ms": frame.deadline_ms,
    }


def read_all(reader: FrameReader) -> list:
    found = []
    while (frame := reader.next()) is not None:
        found.append(frame)
    return found


@given(st.lists(frames, max_size=5), st.data())
def test_reader_gives_back_what_was_packed_however_it_is_cut(sent, data):
    stream = b"".join(map(wire, sent))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    reader = FrameReader(SIZE_MAX)
    got = []
    used = 0
    for begin, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        reader.feed(memoryview(stream)[begin:end])
        if data.draw(st.booleans()):
            got += read_all(reader)
        used += reader.used()
    got += read_all(reader)
    used += reader.used()
    assert [seen(frame) for frame in got] == sent
    assert used == len(stream)
    assert reader.is_empty


@given(st.lists(frames, max_size=5), st.integers(0, 400))
def test_split_gives_whole_frames_and_leaves_the_rest(sent, short):
    stream = b"".join(map(wire, sent))
    chunk = stream[: max(len(stream) - short, 0)]
    got, used = split(memoryview(chunk), SIZE_MAX)
    assert [seen(frame) for frame in got] == sent[: len(got)]
    assert used == sum(len(wire(each)) for each in sent[: len(got)])
    assert len(got) == len(sent) or len(chunk) < used + len(wire(sent[len(got)]))


@pytest.mark.parametrize("size", [SMALL_BYTES - 100, SMALL_BYTES + 1, 300_000])
def test_a_large_frame_is_received_into_its_own_buffer_and_aligned(size):
    raws = [bytes([1]) * size, bytes([2]) * 7]
    stream = wire({"kind": REQUEST, "call": 1, "body": b"b", "raws": raws, "name": b"m"})
    reader = FrameReader(SIZE_MAX)
    used = 0
    for begin in range(0, len(stream), 5000):
        reader.feed(stream[begin : begin + 5000])
        if begin + 5000 < len(stream):
            assert reader.next() is None
        used += reader.used()
        if size > SMALL_BYTES and begin:
            assert used > begin  # credited while it comes: a frame may be larger than the window
    frame = reader.next()
    assert [bytes(raw) for raw in frame.raws] == raws
    assert frame.raws[0].obj is frame.raws[1].obj  # views, not copies
    whole = memoryview(frame.raws[0].obj)
    begins = [bytes(whole).find(bytes(raw)) for raw in frame.raws]
    assert all(begin % ALIGN == 0 for begin in begins)


def test_what_is_not_consumed_is_not_credited():
    stream = wire({"kind": 3, "call": 1, "body": bytes(1000)})
    reader = FrameReader(SIZE_MAX)
    reader.feed(stream * 3)
    assert reader.used() == 0
    reader.next()
    assert reader.used() == len(stream)


@pytest.mark.parametrize(
    ("head", "rest", "why"),
    [
        ((0, 6, 0, 0, 1, 0), b"", "unknown kind 6"),
        ((SIZE_MAX + 1, 0, 0, 0, 1, 0), b"", "more than the"),
        ((3, 0, 4, 0, 1, 0), b"abc", "name of 4"),
        ((7, 0, 0, 1, 1, 0), bytes(7), "cannot hold 1 lengths"),
        ((8, 0, 0, 1, 1, 0), b"\0\0\0\x01\0\0\0\0", "parts need"),
        ((8, 0, 0, 1, 1, 0), b"\0\0\0\0\xff\xff\xff\xff", "parts need"),
        ((12, 0, 0, 1, 1, 0), bytes(12), "parts need"),
    ],
)
def test_impossible_frames_are_named(head, rest, why):
    stream = HEAD.pack(*head) + rest
    with pytest.raises(RemoteProtocolError, match=why):
        split(memoryview(stream), SIZE_MAX)
    reader = FrameReader(SIZE_MAX)
    reader.feed(stream)
    with pytest.raises(RemoteProtocolError, match=why):
        reader.next()


@given(st.binary(max_size=300))
@example(bytes(HEAD_BYTES))
@example(b"\xff" * HEAD_BYTES)
def test_any_bytes_are_frames_or_a_clear_no(junk):
    def tried(read) -> str:
        try:
            read()
        except RemoteProtocolError as error:
            return str(error)
        return ""

    def by_reader() -> None:
        reader = FrameReader(200)
        for begin in range(0, len(junk), 7):
            reader.feed(junk[begin : begin + 7])
            read_all(reader)

    assert tried(by_reader) == tried(lambda: split(memoryview(junk), 200))


@given(frames, st.integers(0, 10**6), st.integers(1, 255))
def test_a_flipped_byte_is_a_frame_or_a_clear_no(fields, where, flip):
    stream = bytearray(wire(fields))
    stream[where % len(stream)] ^= flip
    reader = FrameReader(SIZE_MAX)
    reader.feed(stream)
    try:
        frame = reader.next()
    except RemoteProtocolError:
        return
    assert frame is None or frame.size <= len(stream) - HEAD_BYTES
