"""Documents of whole nodes: who may write, what is kept, and what a node that comes later reads."""

from __future__ import annotations

import sqlite3
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest
import trio

from mycel.dht.doc.library import Library
from mycel.dht.doc.message import NOWHERE
from mycel.dht.doc.store import SqliteStore, VolatileStore
from mycel.node.docdisk import DiskStore
from mycel.node.documents import Authors, DocumentService
from mycel.node.running import Node
from mycel.protocol.chain import Chain, Grant, certify_peer, encode_chain
from mycel.protocol.errors import UsageProblem
from mycel.protocol.identity import SigningKey
from mycel.protocol.keys import OwnKey
from mycel.protocol.membership import Credentials, Membership, found_swarm
from mycel.protocol.mesh import Access, PeerId
from mycel.protocol.rpc import Rpc
from mycel.simnet.mesh import MeshOptions, mesh_world

NodeMaker = Callable[..., AbstractAsyncContextManager[Node]]
Until = Callable[[Callable[[], bool]], Awaitable[None]]
NOW = 1_800_000_000.0


class Signer:
    """A node's key and calendar, apart from any node."""

    def __init__(self) -> None:
        self._key = OwnKey(bytes(32))
        self.now = NOW

    peer_id = property(lambda self: self._key.peer_id)

    def sign(self, data: bytes) -> bytes:
        return self._key.sign(data)

    def verify(self, peer: PeerId, data: bytes, signature: bytes) -> bool:
        return True

    def wall(self) -> float:
        return self.now


def modes_in(folder: Path) -> set[int]:
    return {path.stat().st_mode & 0o777 for path in folder.iterdir()}


def anybody(author: PeerId, chain: bytes) -> bool:
    return True


async def test_a_third_node_takes_documents_of_an_author_it_never_met(
    make_node: NodeMaker, ticket_of: Callable[[Node], str], wait_until: Until
) -> None:
    async with make_node("a") as a:
        async with make_node("b", ticket=ticket_of(a)) as b:
            b.documents.write({"note": b"from b"})
            author = b.host.peer_id
            await wait_until(lambda: bool(a.documents.read("note")))
        async with make_node("c", ticket=ticket_of(a)) as c:
            await wait_until(lambda: bool(c.documents.read("note")))
            assert [(fact.author, fact.value) for fact in c.documents.read("note")] == [(author, b"from b")]
            assert c.documents.library.refused == {}


async def test_a_node_with_another_disk_finds_its_own_document_again(
    make_node: NodeMaker, ticket_of: Callable[[Node], str], wait_until: Until
) -> None:
    async with make_node("a") as a:
        ticket = ticket_of(a)
        async with make_node("b", ticket=ticket) as b:
            b.documents.write({"jobs/1": b"long ago"})
            await wait_until(lambda: bool(a.documents.read("jobs/")))
        async with make_node("b", ticket=ticket, store=VolatileStore()) as b:
            b.documents.write({"jobs/2": b"before it could ask"})
            both = [b"long ago", b"before it could ask"]
            await wait_until(lambda: [fact.value for fact in a.documents.read("jobs/")] == both)
            await wait_until(lambda: [fact.value for fact in b.documents.read("jobs/")] == both)


def test_a_membership_counts_as_long_as_it_lasts_and_only_for_its_author() -> None:
    signer, root = Signer(), SigningKey(bytes(31) + b"\x07")
    own = Membership(found_swarm(signer.peer_id, root, NOW), signer.wall, revoked=[PeerId("nobody")])
    authors = Authors(signer, own, most=2)  # type: ignore[arg-type]
    peers = [OwnKey(bytes(31) + bytes([number])).peer_id for number in range(2, 6)]

    def chain_of(peer: PeerId, access: Access) -> bytes:
        grant = Grant(access, int(NOW), int(NOW) + 3600, "", by_ticket=False)
        return encode_chain(Chain((certify_peer(root, root.public, peer, grant),)))

    for peer in peers:  # more than are remembered
        chain = chain_of(peer, Access.MEMBER)
        assert authors.may_write(peer, chain)
        assert not authors.may_write(peers[0] if peer != peers[0] else peers[1], chain)
        assert not authors.may_write(peer, chain_of(peer, Access.SUBMIT))
        assert not authors.may_write(peer, b"")
    signer.now += 3600 + 301
    assert not any(authors.may_write(peer, chain_of(peer, Access.MEMBER)) for peer in peers)


