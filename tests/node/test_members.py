"""What nodes keep of each other in documents: members and placements, for those who are away too."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import msgspec
import pytest

from mycel.dht.doc.store import VolatileStore
from mycel.node import members
from mycel.node.members import MEMBER_KEY, PLACEMENTS, read_member, read_placement
from mycel.node.running import Node
from mycel.protocol.board import Fact
from mycel.protocol.mesh import PeerId

NodeMaker = Callable[..., AbstractAsyncContextManager[Node]]
Until = Callable[[Callable[[], bool]], Awaitable[None]]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(members, "FIRST_S", 0.05)
    monkeypatch.setattr(members, "LOOK_S", 0.1)


def members_known(node: Node) -> dict[PeerId, bytes | None]:
    return {fact.author: fact.value for fact in node.documents.read(MEMBER_KEY)}


async def test_a_node_that_starts_again_dials_the_members_that_its_documents_name(
    make_node: NodeMaker, ticket_of: Callable[[Node], str], wait_until: Until, tmp_path: Path
) -> None:
    store = VolatileStore()
    async with make_node("a") as a:
        async with make_node("b", ticket=ticket_of(a), store=store) as b:
            await wait_until(lambda: a.host.peer_id in members_known(b))
            await wait_until(lambda: b.host.peer_id in members_known(a))
        for name in ("contacts", "kad", "bootstrap", "ports"):  # on another port, where nobody dials it
            (tmp_path / "b" / f"{name}.json").unlink(missing_ok=True)
        async with make_node("b", store=store) as b:  # no ticket, and nothing else that it remembers
            await wait_until(lambda: a.host.peer_id in b.host.peers)


async def test_members_that_are_away_are_shown_with_what_they_served(
    make_node: NodeMaker, ticket_of: Callable[[Node], str], wait_until: Until, byte_model: Path
) -> None:
    async with make_node("a") as a:
        async with make_node("b", ticket=ticket_of(a)) as b:
            await b.serve(str(byte_model), (1, 3))
            await wait_until(lambda: bool(a.documents.read(PLACEMENTS)) and len(members_known(a)) == 2)
            assert (a.members.away(), a.members.away_models()) == ([], [])
            peer, began = b.host.peer_id, a.host.wall()
        await wait_until(lambda: peer not in a.host.peers)
        (shown,) = a.members.away()
        assert (shown.peer, shown.label, shown.path, shown.serves) == (peer, "b", "away", ("tiny@1:3",))
        assert peer in shown.addr
        assert abs(shown.seen - began) < 30
        (model,) = a.members.away_models()
        assert (model.name, model.layers, model.complete) == ("tiny", 4, False)
        assert [(one.label, one.start, one.end, one.state) for one in model.holders] == [("b", 1, 3, "away")]
        await a.serve(str(byte_model), (0, 4))
        assert a.models()[0].fingerprint == model.fingerprint


async def test_what_changed_is_written_and_what_is_served_no_more_goes_later(
    make_node: NodeMaker, wait_until: Until, byte_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with make_node("a") as a:
        await a.serve(str(byte_model), (0, 4))
        own = a.host.peer_id
        await wait_until(lambda: bool(a.documents.read(PLACEMENTS)))
        before = a.documents.library.version(own)
        monkeypatch.setattr(a.lender, "views", list)
        await wait_until(lambda: bool(a.members._gone))
        assert a.documents.library.version(own) == before  # it may come back
        monkeypatch.setattr(members, "GONE_S", 0.0)
        await wait_until(lambda: not a.documents.read(PLACEMENTS))
        monkeypatch.setattr(members, "AGAIN_S", 0.0)
        at = members_known(a)[own]
        await wait_until(lambda: members_known(a)[own] != at)


@pytest.mark.parametrize(
    "value",
    [b"", b"\xff", msgspec.msgpack.encode(["x"]), msgspec.msgpack.encode(["x", "y", ["z" * 1000], 0.0]),
     msgspec.msgpack.encode(["x", "y", 3, [[0, -1]]]), b"\x91" * 3000],
)  # fmt: skip
def test_what_cannot_be_read_says_nothing(value: bytes) -> None:
    fact = Fact(PeerId("somebody"), "member", value)
    assert (read_member(fact), read_placement(fact)) == (None, None)
