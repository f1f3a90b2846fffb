"""Frames as bytes: round trips, and anything else is refused within bounds."""

from __future__ import annotations

import contextlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mycel.compute.engine import Sampled
from mycel.compute.infer.frame import BODY_BYTES_MAX, HEADER_BYTES_MAX, FrameReader, encode_frame
from mycel.compute.infer.messages import CreditFrame, Frame, NoticeFrame, StepFrame, TokenFrame
from mycel.protocol.errors import RemoteProtocolError
from mycel.protocol.mesh import PeerId
from mycel.protocol.tensor import Tensor

FRAMES: list[Frame] = [
    StepFrame("s", 1, 0, 3, (1, 2, 3)),
    StepFrame("s", 2, 7, 2, None, Tensor("float32", (2, 3), bytes(range(24)))),
    TokenFrame("s", 3, 9, Sampled(5, -0.5, ((5, -0.5), (6, -1.0)), 0.25)),
    CreditFrame("s", 4, 100),
    NoticeFrame("s", 5, "link", PeerId("p"), "gone"),
    NoticeFrame("s", 5, "gap", None, ""),
]


def plain(frame: Frame) -> object:
    if isinstance(frame, StepFrame) and frame.hidden is not None:
        hidden = frame.hidden
        return (
            frame.session,
            frame.epoch,
            frame.position,
            frame.count,
            hidden.dtype,
            hidden.shape,
            bytes(hidden.data),
        )
    return frame


@given(st.lists(st.integers(1, 50), max_size=40))
def test_frames_come_out_as_they_went_in_however_the_bytes_are_cut(cuts: list[int]) -> None:
    data = b"".join(encode_frame(frame) for frame in FRAMES)
    reader, out, at = FrameReader(), [], 0
    for cut in [*cuts, len(data)]:
        out += list(reader.feed(memoryview(data)[at : at + cut]))
        at += cut
    assert [plain(frame) for frame in out] == [plain(frame) for frame in FRAMES]


@given(st.integers(0, 10**6), st.integers(1, 255))
def test_a_flipped_byte_gives_a_frame_or_a_refusal(at: int, flip: int) -> None:
    data = bytearray(b"".join(encode_frame(frame) for frame in FRAMES))
    data[at % len(data)] ^= flip
    try:
        for frame in FrameReader().feed(data):
            if isinstance(frame, StepFrame):
                assert frame.position >= 0
                assert frame.count == (len(frame.tokens) if frame.tokens else frame.hidden.shape[0])  # type: ignore[union-attr]
    except RemoteProtocolError:
        pass


@given(st.binary(max_size=200))
def test_noise_is_refused_or_waits_for_more(noise: bytes) -> None:
    with contextlib.suppress(RemoteProtocolError):
        assert list(FrameReader().feed(noise)) == []


@pytest.mark.parametrize("lengths", [(HEADER_BYTES_MAX + 1, 0), (10, BODY_BYTES_MAX + 1)])
def test_a_frame_too_large_is_refused_before_it_is_read(lengths: tuple[int, int]) -> None:
    with pytest.raises(RemoteProtocolError, match="bytes"):
        list(FrameReader().feed(struct.pack(">II", *lengths)))


@pytest.mark.parametrize(
    "frame",
    [
        StepFrame("s", 1, -1, 1, (1,)),
        StepFrame("s", 1, 0, 2, (1,)),
        StepFrame("s", 1, 0, 1),
        StepFrame("s", 1, 0, 1, (1,), Tensor("int8", (1, 1), b"x")),
        StepFrame("s", 1, 0, 2, None, Tensor("int8", (1, 1), b"x")),
        StepFrame("s", 1, 0, 1, None, Tensor("int8", (1, 2), b"x")),
        StepFrame("s", 1, 0, 1, None, Tensor("complex", (1, 1), b"x")),
    ],
)
def test_a_step_that_contradicts_itself_is_refused(frame: StepFrame) -> None:
    with pytest.raises(RemoteProtocolError):
        list(FrameReader().feed(encode_frame(frame)))
