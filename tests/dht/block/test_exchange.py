"""The exchange between simulated nodes: from many at once, verified, paced, and around those who fail."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import pytest
import trio

from mycel.dht.block.exchange import Exchange
from mycel.dht.block.manifest import Want
from mycel.dht.block.memory import MemoryStore
from mycel.dht.block.message import BLOCK_PROTOCOL, read, write
from mycel.protocol.cid import Cid, cid_of
from mycel.protocol.errors import DeadlineExceeded, LimitExceeded, Refused, RemoteProtocolError, StreamReset
from mycel.protocol.limits import KIB, BlockLimits
from mycel.protocol.mesh import Access, Stream
from mycel.simnet.mesh import MeshOptions, MeshWorld, SimMesh, mesh_world

SIZE = 256 * KIB
DATA = [n.to_bytes(4, "big") * (SIZE // 4) for n in range(40)]
WANTS = [Want(cid_of(data), SIZE) for data in DATA]
LIMITS = BlockLimits(ahead_bytes_min=2 * SIZE)

Node = tuple[SimMesh, MemoryStore, Exchange]


class Scene:
    """A world and its nodes."""

    def __init__(self, world: MeshWorld) -> None:
        self.world = world

    def mesh(self, name: str, access: Access = Access.MEMBER) -> SimMesh:
        return self.world.add(name, access=access)

    async def node(self, name: str, has: Sequence[bytes] = (), **options: float) -> Node:
        mesh = self.mesh(name)
        store = MemoryStore(int(options.pop("quota_bytes", 0)))
        for data in has:
            await store.put(cid_of(data), data)
        return mesh, store, Exchange(mesh, store, limits=LIMITS, **options)

    async def join(self, *nodes: SimMesh) -> None:
        for n, mesh in enumerate(nodes):
            for other in nodes[:n]:
                await mesh.connect(other.listen_addrs)


@asynccontextmanager
async def scene_of(**options: float) -> AsyncIterator[Scene]:
    async with mesh_world(MeshOptions(seed=5, **options)) as world:
        with trio.fail_after(3600):
            yield Scene(world)


def serve_lies(mesh: SimMesh, answer: Callable[[Cid], bytes]) -> None:
    """A peer that says it has everything and sends what `answer` says."""

    async def lie(stream: Stream) -> None:
        while (message := await read(stream)) is not None:
            kind, cids, _ = message
            if kind == "want":
                await stream.send(write("have", cids))
            elif kind == "get":
                for cid in cids:
                    await stream.send(answer(cid))

    mesh.serve_stream(BLOCK_PROTOCOL, lie)


async def test_blocks_come_from_all_who_have_some(autojump_clock: trio.testing.MockClock) -> None:
    async with scene_of(bytes_per_s=1e6) as scene:
        a, _, exchange_a = await scene.node("a", DATA[:25])
        b, _, exchange_b = await scene.node("b", DATA[15:])
        c, store, exchange = await scene.node("c")
        await scene.join(a, b, c)
        steps: list[tuple[int, int]] = []
        await exchange.fetch(WANTS, progress=lambda done, total: steps.append((done, total)))
        assert [await store.get(want.cid) for want in WANTS] == DATA
        assert steps == [(n, 40) for n in range(41)]
        assert (
            exchange_a.uploads.blocks_sent + exchange_b.uploads.blocks_sent == exchange.blocks_received == 40
        )
        assert min(exchange_a.uploads.blocks_sent, exchange_b.uploads.blocks_sent) >= 15
        await exchange.fetch(WANTS)
        assert exchange.bytes_received == 40 * SIZE


@pytest.mark.parametrize("uplink", [1e6, 20e6])
async def test_those_who_fetch_together_serve_each_other(
    autojump_clock: trio.testing.MockClock, uplink: float
) -> None:
    """One seed with a capped uplink, four peers: together they are faster than the seed could serve four."""
    async with scene_of(latency_s_max=0.03) as scene:
        seed, _, _ = await scene.node("seed", DATA, upload_bytes_per_s=uplink)
        peers = [await scene.node(f"p{n}", upload_bytes_per_s=uplink) for n in range(4)]
        await scene.join(seed, *(mesh for mesh, _, _ in peers))
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            for _, _, exchange in peers:
                nursery.start_soon(exchange.fetch, WANTS)
        took = trio.current_time() - began
        alone = 4 * 40 * SIZE / uplink
        assert alone / took > 2.0
        for _, store, _ in peers:
            assert all(store.has(want.cid) for want in WANTS)


async def test_an_upload_goes_no_faster_than_its_owner_allows(autojump_clock: trio.testing.MockClock) -> None:
    async with scene_of() as scene:
        seed, _, _ = await scene.node("seed", DATA, upload_bytes_per_s=1e6)
        nodes = [await scene.node(name) for name in ("a", "b")]
        for mesh, _, _ in nodes:
            await mesh.connect(seed.listen_addrs)
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            for _, _, exchange in nodes:
                nursery.start_soon(exchange.fetch, WANTS)
        assert trio.current_time() - began == pytest.approx(2 * 40 * SIZE / 1e6, rel=0.05)


async def test_a_liar_is_dropped_and_every_corrupt_block_noticed(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with scene_of() as scene:
        liar = scene.mesh("liar")
        serve_lies(liar, lambda cid: write("block", [cid], SIZE) + bytes(SIZE))
        honest, _, honest_exchange = await scene.node("honest", DATA, upload_bytes_per_s=1e6)
        mesh, store, exchange = await scene.node("c")
        await scene.join(liar, honest, mesh)
        await exchange.fetch(WANTS)
        assert [await store.get(want.cid) for want in WANTS] == DATA
        assert list(exchange.liars) == [liar.peer_id]
        assert 1 <= exchange.corrupt <= 2
        assert honest_exchange.uploads.blocks_sent == 40


@pytest.mark.parametrize(
    "answer",
    [
        lambda cid: write("block", [cid], SIZE + 1) + bytes(SIZE + 1),
        lambda cid: write("block", [cid_of(b"unasked")], 7) + b"unasked",
        lambda cid: write("get", [cid]),
        lambda cid: b"\xff\xff\xff\xff",
        lambda cid: b"\x00\x00\x00\x02\xc1\xc1",
    ],
)
async def test_a_peer_that_breaks_the_rules_is_left(
    autojump_clock: trio.testing.MockClock, answer: Callable[[Cid], bytes]
) -> None:
    async with scene_of() as scene:
        rude = scene.mesh("rude")
        serve_lies(rude, answer)
        honest, _, _ = await scene.node("honest", DATA)
        mesh, store, exchange = await scene.node("c")
        await scene.join(rude, honest, mesh)
        await exchange.fetch(WANTS)
        assert all(store.has(want.cid) for want in WANTS)
        assert exchange.broken == 1


async def test_a_silent_peer_and_a_killed_one_do_not_stop_it(autojump_clock: trio.testing.MockClock) -> None:
    async with scene_of(bytes_per_s=1e6) as scene:
        mute = scene.mesh("mute")
        serve_lies(mute, lambda cid: b"")
        dies, _, _ = await scene.node("dies", DATA)
        stays, _, _ = await scene.node("stays", DATA)
        mesh, store, exchange = await scene.node("c")
        await scene.join(mute, dies, stays, mesh)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(exchange.fetch, WANTS)
            while exchange.blocks_received < 5:  # noqa: ASYNC110
                await trio.sleep(0.05)
            scene.world.kill(dies)
        assert all(store.has(want.cid) for want in WANTS)


async def test_a_peer_that_comes_later_is_asked_too(autojump_clock: trio.testing.MockClock) -> None:
    async with scene_of() as scene:
        late, _, _ = await scene.node("late", DATA)
        mesh, store, exchange = await scene.node("c")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(exchange.fetch, WANTS)
            await trio.sleep(5)
            await late.connect(mesh.listen_addrs)
        assert all(store.has(want.cid) for want in WANTS)


async def test_what_nobody_has_is_given_up_and_what_came_is_kept(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with scene_of() as scene:
        some, _, _ = await scene.node("some", DATA[:10])
        mesh, store, exchange = await scene.node("c")
        await scene.join(some, mesh)
        with pytest.raises(DeadlineExceeded, match="30 blocks did not come"):
            await exchange.fetch(WANTS)
        assert sum(store.has(want.cid) for want in WANTS) == 10


async def test_more_peers_than_a_fetch_talks_to_have_their_turn(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with scene_of() as scene:
        rude = [scene.mesh(f"rude{n}") for n in range(3)]
        for mesh in rude:
            serve_lies(mesh, lambda cid: b"\xff\xff\xff\xff")
        honest, _, _ = await scene.node("honest", DATA)
        mesh, store = scene.mesh("c"), MemoryStore()
        exchange = Exchange(mesh, store, limits=BlockLimits(peers=1))
        await scene.join(*rude, mesh)
        await mesh.connect(honest.listen_addrs)
        await exchange.fetch(WANTS)
        assert all(store.has(want.cid) for want in WANTS)
        assert exchange.broken == 3


async def test_a_store_without_room_ends_the_fetch(autojump_clock: trio.testing.MockClock) -> None:
    async with scene_of() as scene:
        seed, _, _ = await scene.node("seed", DATA)
        mesh, store, exchange = await scene.node("c", quota_bytes=10 * SIZE)
        await store.pin("model", [want.cid for want in WANTS])
        await scene.join(seed, mesh)
        with pytest.raises(LimitExceeded, match="quota"):
            await exchange.fetch(WANTS)


async def test_a_block_of_unknown_size_is_fetched(autojump_clock: trio.testing.MockClock) -> None:
    async with scene_of() as scene:
        seed, _, _ = await scene.node("seed", [b"the root"])
        mesh, _, exchange = await scene.node("c")
        await scene.join(seed, mesh)
        assert await exchange.get(Want(cid_of(b"the root"), None)) == b"the root"


async def test_submitters_and_strangers_get_no_blocks(autojump_clock: trio.testing.MockClock) -> None:
    async with scene_of() as scene:
        seed, _, exchange = await scene.node("seed", DATA)
        guest = scene.mesh("guest", Access.SUBMIT)
        await scene.join(seed, guest)
        stream = await guest.open_stream(seed.peer_id, BLOCK_PROTOCOL)
        await stream.send(write("get", [WANTS[0].cid]))
        with pytest.raises(Refused, match="needs MEMBER"):
            await stream.receive_some()
        assert exchange.uploads.blocks_sent == 0


@pytest.mark.parametrize(
    "messages",
    [
        [("get", [WANTS[0].cid, WANTS[0].cid])],
        [("want", [want.cid for want in WANTS] * 2000)],
        [("get", [cid_of(n.to_bytes(4, "big")) for n in range(300)])],
        [("have", [WANTS[0].cid])],
    ],
)
async def test_an_asker_beyond_the_bounds_is_cut_off(
    autojump_clock: trio.testing.MockClock, messages: list[tuple[str, list[Cid]]]
) -> None:
    async with scene_of() as scene:
        seed, _, _ = await scene.node("seed", DATA[:1])
        asker = scene.mesh("asker")
        await scene.join(seed, asker)
        stream = await asker.open_stream(seed.peer_id, BLOCK_PROTOCOL)
        for kind, cids in messages:
            await stream.send(write(kind, cids))
        with pytest.raises(StreamReset):
            while await stream.receive_some():
                pass
        assert isinstance(seed.last_handler_error, RemoteProtocolError)


async def test_streams_of_one_peer_are_bounded(autojump_clock: trio.testing.MockClock) -> None:
    async with scene_of() as scene:
        seed, _, exchange = await scene.node("seed", DATA)
        asker = scene.mesh("asker")
        await scene.join(seed, asker)
        streams = [
            await asker.open_stream(seed.peer_id, BLOCK_PROTOCOL) for _ in range(LIMITS.uploads_per_peer + 1)
        ]
        for stream in streams:
            await stream.send(write("want", [WANTS[0].cid]))
        answered = 0
        for stream in streams:
            with contextlib.suppress(StreamReset):
                answered += await read(stream) == ("have", [WANTS[0].cid], 0)
        assert answered == LIMITS.uploads_per_peer
        assert exchange.uploads.refused == 1


async def test_what_is_taken_back_is_answered(autojump_clock: trio.testing.MockClock) -> None:
    async with scene_of() as scene:
        seed, _, _ = await scene.node("seed", DATA[:2], upload_bytes_per_s=1e5)
        asker = scene.mesh("asker")
        await scene.join(seed, asker)
        stream = await asker.open_stream(seed.peer_id, BLOCK_PROTOCOL)
        first, second, third = (want.cid for want in WANTS[:3])
        await stream.send(write("get", [first, second, third]) + write("back", [second, third]))
        answers = []
        while len(answers) < 3:
            kind, cids, size = await read(stream) or ("gone", [], 0)
            await stream.receive_exactly(size)
            answers += [(kind, cid) for cid in cids]
        assert sorted(answers) == sorted([("block", first), ("gone", second), ("gone", third)])
