"""Unary calls: the same tests over every mesh (`conftest.WORLDS`)."""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncIterator
from types import NoneType

import msgspec
import pytest
import trio

from mycel.protocol.errors import (
    LocalProtocolError,
    Refused,
    RemoteError,
    RemoteProtocolError,
)
from mycel.protocol.mesh import Access
from mycel.protocol.rpc import Call, Kind, Method
from mycel.protocol.tensor import Tensor

LONG_S = 20.0


class Ask(msgspec.Struct, frozen=True):
    text: str
    number: int = 0


class Answer(msgspec.Struct, frozen=True):
    text: str
    number: int = 0


class Load(msgspec.Struct, frozen=True):
    name: str
    tensors: list[Tensor]


ECHO = Method("test.echo", Ask, Answer)


MOVE = Method("test.move", Load, Load)


WAIT = Method("test.wait", NoneType, NoneType)


BYTES = Method("test.bytes", int, bytes)


COUNT = Method("test.count", int, int, kind=Kind.SERVER_STREAM)


TOTAL = Method("test.total", int, int, kind=Kind.CLIENT_STREAM)


async def echo(call: Call, request: Ask) -> Answer:
    return Answer(request.text, request.number)


async def count(call: Call, request: int) -> AsyncIterator[int]:
    for number in range(request):
        yield number


async def total(call: Call, items: AsyncIterator[int]) -> int:
    return sum([item async for item in items])


class Waiter:
    """A handler that runs until it is cancelled, and shows when it began and ended."""

    def __init__(self) -> None:
        self.begun = trio.Event()
        self.cancelled = trio.Event()
        self.calls = 0

    async def __call__(self, call: Call, request: None) -> None:
        self.calls += 1
        self.begun.set()
        try:
            await trio.sleep_forever()
        except trio.Cancelled:
            self.cancelled.set()
            raise


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("is_local", [False, True])
async def test_unary(duo, fresh, is_local):
    duo.far.serve(ECHO, echo)
    caller = duo.far if is_local else duo.near
    answer = await caller.call(duo.peer, ECHO, Ask("käse", 7), deadline_s=LONG_S, fresh=fresh)
    assert answer == Answer("käse", 7)


async def test_two_thousand_calls_at_once_both_ways(duo):
    duo.far.serve(ECHO, echo)
    duo.near.serve(ECHO, echo)
    seen = []

    async def ask(rpc, peer, number):
        answer = await rpc.call(peer, ECHO, Ask("x", number), deadline_s=LONG_S)
        seen.append((peer, answer.number))

    async with trio.open_nursery() as nursery:
        for number in range(1000):
            nursery.start_soon(ask, duo.near, duo.peer, number)
            nursery.start_soon(ask, duo.far, duo.near_mesh.peer_id, number)
    assert sorted(seen) == sorted(
        (peer, n) for peer in (duo.peer, duo.near_mesh.peer_id) for n in range(1000)
    )


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("is_local", [False, True])
async def test_request_of_the_wrong_type_is_told_and_the_connection_lives(duo, fresh, is_local):
    duo.far.serve(ECHO, echo)
    caller = duo.far if is_local else duo.near
    wrong = Method(ECHO.name, dict[str, str], Answer)
    with pytest.raises(RemoteError, match=r"Expected `int`, got `str` - at `\$.number`") as caught:
        await caller.call(duo.peer, wrong, {"text": "a", "number": "b"}, deadline_s=LONG_S, fresh=fresh)
    assert caught.value.kind == "BadRequest"
    assert (await caller.call(duo.peer, ECHO, Ask("on"), deadline_s=LONG_S)).text == "on"


@pytest.mark.parametrize("fresh", [False, True])
async def test_answer_of_the_wrong_type_blames_the_peer(duo, fresh):
    duo.far.serve(ECHO, echo)
    wrong = Method(ECHO.name, Ask, int)
    with pytest.raises(RemoteProtocolError, match="Expected `int`, got `object`"):
        await duo.near.call(duo.peer, wrong, Ask("a"), deadline_s=LONG_S, fresh=fresh)
    assert (await duo.near.call(duo.peer, ECHO, Ask("on"), deadline_s=LONG_S)).text == "on"


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("is_local", [False, True])
async def test_unknown_method_and_missing_right_are_told_apart(make_duo, fresh, is_local):
    async with make_duo(access=Access.SUBMIT) as duo:
        served = Method("test.admin", Ask, Answer, access=Access.ADMIN)
        duo.far.serve(served, echo)
        with pytest.raises(Refused) as unknown:
            await duo.near.call(duo.peer, ECHO, Ask("a"), deadline_s=LONG_S, fresh=fresh)
        assert unknown.value.reason == "unknown-method"
        if is_local:  # a node may do everything to itself
            assert await duo.far.call(duo.peer, served, Ask("a"), deadline_s=LONG_S) == Answer("a")
            return
        with pytest.raises(Refused, match="role admin, you have submit") as missing:
            await duo.near.call(duo.peer, served, Ask("a"), deadline_s=LONG_S, fresh=fresh)
        assert missing.value.reason == "access"


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("is_inline", [False, True])
async def test_a_handlers_error_reaches_its_caller_and_nobody_else(duo, fresh, is_inline):
    others = Waiter()
    duo.far.serve(WAIT, others)

    def fail(call: Call, request: Ask) -> Answer:
        raise KeyError("no such thing")

    async def fail_later(call: Call, request: Ask) -> Answer:
        return fail(call, request)

    duo.far.serve(ECHO, fail if is_inline else fail_later, inline=is_inline)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: duo.near.call(duo.peer, WAIT, None, deadline_s=LONG_S))
        await others.begun.wait()
        with pytest.raises(RemoteError, match="no such thing") as caught:
            await duo.near.call(duo.peer, ECHO, Ask("a"), deadline_s=LONG_S, fresh=fresh)
        assert caught.value.kind == "KeyError"
        assert not others.cancelled.is_set()
        nursery.cancel_scope.cancel()


