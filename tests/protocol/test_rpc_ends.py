"""How calls end early: deadlines, cancellation, lost connections, limits; over every mesh."""

from __future__ import annotations

import math
from types import NoneType

import msgspec
import pytest
import trio

from mycel.protocol.errors import (
    ConnectionLost,
    DeadlineExceeded,
    LimitExceeded,
    LocalProtocolError,
    Refused,
    RemoteError,
)
from mycel.protocol.limits import CallLimits
from mycel.protocol.outlet import Outlet
from mycel.protocol.rpc import Call, Method
from mycel.protocol.serve_line import LINE

LONG_S = 20.0


class Ask(msgspec.Struct, frozen=True):
    text: str
    number: int = 0


class Answer(msgspec.Struct, frozen=True):
    text: str
    number: int = 0


ECHO = Method("test.echo", Ask, Answer)


WAIT = Method("test.wait", NoneType, NoneType)


BYTES = Method("test.bytes", int, bytes)


async def echo(call: Call, request: Ask) -> Answer:
    return Answer(request.text, request.number)


class Waiter:
    """A handler that runs until it is cancelled, and shows when it began and ended."""

    def __init__(self) -> None:
        self.begun = trio.Event()
        self.begun_twice = trio.Event()
        self.cancelled = trio.Event()
        self.calls = 0

    async def __call__(self, call: Call, request: None) -> None:
        self.calls += 1
        self.begun.set()
        if self.calls == 2:
            self.begun_twice.set()
        try:
            await trio.sleep_forever()
        except trio.Cancelled:
            self.cancelled.set()
            raise


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("is_local", [False, True])
async def test_the_deadline_ends_the_call_and_its_handler(duo, fresh, is_local):
    waiter = Waiter()
    duo.far.serve(WAIT, waiter)
    caller = duo.far if is_local else duo.near
    with pytest.raises(DeadlineExceeded, match=r"test\.wait"):
        await caller.call(duo.peer, WAIT, None, deadline_s=0.1, fresh=fresh)
    with trio.fail_after(LONG_S):
        await waiter.cancelled.wait()


async def test_a_nested_call_inherits_what_is_left(duo):
    waiter = Waiter()
    duo.near.serve(WAIT, waiter)
    nested: list[tuple[float, str]] = []

    async def relay(call: Call, request: Ask) -> Answer:
        began = trio.current_time()
        try:
            await duo.far.call(call.peer, WAIT, None)
        finally:
            nested.append((trio.current_time() - began, call.method))
        return Answer("")

    duo.far.serve(ECHO, relay)
    with pytest.raises(DeadlineExceeded):
        await duo.near.call(duo.peer, ECHO, Ask("a"), deadline_s=0.2)
    with trio.fail_after(LONG_S):
        await waiter.cancelled.wait()
    assert waiter.calls == 1


async def test_remaining_time_travels(duo):
    left: list[float] = []

    async def look(call: Call, request: Ask) -> Answer:
        left.append(call.remaining_s)
        return Answer("")

    duo.far.serve(ECHO, look)
    with trio.fail_after(5):
        await duo.near.call(duo.peer, ECHO, Ask("a"), deadline_s=LONG_S)
        await duo.near.call(duo.peer, ECHO, Ask("a"), fresh=True)
    await duo.near.call(duo.peer, ECHO, Ask("a"), deadline_s=math.inf)
    assert 0 < left[0] <= 5
    assert 0 < left[1] <= 5
    assert left[2] == math.inf


async def test_a_call_without_any_deadline_is_a_bug(duo):
    with pytest.raises(LocalProtocolError, match="deadline_s"):
        await duo.near.call(duo.peer, ECHO, Ask("a"))


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("is_local", [False, True])
async def test_cancelling_the_caller_cancels_the_handler(duo, fresh, is_local):
    waiter = Waiter()
    duo.far.serve(WAIT, waiter)
    caller = duo.far if is_local else duo.near
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: caller.call(duo.peer, WAIT, None, deadline_s=LONG_S, fresh=fresh))
        await waiter.begun.wait()
        nursery.cancel_scope.cancel()
    with trio.fail_after(LONG_S):
        await waiter.cancelled.wait()


@pytest.mark.parametrize("fresh", [False, True])
async def test_a_lost_connection_fails_the_call_after_one_run(duo, fresh):
    waiter = Waiter()
    duo.far.serve(WAIT, waiter)
    async with trio.open_nursery() as nursery:

        async def ask() -> None:
            with pytest.raises(ConnectionLost):
                await duo.near.call(duo.peer, WAIT, None, deadline_s=LONG_S, fresh=fresh)

        nursery.start_soon(ask)
        await waiter.begun.wait()
        duo.cut()
    with trio.fail_after(LONG_S):
        await waiter.cancelled.wait()
    await duo.join()
    assert waiter.calls == 1


