"""Values larger than a record: in a block, named by the record, had from whoever has it."""

from __future__ import annotations

import msgspec
import pytest
import trio

from mycel.dht.block.exchange import Exchange
from mycel.dht.block.manifest import Want
from mycel.dht.block.memory import MemoryStore
from mycel.dht.kad import place
from mycel.dht.kad.large import Values
from mycel.dht.kad.service import Kademlia
from mycel.protocol.cid import cid_of
from mycel.protocol.errors import DialError, LimitExceeded, RemoteProtocolError
from mycel.protocol.limits import DEFAULT_KAD_LIMITS as LIMITS
from mycel.protocol.limits import KadLimits


class Keeper:
    """A node's blocks, in memory."""

    def __init__(self, mesh):
        self.store = MemoryStore()
        self.exchange = Exchange(mesh, self.store)

    async def add_bytes(self, data, *, pin=None):
        cid = cid_of(data)
        await self.store.pin(pin, [cid])
        await self.store.put(cid, data)
        return cid

    async def fetch(self, cid, holders=()):
        return await self.exchange.get(Want(cid, None), peers=holders or None)

    async def unpin(self, pin):
        await self.store.unpin(pin)


@pytest.fixture
def shelves(town):
    """`shelves(scenario)`: a town of twelve whose nodes keep blocks too, as `scenario(town, values)`."""

    def run(scenario):
        async def main(town):
            values = [Values(kad, Keeper(mesh)) for mesh, kad in town.nodes]
            await scenario(town, values)

        return town(main, nodes=12)

    return run


def test_a_value_of_a_megabyte_is_put_read_replaced_and_withdrawn(shelves):
    async def scenario(town, values):
        (author, kad), store = town.nodes[0], values[0]._blocks.store
        big = bytes(range(256)) * 4096
        stored = await values[0].put("name", big)
        assert stored.replicas == 12
        assert len(kad.own_record("name").raw) < 200
        read = await values[5].get(author.peer_id, "name")
        assert (read.value, read.found.replicas) == (big, 11)
        other = big[::-1]
        await values[0].put("name", other)
        assert (await values[5].get(author.peer_id, "name")).value == other
        assert list(store.pinned("record/name")) == [cid_of(other)]
        assert (await values[0].get(author.peer_id, "name")).value == other
        await values[0].put("name", b"small")
        assert (await values[7].get(author.peer_id, "name")).value == b"small"
        assert not store.pinned("record/name")
        assert kad.memory().find(cid_of(other)) == -1, "it is provided no more"
        await values[0].put("name", big)
        await values[0].withdraw("name")
        assert not store.pinned("record/name")
        assert kad.own_record("name") is None

    shelves(scenario)


def test_who_read_a_value_gives_it_to_others_when_its_author_is_gone(shelves):
    async def scenario(town, values):
        author = town.nodes[0][0]
        big = bytes(LIMITS.value_bytes + 1)
        await values[0].put("name", big)
        assert (await values[4].get(author.peer_id, "name")).value == big
        town.world.kill(author)
        assert (await values[8].get(author.peer_id, "name")).value == big
        for mesh, _ in (town.nodes[4], town.nodes[8]):
            town.world.kill(mesh)
        with pytest.raises(DialError, match="nobody who has the block"):
            await values[2].get(author.peer_id, "name")

    shelves(scenario)


@pytest.mark.parametrize("value", [b"", b"\x91\x00", msgspec.msgpack.encode((b"cid", 5)),
                                   msgspec.msgpack.encode((cid_of(b""), 1 << 30))])  # fmt: skip
def test_a_record_that_names_no_block_is_no_value(shelves, value):
    async def scenario(town, values):
        await town.nodes[0][1].put("name", value, names_block=True)
        with pytest.raises(RemoteProtocolError):
            await values[3].get(town.nodes[0][0].peer_id, "name")

    shelves(scenario)


