"""Kademlia between simulated nodes: put, get, provide, find; the silent, the restless, the restarted."""

from __future__ import annotations

import pytest
import trio

from mycel.dht.kad.service import Kademlia
from mycel.protocol.errors import LimitExceeded, LocalProtocolError
from mycel.protocol.limits import DEFAULT_KAD_LIMITS, KadLimits

SMALL = KadLimits(bucket=8, quorum=5, provider_s=600)
"""For long runs: fewer replicas to talk to."""


def test_what_one_node_puts_every_other_gets(town):
    async def scenario(town):
        author, kad = town.nodes[3]
        stored = await kad.put("name", b"value")
        assert stored.replicas == stored.asked == DEFAULT_KAD_LIMITS.bucket
        assert stored.newer is None
        for _, reader in town.nodes:
            found = await reader.get(author.peer_id, "name")
            assert found.record.value == b"value"
            assert found.record.sequence == stored.sequence

    town(scenario, nodes=30)


def test_a_reader_that_saw_an_old_version_sees_the_new_one(town):
    async def scenario(town):
        author, kad = town.nodes[0]
        for version in range(4):
            stored = await kad.put("name", b"%d" % version)
            assert stored.replicas > stored.asked / 2
            for _, reader in town.nodes[::4]:
                found = await reader.get(author.peer_id, "name")
                assert found.record.value == b"%d" % version

    town(scenario, nodes=30)


def test_replicas_that_missed_a_version_are_told_by_who_reads(town):
    async def scenario(town):
        author, kad = town.nodes[0]
        await kad.put("name", b"old")
        absent = [mesh for mesh, _ in town.nodes[1:] if mesh.peer_id != author.peer_id][:8]
        for mesh in absent:
            town.world.silence(mesh)
        await kad.put("name", b"new")
        for mesh in absent:
            town.world.unsilence(mesh)
        await trio.sleep(120)
        raw = kad.own_record("name").name
        for _ in range(3):
            for _, reader in town.nodes:
                assert (await reader.get(author.peer_id, "name")).record.value == b"new"
        await trio.sleep(5)
        held = [one.answerer.records.get(raw, town.world.wall()) for _, one in town.nodes]
        old = sum(record is not None and record.value == b"old" for record in held)
        new = sum(record is not None and record.value == b"new" for record in held)
        assert new >= 11
        assert old < len(absent), "some were told"

    town(scenario, nodes=24)


def test_a_third_gone_silent_costs_round_trips_and_no_time_outs(town):
    async def scenario(town):
        authors = town.nodes[::3]
        for number, (_, kad) in enumerate(authors):
            await kad.put(f"k{number}", b"%d" % number)

        async def read_all(offset):
            times = []
            for number, (author, _) in enumerate(authors):
                began = trio.current_time()
                reader = authors[(number + offset) % len(authors)][1]
                found = await reader.get(author.peer_id, f"k{number}")
                assert found is not None
                assert found.record.value == b"%d" % number
                times.append(trio.current_time() - began)
            return max(times)

        undisturbed = await read_all(5)
        for mesh, _ in town.nodes[1::3]:
            town.world.silence(mesh)
        worst = await read_all(7)
        assert worst < 2.0, "less than the deadline of one dial"
        assert worst < 8 * undisturbed
        await trio.sleep(30)
        assert await read_all(9) < 4 * undisturbed

    town(scenario, nodes=36)


def test_providers_are_found_until_they_stop(town):
    async def scenario(town):
        for mesh, kad in town.nodes[2:5]:
            assert await kad.provide(b"block") == SMALL.bucket, mesh.name
        found = await town.nodes[20][1].providers(b"block")
        assert {one.peer for one in found} == {mesh.peer_id for mesh, _ in town.nodes[2:5]}
        assert all(one.addrs for one in found)
        assert len(await town.nodes[21][1].providers(b"block", 2)) == 2
        town.nodes[2][1].unprovide(b"block")
        await trio.sleep(SMALL.provider_s + 60)
        found = await town.nodes[20][1].providers(b"block")
        assert {one.peer for one in found} == {mesh.peer_id for mesh, _ in town.nodes[3:5]}
        assert await town.nodes[20][1].providers(b"nothing") == []

    town(scenario, nodes=24, limits=SMALL)


def test_peers_are_found_by_their_id(town):
    async def scenario(town):
        for mesh, _ in town.nodes[::5]:
            found = await town.nodes[7][1].find_peer(mesh.peer_id)
            assert found.peer == mesh.peer_id
            if mesh is not town.nodes[7][0]:
                assert found.addrs == (mesh.listen_addrs[0].to_bytes(),)

    town(scenario, nodes=31)