async def test_a_connection_whose_end_shows_in_sending_fails_the_call(duo, monkeypatch):
    """As a write to a socket whose other end has died: the line is lost before it knows of the call."""
    duo.far.serve(ECHO, echo)
    await duo.near.call(duo.peer, ECHO, Ask("a line is there now"), deadline_s=LONG_S)
    put = Outlet.put

    def put_and_lose(outlet, data):
        put(outlet, data)
        duo.cut()

    monkeypatch.setattr(Outlet, "put", put_and_lose)
    with trio.fail_after(LONG_S / 2), pytest.raises(ConnectionLost):
        await duo.near.call(duo.peer, ECHO, Ask("to whom?"), deadline_s=LONG_S)


@pytest.mark.parametrize("fresh", [False, True])
async def test_an_idempotent_call_is_asked_once_more(duo, fresh):
    calls = 0
    begun = trio.Event()

    async def first_waits(call: Call, request: Ask) -> Answer:
        nonlocal calls
        calls += 1
        if calls == 1:
            begun.set()
            await trio.sleep_forever()
        return Answer("second")

    method = Method("test.again", Ask, Answer, idempotent=True)
    duo.far.serve(method, first_waits)
    answers = []
    async with trio.open_nursery() as nursery:

        async def ask() -> None:
            answers.append(await duo.near.call(duo.peer, method, Ask("a"), deadline_s=LONG_S, fresh=fresh))

        nursery.start_soon(ask)
        await begun.wait()
        duo.cut()
        await duo.join()
    assert answers == [Answer("second")]
    assert calls == 2


async def test_no_connection_no_call(duo):
    duo.cut()
    await duo.apart()
    with pytest.raises(ConnectionLost):
        await duo.near.call(duo.peer, ECHO, Ask("a"), deadline_s=LONG_S)
    await duo.join()
    duo.far.serve(ECHO, echo)
    assert (await duo.near.call(duo.peer, ECHO, Ask("a"), deadline_s=LONG_S)).text == "a"


async def test_callers_wait_at_the_limit_of_calls_in_flight(make_duo):
    limits = CallLimits(in_flight=4)
    running = most = 0

    async def slow(call: Call, request: Ask) -> Answer:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await trio.sleep(0.005)
        running -= 1
        return Answer("")

    async with make_duo(near_limits=limits, far_limits=limits) as duo:
        duo.far.serve(ECHO, slow)
        async with trio.open_nursery() as nursery:
            for _ in range(40):
                nursery.start_soon(lambda: duo.near.call(duo.peer, ECHO, Ask("a"), deadline_s=LONG_S))
    assert most == 4


async def test_a_peer_that_asks_too_much_is_refused(make_duo):
    async with make_duo(far_limits=CallLimits(in_flight=2)) as duo:
        waiter = Waiter()
        duo.far.serve(WAIT, waiter)
        duo.far.serve(ECHO, echo)
        async with trio.open_nursery() as nursery:
            for _ in range(2):
                nursery.start_soon(lambda: duo.near.call(duo.peer, WAIT, None, deadline_s=LONG_S))
            with trio.fail_after(LONG_S):
                await waiter.begun_twice.wait()
            with pytest.raises(Refused) as caught:
                await duo.near.call(duo.peer, ECHO, Ask("a"), deadline_s=LONG_S)
            assert caught.value.reason == "busy"
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("is_local", [False, True])
async def test_messages_above_the_limit_are_not_sent(make_duo, is_local):
    limits = CallLimits(message_bytes=1 << 20)
    async with make_duo(near_limits=limits, far_limits=limits) as duo:
        caller = duo.far if is_local else duo.near
        upload = Method("test.upload", bytes, int)

        async def take(call: Call, data: bytes) -> int:
            return len(data)

        async def produce(call: Call, size: int) -> bytes:
            return bytes(size)

        duo.far.serve(upload, take)
        duo.far.serve(BYTES, produce)
        with pytest.raises(LimitExceeded, match="message_bytes"):
            await caller.call(duo.peer, upload, bytes(1 << 20), deadline_s=LONG_S)
        with pytest.raises(RemoteError, match="1048576") as caught:
            await caller.call(duo.peer, BYTES, 1 << 20, deadline_s=LONG_S)
        assert caught.value.kind == "LimitExceeded"
        assert await caller.call(duo.peer, upload, bytes(1000000), deadline_s=LONG_S) == 1000000


async def test_a_peer_that_sends_no_frames_is_dropped_with_a_reason(duo):
    duo.far.serve(ECHO, echo)
    stream = await duo.near_mesh.open_stream(duo.peer, LINE)
    await stream.send(b"\xff" * 64)
    await duo.apart()
    await duo.join()
    assert (await duo.near.call(duo.peer, ECHO, Ask("on"), deadline_s=LONG_S)).text == "on"


async def test_a_large_request_waits_while_others_fill_the_budget(make_duo):
    """Three requests of 1 MiB against a budget of one: all are answered, never two are held at once."""
    held = most = 0

    async def take(call: Call, data: bytes) -> int:
        nonlocal held, most
        held += 1
        most = max(most, held)
        await trio.sleep(0.02)
        held -= 1
        return len(data)

    upload = Method("test.upload", bytes, int)
    async with make_duo(far_limits=CallLimits(in_flight_bytes=3 << 19)) as duo:
        duo.far.serve(upload, take)
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(lambda: duo.near.call(duo.peer, upload, bytes(1 << 20), deadline_s=LONG_S))
    assert most == 1