def test_bounds_are_said(shelves):
    async def scenario(town, values):
        with pytest.raises(LimitExceeded, match="1048576"):
            await values[0].put("name", bytes(LIMITS.large_bytes + 1))
        kad = town.nodes[1][1]
        with pytest.raises(LimitExceeded, match="withdraw"):
            for number in range(LIMITS.own_bytes // LIMITS.value_bytes + 1):
                await kad.put(f"n{number}", bytes(LIMITS.value_bytes))
        await kad.put("n0", b"smaller")
        assert len(kad.memory()) < 1 << 20

    shelves(scenario)


def test_a_node_that_ceases_to_answer_hands_over_what_it_keeps(town):
    async def scenario(town):
        (author, kad), (mesh, keeper) = town.nodes[0], town.nodes[5]
        await kad.put("name", b"value")
        await town.grow(4)
        name = kad.own_record("name").name

        def newcomers_hold():
            wall = town.world.wall()
            return [other.answerer.records.get(name, wall) is not None for _, other in town.nodes[-4:]]

        assert not any(newcomers_hold())
        keeper.serve(False)
        await trio.sleep(30)
        assert all(newcomers_hold())
        assert not any(mesh.peer_id in other.table for one, other in town.nodes if mesh.peer_id in one.peers)
        assert (await keeper.put("own", b"asks still")).replicas > 10
        keeper.serve(True)
        await trio.sleep(1)
        assert (await town.nodes[-1][1].find_peer(mesh.peer_id)) is not None
        assert (await town.nodes[-1][1].get(author.peer_id, "name")).record.value == b"value"

    town(scenario, nodes=8)


def test_a_client_is_found_by_the_addresses_that_it_states(town):
    async def scenario(town):
        await town.grow(1, serve=False)
        mesh, client = town.nodes[-1]
        asker = town.nodes[3][1]
        for other, _ in town.nodes[:-1]:
            mesh.disconnect(other.peer_id, "unused")
        await client.put(place.NAME, place.write(mesh.listen_addrs))
        for other, _ in town.nodes[:-1]:
            mesh.disconnect(other.peer_id, "unused")
        await trio.sleep(1)
        assert await asker.find_peer(mesh.peer_id) is None
        found = await place.find(asker, mesh.peer_id)
        await asker.asker.connect(found)
        assert mesh.peer_id in town.nodes[3][0].peers
        assert place.read(b"\xc1") == place.read(b"\x91\x01") == ()

    town(scenario, nodes=6)


def test_a_connection_that_somebody_else_uses_is_not_hung_up(town):
    async def scenario(town):
        await town.grow(20, limits=KadLimits(connections=3))
        mesh, kad = town.nodes[-1]
        (other, its_kad), kept = town.nodes[4], town.nodes[4][0].peer_id
        kad.asker.may_hang_up = lambda peer: peer != kept
        its_kad.asker.may_hang_up = lambda peer: peer != mesh.peer_id
        await kad.asker.connect(await kad.find_peer(kept))
        for number in range(6):
            await kad.put(f"name {number}", b"v")
            assert kept in mesh.peers
            assert mesh.peer_id in other.peers
        opened = [info.peer for info in mesh.peers.values() if not info.inbound]
        assert len(opened) <= 5

    town(scenario, nodes=0)


def test_an_earlier_runs_peers_are_tried_until_one_is_there(town):
    async def scenario(town):
        mesh, kad = town.nodes[2]
        others = [one for one, _ in town.nodes if one is not mesh]
        await kad.bootstrap()
        kept = kad.memory()
        for other in others:
            town.world.silence(other)
        again = town.world.restart(mesh)
        fresh = Kademlia(again, remembered=kept)
        await town.nursery.start(fresh.run)
        await trio.sleep(120)
        assert len(fresh.table) == 0
        tries = fresh.asker.asked
        assert 0 < tries < 80
        for other in others:
            town.world.unsilence(other)
        await trio.sleep(300)
        assert len(fresh.table) == len(others)

    town(scenario, nodes=6)