def test_a_record_outlives_its_author_and_most_of_its_replicas(town):
    """Three times a third of the nodes crashes, ten minutes apart, and newcomers join."""

    async def scenario(town):
        author, kad = town.nodes[0]
        await kad.put("name", b"value")
        town.world.kill(author)
        for wave in range(3):
            alive = [mesh for mesh, _ in town.nodes if mesh.is_alive]
            for mesh in alive[wave::3]:
                town.world.kill(mesh)
            survivors = [pair for pair in town.nodes if pair[0].is_alive]
            town.nodes[:] = survivors
            await town.grow(5, SMALL)
            await trio.sleep(700)
        reader = town.nodes[-1][1]
        found = await reader.get(author.peer_id, "name")
        assert found.record.value == b"value"
        assert found.replicas > 2

    town(scenario, nodes=15, limits=SMALL)


def test_own_records_are_signed_anew_as_long_as_their_author_runs(town):
    async def scenario(town):
        author, kad = town.nodes[0]
        await kad.put("kept", b"1", life_s=600)
        await kad.put("left", b"2", life_s=600)
        kad.withdraw("left")
        await trio.sleep(2000)
        assert (await town.nodes[5][1].get(author.peer_id, "kept")).record.value == b"1"
        assert await town.nodes[5][1].get(author.peer_id, "left") is None

    town(scenario, nodes=8)


def test_a_client_asks_but_is_in_nobodys_table(town):
    async def scenario(town):
        await town.grow(1, serve=False)
        mesh, client = town.nodes[-1]
        stored = await client.put("name", b"value")
        assert stored.replicas == 12
        assert (await town.nodes[0][1].get(mesh.peer_id, "name")).record.value == b"value"
        assert not any(mesh.peer_id in kad.table for _, kad in town.nodes)

    town(scenario, nodes=12)


def test_a_restarted_node_remembers_whom_it_knew_and_what_it_said(town):
    async def scenario(town):
        mesh, kad = town.nodes[4]
        await kad.put("name", b"value")
        await kad.provide(b"block")
        kept = kad.memory()
        fresh = Kademlia(mesh, serve=False, remembered=kept)
        assert len(fresh.table) == 0
        await town.nursery.start(fresh.run)
        assert await fresh.bootstrap() > 10
        assert fresh.own_record("name").value == b"value"
        again = await fresh.put("name", b"newer")
        assert again.newer is None
        assert again.sequence > kad.own_record("name").sequence

    town(scenario, nodes=16)


@pytest.mark.parametrize(
    "kept", [b"", b"\x00", b"\x94\x02\x90\x90\x90", b"\x94\x01\x91\x92\xa1x\x90\x90\x90"]
)
def test_a_memory_that_cannot_be_read_is_none(town, kept):
    async def scenario(town):
        kad = Kademlia(town.world.add(), remembered=kept)
        assert kad.memory() == Kademlia(town.world.add()).memory()

    town(scenario, nodes=0)


def test_a_value_too_large_and_a_service_that_does_not_run_are_said(town):
    async def scenario(town):
        with pytest.raises(LimitExceeded, match="block"):
            await town.nodes[0][1].put("name", bytes(DEFAULT_KAD_LIMITS.value_bytes + 1))
        idle = Kademlia(town.world.add(), remembered=town.nodes[0][1].memory())
        with pytest.raises(LocalProtocolError, match=r"Kademlia\.run"):
            await idle.get(town.nodes[0][0].peer_id, "name")

    town(scenario, nodes=3)


def test_connections_that_lookups_opened_are_not_kept_without_bound(town):
    limits = KadLimits(connections=4)

    async def scenario(town):
        await town.grow(30, limits=limits)
        for mesh, kad in town.nodes[::6]:
            assert (await kad.put("name", b"v")).replicas >= 18, "both ends hang up at any moment"
            await trio.sleep(1)
            opened = [info for info in mesh.peers.values() if not info.inbound]
            assert len(opened) <= limits.connections + 1, "and the one it joined by"

    town(scenario, nodes=0)


def test_the_same_seed_gives_the_same_run(town):
    async def scenario(town):
        author, kad = town.nodes[0]
        await kad.put("name", b"value")
        await town.nodes[9][1].get(author.peer_id, "name")
        await trio.sleep(100)
        return trio.current_time(), [kad.asker.asked for _, kad in town.nodes], kad.counts

    assert town(scenario, nodes=12, seed=5) == town(scenario, nodes=12, seed=5)
