"""Streaming calls: the same tests over every mesh (`conftest.WORLDS`)."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import trio

from mycel.protocol.errors import (
    DeadlineExceeded,
    Refused,
    RemoteError,
)
from mycel.protocol.mesh import Access
from mycel.protocol.rpc import Call, Kind, Method

LONG_S = 20.0


COUNT = Method("test.count", int, int, kind=Kind.SERVER_STREAM)


TOTAL = Method("test.total", int, int, kind=Kind.CLIENT_STREAM)


TWICE = Method("test.twice", int, int, kind=Kind.BIDI)


async def count(call: Call, request: int) -> AsyncIterator[int]:
    for number in range(request):
        yield number


async def total(call: Call, items: AsyncIterator[int]) -> int:
    return sum([item async for item in items])


async def twice(call: Call, items: AsyncIterator[int]) -> AsyncIterator[int]:
    async for item in items:
        yield 2 * item


@pytest.mark.parametrize("is_local", [False, True])
async def test_streams_of_every_kind(duo, is_local):
    duo.far.serve(COUNT, count)
    duo.far.serve(TOTAL, total)
    duo.far.serve(TWICE, twice)
    caller = duo.far if is_local else duo.near
    async with caller.stream(duo.peer, COUNT, 1000, deadline_s=LONG_S) as stream:
        assert [item async for item in stream] == list(range(1000))
    async with caller.stream(duo.peer, TOTAL, deadline_s=LONG_S) as stream:
        for number in range(1000):
            await stream.send(number)
        await stream.end()
        assert await stream.receive() == sum(range(1000))
        with pytest.raises(trio.EndOfChannel):
            await stream.receive()
    async with caller.stream(duo.peer, TWICE, deadline_s=LONG_S) as stream:
        for number in range(20):
            await stream.send(number)
            assert await stream.receive() == 2 * number
        await stream.end()
        assert [item async for item in stream] == []


async def test_streams_ask_for_the_same_rights(make_duo):
    async with make_duo(access=Access.SUBMIT) as duo:
        duo.far.serve(COUNT, count)
        with pytest.raises(Refused, match="role member, you have submit"):
            async with duo.near.stream(duo.peer, COUNT, 3, deadline_s=LONG_S) as stream:
                await stream.receive()


@pytest.mark.parametrize("is_local", [False, True])
async def test_a_slow_consumer_gets_every_item_and_holds_the_producer_up(duo, is_local):
    made = 0
    item_bytes, items = 16 * 1024, 1500  # 24 MB, well over any first window

    async def produce(call: Call, request: int) -> AsyncIterator[bytes]:
        nonlocal made
        for number in range(request):
            made += 1
            yield number.to_bytes(4, "big") + bytes(item_bytes - 4)

    method = Method("test.produce", int, bytes, kind=Kind.SERVER_STREAM)
    duo.far.serve(method, produce)
    caller = duo.far if is_local else duo.near
    async with caller.stream(duo.peer, method, items, deadline_s=LONG_S) as stream:
        await stream.receive()
        before = -1
        while before != made:  # until the producer stands still
            before = made
            await trio.sleep(0.1)
        assert made < 400
        got = 1
        async for item in stream:
            assert int.from_bytes(item[:4], "big") == got
            got += 1
    assert got == made == items


@pytest.mark.parametrize("is_local", [False, True])
async def test_a_slow_handler_holds_the_sender_up(duo, is_local):
    go = trio.Event()

    async def consume(call: Call, items: AsyncIterator[bytes]) -> int:
        await go.wait()
        return len([item async for item in items])

    method = Method("test.consume", bytes, int, kind=Kind.CLIENT_STREAM)
    duo.far.serve(method, consume)
    caller = duo.far if is_local else duo.near
    sent = 0

    async with caller.stream(duo.peer, method, deadline_s=LONG_S) as stream, trio.open_nursery() as nursery:

        async def send() -> None:
            nonlocal sent
            for _ in range(1500):
                await stream.send(bytes(16 * 1024))
                sent += 1
            await stream.end()

        nursery.start_soon(send)
        before = -1
        while before != sent:
            before = sent
            await trio.sleep(0.1)
        assert sent < 400
        go.set()
        assert await stream.receive() == 1500


@pytest.mark.parametrize("is_local", [False, True])
async def test_leaving_a_stream_early_cancels_its_handler(duo, is_local):
    ended = trio.Event()

    async def forever(call: Call, request: int) -> AsyncIterator[int]:
        try:
            yield 1
            await trio.sleep_forever()
        finally:
            ended.set()

    duo.far.serve(COUNT, forever)
    caller = duo.far if is_local else duo.near
    async with caller.stream(duo.peer, COUNT, 3, deadline_s=LONG_S) as stream:
        assert await stream.receive() == 1
    with trio.fail_after(LONG_S):
        await ended.wait()


async def test_a_streams_deadline_ends_both_sides(duo):
    ended = trio.Event()

    async def forever(call: Call, request: int) -> AsyncIterator[int]:
        try:
            yield 1
            await trio.sleep_forever()
        finally:
            ended.set()

    duo.far.serve(COUNT, forever)
    with pytest.raises(DeadlineExceeded):
        async with duo.near.stream(duo.peer, COUNT, 3, deadline_s=0.2) as stream:
            async for _ in stream:
                pass
    with trio.fail_after(LONG_S):
        await ended.wait()


@pytest.mark.parametrize("is_local", [False, True])
async def test_an_error_after_items_comes_after_them(duo, is_local):
    async def break_off(call: Call, request: int) -> AsyncIterator[int]:
        yield 1
        yield 2
        raise ValueError("out of numbers")

    duo.far.serve(COUNT, break_off)
    caller = duo.far if is_local else duo.near
    got = []
    with pytest.raises(RemoteError, match="out of numbers"):
        async with caller.stream(duo.peer, COUNT, 3, deadline_s=LONG_S) as stream:
            async for item in stream:
                got.append(item)  # noqa: PERF401
    assert got == [1, 2]


@pytest.mark.parametrize("is_local", [False, True])
async def test_a_handler_that_fails_frees_a_sender_that_waits(duo, is_local):
    async def fail(call: Call, items: AsyncIterator[bytes]) -> int:
        await anext(items)
        raise ValueError("enough")

    method = Method("test.consume", bytes, int, kind=Kind.CLIENT_STREAM)
    duo.far.serve(method, fail)
    caller = duo.far if is_local else duo.near
    with pytest.raises(RemoteError, match="enough"):
        async with caller.stream(duo.peer, method, deadline_s=LONG_S) as stream:
            for _ in range(5000):
                await stream.send(bytes(64 * 1024))


@pytest.mark.parametrize("is_local", [False, True])
async def test_a_wrong_item_is_told(duo, is_local):
    duo.far.serve(TOTAL, total)
    caller = duo.far if is_local else duo.near
    wrong = Method(TOTAL.name, str, int, kind=Kind.CLIENT_STREAM)
    with pytest.raises(RemoteError, match="Expected `int`, got `str`") as caught:
        async with caller.stream(duo.peer, wrong, deadline_s=LONG_S) as stream:
            await stream.send("three")
            await stream.end()
            await stream.receive()
    assert caught.value.kind == "BadRequest"


async def test_every_call_is_counted_once_whichever_way_it_came(duo):
    async def echo(call: Call, request: int) -> int:
        return request

    unary = Method("test.echo", int, int)
    unknown = Method("test.unknown", int, int)
    duo.far.serve(unary, echo)
    duo.far.serve(COUNT, count)
    before = dict(duo.far.refused)
    assert await duo.near.call(duo.peer, unary, 1, deadline_s=LONG_S) == 1
    assert await duo.near.call(duo.peer, unary, 2, deadline_s=LONG_S, fresh=True) == 2
    async with duo.near.stream(duo.peer, COUNT, 3, deadline_s=LONG_S) as stream:
        assert [item async for item in stream] == [0, 1, 2]
    for fresh in (False, True):
        with pytest.raises(Refused):
            await duo.near.call(duo.peer, unknown, 1, deadline_s=LONG_S, fresh=fresh)
    assert duo.far.calls["test.echo"] == 2
    assert duo.far.calls["test.count"] == 1
    assert duo.far.refused["unknown-method"] - before.get("unknown-method", 0) == 2
