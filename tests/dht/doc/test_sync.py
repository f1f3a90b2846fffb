"""Documents between simulated nodes, in virtual time."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import msgspec
import pytest
import trio

from mycel.dht.doc.library import Library
from mycel.dht.doc.message import NOWHERE, PUSH, PushParts
from mycel.protocol.board import Fact
from mycel.protocol.errors import ConnectionLost, MycelError
from mycel.protocol.limits_doc import DEFAULT_DOCUMENT_LIMITS, DocumentLimits
from mycel.protocol.mesh import Access
from mycel.protocol.rpc import Rpc
from mycel.simnet.clock import run
from mycel.simnet.documents import DocumentSwarm
from mycel.simnet.mesh import MeshOptions, mesh_world

SMALL = replace(DEFAULT_DOCUMENT_LIMITS, log_bytes=400)
Clock = trio.testing.MockClock


@asynccontextmanager
async def swarm_of(
    count: int, degree: int = 6, limits: DocumentLimits = SMALL, seed: int = 5
) -> AsyncIterator[DocumentSwarm]:
    async with mesh_world(MeshOptions(seed=seed)) as world, trio.open_nursery() as nursery:
        swarm = DocumentSwarm(world, nursery, degree, limits)
        await swarm.grow(count)
        await trio.sleep(2)
        yield swarm
        nursery.cancel_scope.cancel()


async def test_a_write_reaches_everybody_soon(autojump_clock: Clock) -> None:
    async with swarm_of(30) as swarm:
        writer, reader = swarm.nodes[0], swarm.nodes[-1]
        async with reader.documents.watch("model/") as changes:
            writer.documents.write({"model/x": b"1", "other": b"2"})
            began = trio.current_time()
            assert await changes.__anext__() == Fact(writer.mesh.peer_id, "model/x", b"1")
            assert trio.current_time() - began < 1.5  # pushed, hop by hop, before anybody compared
            await swarm.until(swarm.is_settled, 10)
            writer.documents.write({"model/x": None})
            assert await changes.__anext__() == Fact(writer.mesh.peer_id, "model/x", None)
        assert [fact.key for fact in reader.documents.read("")] == ["other"]


async def test_all_agree_after_a_partition_with_writes_on_both_sides(autojump_clock: Clock) -> None:
    async with swarm_of(20) as swarm:
        swarm.cut(swarm.nodes[:8])
        for n in range(12):
            for node in swarm.nodes:
                node.documents.write({f"k{n % 5}": b"%d" % n})
            await trio.sleep(1)
        assert not swarm.is_settled()
        swarm.world.heal()
        assert await swarm.until(swarm.is_settled, 20) < 5
        states = [node.state for node in swarm.nodes]
        assert all(state == states[0] for state in states)
        assert len(swarm.nodes[3].documents.read("k")) == 20 * 5
        assert {fact.value for fact in swarm.nodes[3].documents.read("k4")} == {b"9"}
        assert all(node.library.refused == {} for node in swarm.nodes)


async def test_nothing_written_is_lost_by_nodes_that_die_and_restart(autojump_clock: Clock) -> None:
    async with swarm_of(12) as swarm:
        for n in range(30):
            for node in swarm.nodes:
                if node.mesh.is_alive:
                    node.documents.write({f"k{n}": b"v"})
            victim = swarm.nodes[n % 12]
            victim.kill()
            await trio.sleep(0.3)
            await swarm.restart(victim)
        await swarm.until(swarm.is_settled, 30)
        assert len(swarm.nodes[0].documents.read("k")) == 12 * 30
        assert all(node.state == swarm.nodes[0].state for node in swarm.nodes)


async def test_another_history_of_one_edition_gives_way_to_the_longer_one(autojump_clock: Clock) -> None:
    async with swarm_of(6) as swarm:
        author = swarm.nodes[2]
        author.documents.write({"k": b"1"})
        await swarm.until(swarm.is_settled, 10)
        (whole,) = author.library.since(author.mesh.peer_id, NOWHERE)
        author.documents.write({"k": b"2"})
        author.documents.write({"l": b"2"})
        await swarm.until(swarm.is_settled, 10)
        author.kill()
        author.store.forget(author.mesh.peer_id)
        author.store.save(whole, None, durable=True)  # a disk from before
        author.restart()
        author.documents.write({"m": b"3"})  # before anybody could be asked
        await swarm.nursery.start(author.run)
        await swarm.until(swarm.is_settled, 10)
        for node in swarm.nodes:
            assert [(fact.key, fact.value) for fact in node.documents.read("")] == [
                ("k", b"2"), ("l", b"2"), ("m", b"3")
            ]  # fmt: skip
            assert Library(node.mesh, node.store, lambda *_: True).refused == {}


async def test_refused_documents_are_not_sent_again_and_again(autojump_clock: Clock) -> None:
    async with swarm_of(2) as swarm:
        one, two = swarm.nodes
        one.documents.write({"k": bytes(1000)})
        await swarm.until(swarm.is_settled, 10)
        two.library.forget(one.mesh.peer_id)
        two.library._may_write = lambda author, chain: author != one.mesh.peer_id
        await trio.sleep(10)
        sent = one.documents.sent_parts
        assert two.library.refused["foreign"] >= 1
        await trio.sleep(60)
        assert one.documents.sent_parts <= sent + 1
        assert two.documents.read("") == []


async def test_a_late_joiner_catches_up(autojump_clock: Clock) -> None:
    limits = replace(SMALL, reply_bytes=2000)
    async with swarm_of(20, limits=limits) as swarm:
        for n in range(20):
            for node in swarm.nodes:
                node.documents.write({f"k{n % 3}": b"%d" % n})
        await swarm.until(swarm.is_settled, 20)
        (newcomer,) = await swarm.grow(1)
        await swarm.until(swarm.is_settled, 10)
        assert newcomer.documents.read("") == swarm.nodes[0].documents.read("")
        assert len(newcomer.documents.read("")) == 60


async def test_comparing_alone_brings_everything(autojump_clock: Clock) -> None:
    async with swarm_of(6, limits=replace(SMALL, push_peers=0)) as swarm:
        for node in swarm.nodes:
            node.documents.write({"k": b"1"})
        await swarm.until(swarm.is_settled, 60)
        assert len(swarm.nodes[0].documents.read("k")) == 6


async def test_news_goes_every_way_at_first_and_then_along_a_tree(autojump_clock: Clock) -> None:
    async with swarm_of(20) as swarm:
        costs = []
        for n in range(4):
            before = sum(node.documents.sent_parts for node in swarm.nodes)
            swarm.nodes[0].documents.write({"k": b"%d" % n})
            await swarm.until(swarm.is_settled, 10)
            await trio.sleep(1)
            costs.append(sum(node.documents.sent_parts for node in swarm.nodes) - before)
        assert costs[0] >= 2 * 19
        assert costs[3] <= 1.25 * 19


async def test_broken_branches_do_not_keep_news_from_anybody(autojump_clock: Clock) -> None:
    async with swarm_of(20) as swarm:
        for n in range(3):
            swarm.nodes[0].documents.write({"k": b"%d" % n})
            await swarm.until(swarm.is_settled, 10)
        for victim in swarm.nodes[1:8]:
            victim.kill()
        await trio.sleep(1)
        left = [node for node in swarm.nodes if node.mesh.is_alive]
        swarm.nodes[0].documents.write({"k": b"last"})
        author = swarm.nodes[0].mesh.peer_id
        last = swarm.nodes[0].library.version(author)
        reached = await swarm.until(lambda: all(node.library.version(author) == last for node in left), 10)
        assert reached < 0.5  # every way again, and nobody had to compare
        assert all(node.documents.read("k")[0].value == b"last" for node in left)


async def test_who_sends_forgeries_is_dropped(autojump_clock: Clock) -> None:
    async with swarm_of(2) as swarm, trio.open_nursery() as nursery:
        a, b = swarm.nodes
        a.documents.write({"k": b"1"})
        await swarm.until(swarm.is_settled, 10)
        (part,) = a.library.since(a.mesh.peer_id, a.library.version(b.mesh.peer_id))
        later = msgspec.structs.replace(part.head, sequence=5)
        forged = msgspec.structs.replace(part, head=later)
        liar = swarm.world.add("liar")
        rpc = Rpc(liar)
        await nursery.start(rpc.run)
        await liar.connect(b.mesh.listen_addrs)
        with pytest.raises(ConnectionLost):
            for _ in range(10):
                await rpc.call(b.mesh.peer_id, PUSH, PushParts([forged] * 10), deadline_s=5)
        assert b.library.refused == {"forged": SMALL.refusals}
        assert a.mesh.peer_id in b.mesh.peers
        assert b.documents.read("") == [Fact(a.mesh.peer_id, "k", b"1")]
        nursery.cancel_scope.cancel()


async def test_who_is_no_member_is_told_nothing(autojump_clock: Clock) -> None:
    async with swarm_of(2) as swarm, trio.open_nursery() as nursery:
        submitter = swarm.world.add("guest", access=Access.SUBMIT)
        rpc = Rpc(submitter)
        await nursery.start(rpc.run)
        await submitter.connect(swarm.nodes[0].mesh.listen_addrs)
        with pytest.raises(MycelError, match="role member"):
            await rpc.call(swarm.nodes[0].mesh.peer_id, PUSH, PushParts([]), deadline_s=5)
        nursery.cancel_scope.cancel()


def test_the_same_seed_gives_the_same_run() -> None:
    async def story() -> tuple[float, list[int]]:
        async with swarm_of(8, seed=9) as swarm:
            for n in range(5):
                for node in swarm.nodes:
                    node.documents.write({f"k{n}": b"v"})
                await trio.sleep(0.1)
            await swarm.until(swarm.is_settled, 20)
            return trio.current_time(), [node.documents.sent_parts for node in swarm.nodes]

    assert run(story, 9) == run(story, 9)
