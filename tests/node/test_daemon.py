"""Whole nodes on loopback: they find each other, remember, serve, take what is needed, and leave."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from pathlib import Path

import pytest
import trio

from mycel.compute.engine import ModelUnsupported
from mycel.compute.infer.request import GenerateRequest
from mycel.compute.model.tiny import tiny_model
from mycel.node.running import Node, NotFounder
from mycel.node.views import TicketAsk
from mycel.protocol.errors import AddressError
from mycel.protocol.identity import SigningKey
from mycel.protocol.mesh import Access
from mycel.protocol.ticket import TicketError, issue_ticket, parse_ticket

NodeMaker = Callable[..., AbstractAsyncContextManager[Node]]
TicketOf = Callable[[Node], str]
WaitUntil = Callable[[Callable[[], bool]], Awaitable[None]]


async def text_of(node: Node, model: str, prompt: str = "def ", tokens: int = 12) -> str:
    request = GenerateRequest(model=model, prompt=prompt, max_tokens=tokens)
    async with node.generator.generate(request) as generation:
        return "".join([piece.text async for piece in generation])


async def test_newcomers_that_know_one_member_soon_know_all(
    make_node: NodeMaker, ticket_of: TicketOf, wait_until: WaitUntil
) -> None:
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(make_node("a"))
        ticket = ticket_of(first)
        others = [await stack.enter_async_context(make_node(name, ticket=ticket)) for name in ("b", "c", "d")]
        everybody = [first, *others]
        await wait_until(lambda: all(len(node.host.peers) == 3 for node in everybody))
        await wait_until(lambda: others[0].label_of(others[2].host.peer_id) == "d")
        assert others[0].host.peers[first.host.peer_id].access is Access.ADMIN
        assert {view.label for view in first.peers()} == {"b", "c", "d"}
        assert first.status().peers == 3


async def test_a_node_keeps_its_port_and_finds_its_swarm_again_without_the_ticket(
    make_node: NodeMaker, ticket_of: TicketOf, wait_until: WaitUntil
) -> None:
    async with make_node("a") as first:
        ticket = ticket_of(first)
        async with make_node("b", ticket=ticket) as second:
            listened, peer = second.status().listen, second.host.peer_id
            await wait_until(lambda: second.contacts.told() != [])
            await wait_until(lambda: second.gather is not None and _remembers(second))
        await wait_until(lambda: not first.host.peers)
        async with make_node("b") as again:  # no ticket, no bootstrap: what it remembers must do
            assert (again.status().listen, again.host.peer_id) == (listened, peer)
            assert again.status().access == "member"
            await wait_until(lambda: first.host.peer_id in again.host.peers)


def _remembers(node: Node) -> bool:
    return (node.config.home / "contacts.json").exists()


async def test_peers_meet_whenever_the_other_comes_back(
    make_node: NodeMaker, ticket_of: TicketOf, wait_until: WaitUntil
) -> None:
    async with make_node("a") as first:
        ticket = ticket_of(first)
    async with make_node("b", ticket=ticket) as second:
        for _ in range(2):
            await wait_until(lambda: second.status().trouble != ())
            async with make_node("a"):
                await wait_until(lambda: len(second.host.peers) == 1)
                await wait_until(lambda: second.status().trouble == ())
            await wait_until(lambda: not second.host.peers)


async def test_a_model_split_over_two_nodes_is_served_to_a_third(
    make_node: NodeMaker, ticket_of: TicketOf, wait_until: WaitUntil, byte_model: Path
) -> None:
    async with make_node("a") as first, make_node("b", ticket=ticket_of(first)) as second:
        alone = await first.serve(str(byte_model), (0, 4))
        whole = await text_of(first, alone.model)
        async with make_node("c", ticket=ticket_of(first)) as third:
            await second.serve(str(byte_model), (2, 4))
            await wait_until(lambda: len(third.models()[0].holders if third.models() else ()) == 2)
            assert await text_of(third, alone.model) == whole
            held = {(one.label, one.start, one.end) for one in third.models()[0].holders}
            assert held == {("a", 0, 4), ("b", 2, 4)}
    assert len(whole) > 0


async def test_layers_are_taken_by_joining_nodes_where_the_model_is_found_by_name(
    make_node: NodeMaker, ticket_of: TicketOf, wait_until: WaitUntil, byte_model: Path
) -> None:
    settings = {"assign": True, "stages": 2, "models": str(byte_model.parent)}
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(make_node("a", **settings))
        await first.serve(byte_model.name, None)
        assert first.lender.views()[0].end == 2
        second = await stack.enter_async_context(make_node("b", ticket=ticket_of(first), **settings))
        blind = await stack.enter_async_context(make_node("c", ticket=ticket_of(first), assign=True))
        await wait_until(lambda: bool(first.models()) and first.models()[0].complete)
        assert [(view.start, view.end) for view in second.lender.views()] == [(2, 4)]
        assert await text_of(blind, byte_model.name)
        assert blind.lender.views() == []


async def test_another_model_of_the_same_name_is_not_taken_for_it(
    make_node: NodeMaker,
    ticket_of: TicketOf,
    wait_until: WaitUntil,
    byte_model: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    other = tiny_model(tmp_path / "others" / byte_model.name, seed=4, vocab_size=300)
    async with make_node("a") as first:
        await first.serve(str(byte_model), (0, 2))
        settings = {"assign": True, "models": str(other.parent)}
        async with make_node("b", ticket=ticket_of(first), **settings) as second:
            await wait_until(lambda: "is another model" in caplog.text)
            assert second.lender.views() == []
            assert len(first.models()) == 1


@pytest.mark.parametrize("name", ["../tiny", "/tiny", "a/b/c", "", "..", "x/.."])
async def test_names_of_models_lead_nowhere_but_into_the_folders(
    make_node: NodeMaker, byte_model: Path, name: str
) -> None:
    async with make_node("a", models=str(byte_model.parent)) as node:
        assert node.lender.find(name) is None
        assert node.lender.find("tiny") == byte_model


async def test_a_node_serves_what_its_config_names(
    make_node: NodeMaker, wait_until: WaitUntil, byte_model: Path
) -> None:
    async with make_node("a", serve=f"{byte_model}@1:3") as node:
        await wait_until(lambda: [view.state for view in node.lender.views()] == ["ready"])
        assert node.models()[0].missing == ((0, 1), (3, 4))
        assert node.status().models == ()


async def test_what_cannot_be_served_says_why_and_leaves_nothing_behind(
    make_node: NodeMaker, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    async with make_node("a") as node:
        for model in (str(tmp_path / "nowhere"), str(tmp_path / "empty")):
            with pytest.raises((FileNotFoundError, ModelUnsupported), match=Path(model).name):
                await node.serve(model, None)
        assert node.lender.views() == []


async def test_a_leaving_node_says_so_and_ends(
    make_node: NodeMaker, ticket_of: TicketOf, wait_until: WaitUntil, byte_model: Path
) -> None:
    async with make_node("a") as first, make_node("b", ticket=ticket_of(first)) as second:
        await second.serve(str(byte_model), None)
        await wait_until(lambda: bool(first.models()))
        second.stop()
        with trio.fail_after(10):
            await second.ended.wait()
        await wait_until(lambda: not first.models())
        await wait_until(lambda: not first.host.peers)
        await trio.sleep(5 * first.config.redial_s)
        assert first.host.counters.dials_failed == 0  # who said goodbye is not dialled


async def test_a_session_moves_when_its_stage_leaves(
    make_node: NodeMaker, ticket_of: TicketOf, wait_until: WaitUntil, byte_model: Path
) -> None:
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(make_node("a", leave_s=30.0))
        await first.serve(str(byte_model), (0, 2))
        others: dict[str, Node] = {}
        for name in ("b", "c"):
            node = await stack.enter_async_context(make_node(name, ticket=ticket_of(first), leave_s=30.0))
            await node.serve(str(byte_model), (2, 4))
            others[node.host.peer_id] = node
        await wait_until(lambda: bool(first.models()) and len(first.models()[0].holders) == 3)
        request = GenerateRequest(model="tiny", prompt="def ", max_tokens=200)
        calm = await text_of(first, "tiny", tokens=200)
        text, gone = "", None
        async with first.generator.generate(request) as generation:
            async for piece in generation:
                text += piece.text
                if gone is None and len(text) > 20:
                    gone = others[generation.report.route[1].peer]
                    gone.stop()
        report = generation.report
        assert text == calm
        assert gone is not None
        assert [failover.lost for failover in report.failovers] == [(gone.host.peer_id,)]
        assert report.route[1].peer != gone.host.peer_id
        with trio.fail_after(10):  # it need not wait for its time to leave: nothing is left to wait for
            await gone.ended.wait()


async def test_a_joining_node_is_refused_by_another_swarm(
    make_node: NodeMaker, wait_until: WaitUntil
) -> None:
    async with make_node("a") as first:
        foreign = issue_ticket(
            SigningKey(b"r" * 32),
            access=Access.MEMBER,
            now=first.host.wall(),
            entropy=first.host.entropy,
        ).with_bootstrap(first.host.listen_addrs)
        async with make_node("b", ticket=foreign.text()) as second:
            with trio.fail_after(10):
                await second.gather.joined.wait()
            assert second.gather.refused is not None
            assert second.gather.refused.reason == "wrong_swarm"
            assert second.status().peers == 0
            assert second.status().trouble[0].peer == first.host.peer_id


async def test_only_the_founder_issues_tickets_and_only_for_roles_that_exist(
    make_node: NodeMaker, ticket_of: TicketOf
) -> None:
    async with make_node("a") as first, make_node("b", ticket=ticket_of(first)) as second:
        with pytest.raises(NotFounder, match="founded"):
            second.issue_ticket(TicketAsk())
        with pytest.raises(TicketError, match="submit, member, admin"):
            first.issue_ticket(TicketAsk(role="king"))
        view = first.issue_ticket(TicketAsk(role="submit", life_s=60, label="guest"))
        ticket = parse_ticket(view.text)
        assert (ticket.access, ticket.certificate.label) == (Access.SUBMIT, "guest")
        assert [str(addr) for addr in ticket.bootstrap] == list(first.status().listen)


async def test_announced_addresses_stand_in_the_ticket(make_node: NodeMaker) -> None:
    async with make_node("a", announce="/dns4/example.org/tcp/4800") as node:
        view = node.issue_ticket(TicketAsk())
        assert view.bootstrap == (f"/dns4/example.org/tcp/4800/p2p/{node.host.peer_id}",)


async def test_an_address_that_cannot_be_bound_is_named(make_node: NodeMaker) -> None:
    async with make_node("a") as node:
        port = node.status().listen[0].split("/")[4]
        with pytest.RaisesGroup(AddressError, flatten_subgroups=True):
            async with make_node("b", listen=f"/ip4/127.0.0.1/tcp/{port}"):
                pass
