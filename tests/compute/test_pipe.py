"""Frames between daemon and worker: whole whatever the pieces, and refused when they are none."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mycel.compute.engine import Done, Sampling, Span, Work
from mycel.compute.pipe import SMALL_BYTES, STEP, FrameReceiver, advance
from mycel.protocol.errors import RemoteProtocolError
from mycel.protocol.frame import FrameKind, pack
from mycel.protocol.tensor import Tensor


def put(receiver: FrameReceiver, data: bytes, most: int) -> list[tuple[int, bytes, list[bytes]]]:
    """Hand over `data` in reads of at most `most` bytes; the frames that came, as (number, body, raws)."""
    frames, at = [], 0
    while at < len(data):
        room = receiver.room()
        assert len(room) > 0
        count = min(most, len(room), len(data) - at)
        room[:count] = data[at : at + count]
        receiver.got(count)
        at += count
        while (frame := receiver.next()) is not None:
            frames.append((frame.call, bytes(frame.body), [bytes(raw) for raw in frame.raws]))
    return frames


sizes = st.lists(
    st.sampled_from([0, 1, 100, 5000, SMALL_BYTES // 2, SMALL_BYTES, 3 * SMALL_BYTES]), max_size=3
)


@given(st.lists(sizes, max_size=6), st.sampled_from([1000, 4096, SMALL_BYTES, 1 << 20]))
@settings(deadline=None, max_examples=60)
def test_frames_come_whole_and_in_order(shapes: list[list[int]], most: int) -> None:
    data, wanted = bytearray(), []
    for number, lengths in enumerate(shapes):
        raws = [bytes([number]) * length for length in lengths]
        body = b"body" * number
        data += b"".join(bytes(part) for part in pack(FrameKind.RESPONSE, number, body, raws=raws))
        wanted.append((number, body, raws))
    assert put(FrameReceiver(), bytes(data), most) == wanted


def test_bytes_one_by_one() -> None:
    data = b"".join(bytes(part) for part in pack(FrameKind.ITEM, 5, b"abc", raws=[b"xyz"]))
    assert put(FrameReceiver(), data * 3, 1) == [(5, b"abc", [b"xyz"])] * 3


@given(st.binary(min_size=20, max_size=200))
def test_garbage_is_refused_or_waits(data: bytes) -> None:
    receiver = FrameReceiver(size_max=1 << 20)
    try:
        put(receiver, data, 64)
    except RemoteProtocolError:
        return
    assert data[4] < 6, "an unknown kind was taken"
    assert int.from_bytes(data[:4], "big") <= 1 << 20, "more than allowed was taken"


def test_a_frame_beyond_the_bound_takes_no_memory() -> None:
    with pytest.raises(RemoteProtocolError, match="more than"):
        put(FrameReceiver(size_max=1000), pack(FrameKind.ITEM, 1, bytes(1001))[0][:20], 20)


@given(st.lists(st.binary(max_size=20), max_size=8), st.integers(0, 200))
def test_what_is_left_to_send(parts: list[bytes], sent: int) -> None:
    whole = b"".join(parts)
    sent = min(sent, len(whole))
    assert b"".join(bytes(part) for part in advance(parts, sent)) == whole[sent:]


def test_tensors_of_a_step_are_views_that_torch_may_write() -> None:
    hidden = Tensor("float32", (2, 3), bytes(range(24)))
    works = [
        Work("s", Span(1, 2), 4, hidden=hidden, sampling=Sampling(temperature=0.5)),
        Work("t", Span(0, 1), 0),
    ]
    body, raws = STEP.request.encode(works)
    receiver = FrameReceiver()
    for part in pack(FrameKind.REQUEST, 1, body, name=STEP.name, raws=raws):
        room = receiver.room()
        room[: len(part)] = part
        receiver.got(len(part))
    frame = receiver.next()
    assert frame is not None
    first, second = STEP.request.decode(frame.body, frame.raws)
    assert (first.session, first.span, first.position, first.sampling) == (
        "s",
        Span(1, 2),
        4,
        works[0].sampling,
    )
    assert second == works[1]
    assert first.hidden is not None
    assert not memoryview(first.hidden.data).readonly
    assert bytes(first.hidden.data) == bytes(range(24))
    done = Done("s", 4, hidden=first.hidden)
    (back,) = STEP.response.decode(*STEP.response.encode([done]))
    assert back.hidden is not None
    assert back.hidden.data is not None
    assert bytes(back.hidden.data) == bytes(range(24))