async def test_a_document_goes_with_its_authors_membership(autojump_clock: trio.testing.MockClock) -> None:
    root = SigningKey(bytes(31) + b"\x07")
    async with mesh_world(MeshOptions(seed=1)) as world, trio.open_nursery() as nursery:
        a, b = [world.add(name) for name in "ab"]
        services = []
        for mesh, life_s in ((a, 60), (b, 86400)):
            grant = Grant(Access.MEMBER, int(mesh.wall()), int(mesh.wall()) + life_s, "", by_ticket=False)
            chain = Chain((certify_peer(root, root.public, mesh.peer_id, grant),))
            membership = Membership(Credentials(mesh.peer_id, root.public, chain), mesh.wall)
            rpc = Rpc(mesh)
            service = DocumentService(mesh, rpc, membership, VolatileStore())
            services.append(service.documents)
            await nursery.start(rpc.run)
            await nursery.start(service.run)
        await a.connect(b.listen_addrs)
        services[0].write({"k": b"1"})
        await trio.sleep(60)
        assert [fact.value for fact in services[1].read("k")] == [b"1"]
        await trio.sleep(320)  # over its end, and what clocks may differ by
        assert services[1].read("k") == []
        assert services[0].read("k") != []  # its own stays
        nursery.cancel_scope.cancel()


async def test_what_is_synced_is_on_disk_in_the_order_it_was_written(tmp_path: Path) -> None:
    signer = Signer()
    async with trio.open_nursery() as nursery:
        store = await DiskStore.open(tmp_path / "documents.db")
        await nursery.start(store.run)
        library = Library(signer, store, anybody)
        library.on_compared()
        for n in range(50):
            library.write({f"k{n % 7}": b"%d" % n})
        await library.synced()
        assert modes_in(tmp_path) == {0o600}
        other = SqliteStore(tmp_path / "documents.db")
        assert other.load() == library.since(signer.peer_id, NOWHERE)
        other.close()
        library.write({"last": b"1"})
        nursery.cancel_scope.cancel()
    again = SqliteStore(tmp_path / "documents.db")
    assert again.load() == library.since(signer.peer_id, NOWHERE)
    again.close()


async def test_what_a_full_disk_refused_is_written_once_it_has_room(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    signer, real, is_full = Signer(), SqliteStore.change, [True]

    def change(self: SqliteStore, *arguments: object, **durable: bool) -> None:
        if is_full[0]:
            raise UsageProblem("the disk is full")
        real(self, *arguments, **durable)  # type: ignore[arg-type]

    monkeypatch.setattr(SqliteStore, "change", change)
    async with trio.open_nursery() as nursery:
        store = await DiskStore.open(tmp_path / "documents.db")
        await nursery.start(store.run)
        library = Library(signer, store, anybody)
        library.on_compared()
        library.write({"k": b"1"})
        with pytest.raises(UsageProblem, match="full"):
            await library.synced()
        library.write({"l": b"2"})
        with pytest.raises(UsageProblem, match="full"):
            await library.synced()
        is_full[0] = False
        await trio.sleep(5)
        await library.synced()
        database = sqlite3.connect(tmp_path / "documents.db")
        assert database.execute("SELECT sequence FROM head").fetchall() == [(2,)]
        assert database.execute("SELECT count(*) FROM log").fetchone() == (2,)
        database.close()
        nursery.cancel_scope.cancel()
