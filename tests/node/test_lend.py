"""What a node lends by its owner's order and by the swarm's need: tried again, and rescued beside its own."""

from __future__ import annotations

import shutil
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from pathlib import Path

import pytest
import trio

from mycel.compute.infer import served
from mycel.compute.infer.request import GenerateRequest, LayersMissing
from mycel.node import lend
from mycel.node.running import Node

NodeMaker = Callable[..., AbstractAsyncContextManager[Node]]
TicketOf = Callable[[Node], str]
WaitUntil = Callable[[Callable[[], bool]], Awaitable[None]]


def spans(node: Node) -> list[tuple[int, int]]:
    return [(view.start, view.end) for view in node.lender.views() if view.state == "ready"]


def holders(node: Node) -> int:
    return sum(holder.state == "ready" for model in node.generator.models() for holder in model.holders)


async def test_what_the_config_names_is_tried_again_until_it_is_there(
    make_node: NodeMaker,
    wait_until: WaitUntil,
    byte_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(lend, "RETRY_FIRST_S", 0.05)
    late = tmp_path / "late"
    async with make_node("a", serve=f"{late}@0:2") as node:
        await wait_until(lambda: caplog.text.count("is not served yet") >= 2)
        assert node.lender.views() == []
        shutil.copytree(byte_model, late)
        await wait_until(lambda: spans(node) == [(0, 2)])


async def test_layers_served_already_are_not_served_again_but_others_are(
    make_node: NodeMaker, byte_model: Path
) -> None:
    async with make_node("a") as node:
        await node.serve(str(byte_model), (0, 2))
        for again in ((0, 1), (1, 3), None):
            with pytest.raises(Exception, match=r"served by this node already"):
                await node.serve(str(byte_model), again)
        await node.serve(str(byte_model), (3, 4))
        assert [(one.span.start, one.span.end) for one in node.generator.models()[0].holders] == [
            (0, 2),
            (3, 4),
        ]


async def generate(node: Node, tokens: int, at: int, act: Callable[[], None]) -> str:
    request = GenerateRequest(model="tiny", prompt="def ", max_tokens=tokens)
    text, count = "", 0
    async with node.generator.generate(request) as generation:
        async for piece in generation:
            if count < at <= count + len(piece.tokens):
                act()
            count += len(piece.tokens)
            text += piece.text
    return text


async def three_holders(
    stack: AsyncExitStack, make_node: NodeMaker, ticket_of: TicketOf, model: Path, **settings: object
) -> tuple[Node, list[trio.CancelScope]]:
    """A node that owns sessions, and three that hold 0:1, 1:3 and 3:4; to end each, its scope."""
    owner = await stack.enter_async_context(make_node("owner"))
    ticket = ticket_of(owner)
    scopes = []

    async def live(name: str, serve: str, task_status: trio.TaskStatus[trio.CancelScope]) -> None:
        with trio.CancelScope() as scope:
            async with make_node(name, ticket=ticket, serve=serve, assign=True, **settings):
                task_status.started(scope)
                await trio.sleep_forever()

    nursery = await stack.enter_async_context(trio.open_nursery())
    stack.callback(nursery.cancel_scope.cancel)
    for name, (i, j) in {"b": (0, 1), "c": (1, 3), "d": (3, 4)}.items():
        scopes.append(await nursery.start(live, name, f"{model}@{i}:{j}"))
    return owner, scopes


async def test_survivors_take_layers_whose_last_holder_is_gone_and_the_text_goes_on(
    make_node: NodeMaker, ticket_of: TicketOf, wait_until: WaitUntil, byte_model: Path
) -> None:
    async with AsyncExitStack() as stack:
        owner, scopes = await three_holders(stack, make_node, ticket_of, byte_model, memory_bytes="1MiB")
        await wait_until(lambda: holders(owner) == 3)
        calm = await generate(owner, 200, 0, lambda: None)
        assert await generate(owner, 200, 60, scopes[1].cancel) == calm
        held = sorted((holder.span.start, holder.span.end) for holder in owner.generator.models()[0].holders)
        assert held == [(0, 1), (1, 3), (3, 4)]
        assert len({holder.peer for holder in owner.generator.models()[0].holders}) == 2


@pytest.mark.parametrize("settings", [{"memory_bytes": "1KiB"}, {"rescue_s": 0.0}], ids=["no room", "off"])
async def test_without_room_or_leave_the_missing_layers_are_named(
    make_node: NodeMaker,
    ticket_of: TicketOf,
    wait_until: WaitUntil,
    byte_model: Path,
    settings: dict[str, object],
) -> None:
    async with AsyncExitStack() as stack:
        owner, scopes = await three_holders(stack, make_node, ticket_of, byte_model, **settings)
        await wait_until(lambda: holders(owner) == 3)
        with pytest.raises(LayersMissing, match="layers 1:3 of tiny"):
            await generate(owner, 200, 60, scopes[1].cancel)
        assert holders(owner) == 2


@pytest.mark.parametrize("named", [True, False])
async def test_of_two_with_the_same_layers_one_moves_to_those_that_are_missing(
    make_node: NodeMaker,
    ticket_of: TicketOf,
    wait_until: WaitUntil,
    byte_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    named: bool,
) -> None:
    """They came at the same moment: neither saw the other's claim. Layers that an owner named stay."""
    monkeypatch.setattr(served, "CLAIM_S", 0.0)
    settings = {"assign": True, "stages": 2, "models": str(byte_model.parent)}
    first_serves = f"{byte_model}@0:2" if named else str(byte_model)
    async with AsyncExitStack() as stack:
        owner = await stack.enter_async_context(make_node("owner"))
        with monkeypatch.context() as blind:  # nobody sees anybody's facts
            blind.setattr(served, "read_holdings", lambda *_, **__: [])
            first = await stack.enter_async_context(
                make_node("a", ticket=ticket_of(owner), serve=first_serves, **settings)
            )
            second = await stack.enter_async_context(
                make_node("b", ticket=ticket_of(owner), serve=str(byte_model), **settings)
            )
            await wait_until(lambda: spans(first) == [(0, 2)] == spans(second))
        await wait_until(lambda: bool(owner.models()) and owner.models()[0].complete)
        assert sorted(spans(first) + spans(second)) == [(0, 2), (2, 4)]
        assert not named or spans(first) == [(0, 2)]
        assert await generate(owner, 12, 0, lambda: None)