async def test_a_handler_may_refuse(duo):
    async def refuse(call: Call, request: Ask) -> Answer:
        raise Refused("no layers here; ask another peer", reason="no-layers")

    duo.far.serve(ECHO, refuse)
    with pytest.raises(Refused, match="no layers here") as caught:
        await duo.near.call(duo.peer, ECHO, Ask("a"), deadline_s=LONG_S)
    assert caught.value.reason == "no-layers"


@pytest.mark.parametrize("is_local", [False, True])
@pytest.mark.parametrize("rows", [1, 100, 3000])
async def test_tensors_travel(duo, rows, is_local):
    async def turn(call: Call, load: Load) -> Load:
        return Load(load.name, load.tensors[::-1])

    duo.far.serve(MOVE, turn)
    caller = duo.far if is_local else duo.near
    data = [bytes([seed]) * (rows * 512 * 4) for seed in (1, 2)]
    load = Load("step", [Tensor("float32", (rows, 512), part) for part in data])
    load.tensors.append(Tensor("int8", (3,), memoryview(b"abc")))
    back = await caller.call(duo.peer, MOVE, load, deadline_s=LONG_S)
    assert [bytes(tensor.data) for tensor in back.tensors] == [b"abc", data[1], data[0]]
    assert [tensor.shape for tensor in back.tensors] == [(3,), (rows, 512), (rows, 512)]


async def test_a_large_answer_holds_up_no_small_one(duo):
    big = 24 << 20
    order = []

    async def produce(call: Call, size: int) -> bytes:
        return bytes(size)

    duo.far.serve(BYTES, produce)

    async def ask(size):
        answer = await duo.near.call(duo.peer, BYTES, size, deadline_s=LONG_S)
        assert len(answer) == size
        order.append(size)

    await ask(0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask, big)
        await trio.lowlevel.checkpoint()
        nursery.start_soon(ask, 1)
    assert order == [0, 1, big]


async def test_plain_handlers_may_block(duo):
    lock = threading.Lock()
    running = most = 0

    def block(call: Call, request: Ask) -> Answer:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.2)
        with lock:
            running -= 1
        return Answer(threading.current_thread().name)

    duo.far.serve(ECHO, block)
    ping = Method("test.ping", int, int)
    duo.far.serve(ping, lambda call, number: number, inline=True)
    async with trio.open_nursery() as nursery:
        for _ in range(8):
            nursery.start_soon(lambda: duo.near.call(duo.peer, ECHO, Ask("a"), deadline_s=LONG_S))
        while running == 0:
            await duo.near.call(duo.peer, ping, 1, deadline_s=LONG_S)
        assert await duo.near.call(duo.peer, ping, 1, deadline_s=LONG_S) == 1
        assert running > 0
    assert most == 8


async def test_a_handler_may_call_its_caller_back(duo):
    duo.near.serve(ECHO, echo)

    async def relay(call: Call, request: int) -> bytes:
        back = await duo.far.call(call.peer, ECHO, Ask("back", request))
        return back.text.encode()

    duo.far.serve(BYTES, relay)
    assert await duo.near.call(duo.peer, BYTES, 3, deadline_s=LONG_S) == b"back"


async def test_serving_what_does_not_fit(duo):
    with pytest.raises(LocalProtocolError, match="async generator"):
        duo.far.serve(COUNT, echo)
    with pytest.raises(LocalProtocolError, match="async def"):
        duo.far.serve(TOTAL, count)
    with pytest.raises(LocalProtocolError, match="plain def"):
        duo.far.serve(ECHO, echo, inline=True)
    duo.far.serve(ECHO, echo)
    with pytest.raises(LocalProtocolError, match="already"):
        duo.far.serve(ECHO, echo)
    with pytest.raises(LocalProtocolError, match="stream"):
        await duo.near.call(duo.peer, COUNT, 1, deadline_s=1)
    with pytest.raises(LocalProtocolError, match="unary"):
        duo.near.stream(duo.peer, ECHO, Ask("a"), deadline_s=1)
    with pytest.raises(LocalProtocolError, match="cannot be a message"):
        duo.far.serve(Method("test.object", object, threading.Thread), echo)
