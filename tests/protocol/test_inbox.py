"""The reading half of streams in memory: order, sizes, the end, the loss, and one reader."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from mycel.protocol.errors import RemoteProtocolError, StreamReset
from mycel.protocol.inbox import Inbox


@given(st.lists(st.binary(min_size=1, max_size=9)), st.integers(1, 7))
def test_all_bytes_come_in_order_in_pieces_that_fit_and_are_told_as_taken(
    pieces: list[bytes], size: int
) -> None:
    taken: list[int] = []
    inbox = Inbox("x", taken.append)
    for piece in pieces:
        inbox.put(piece)
    inbox.end()
    got: list[bytes] = []

    async def read() -> None:
        while data := await inbox.receive_some(size):
            got.append(data)

    trio.run(read)
    assert b"".join(got) == b"".join(pieces)
    assert all(len(data) <= size for data in got)
    assert taken == [len(data) for data in got]


async def test_a_loss_discards_what_waits_and_frees_the_reader(autojump_clock: Any) -> None:
    inbox = Inbox("x", lambda count: None)
    inbox.put(b"gone")
    assert inbox.lose(StreamReset("reset"))
    assert not inbox.lose(StreamReset("again"))
    with pytest.raises(StreamReset, match="reset"):
        await inbox.receive_some(9)
    waiting = Inbox("x", lambda count: None)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(reset_later, waiting)
        with pytest.raises(StreamReset):
            await waiting.receive_some(9)


async def reset_later(inbox: Inbox) -> None:
    await trio.sleep(1)
    inbox.lose(StreamReset("reset"))


async def test_a_loss_after_the_end_changes_nothing() -> None:
    inbox = Inbox("x", lambda count: None)
    inbox.put(b"last")
    inbox.end()
    assert not inbox.lose(StreamReset("reset"))
    assert await inbox.receive_exactly(4) == b"last"
    assert await inbox.receive_some(1) == b""
    with pytest.raises(RemoteProtocolError, match="1 bytes short of 1"):
        await inbox.receive_exactly(1)


async def test_two_readers_at_once_are_a_bug_and_a_cancelled_one_is_not(autojump_clock: Any) -> None:
    inbox = Inbox("x", lambda count: None)
    with trio.move_on_after(1):
        await inbox.receive_some(1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(inbox.receive_some, 1)
        await trio.sleep(1)
        with pytest.raises(trio.BusyResourceError):
            await inbox.receive_some(1)
        inbox.end()
