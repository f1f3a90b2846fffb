"""Kademlia in whole daemons: modes, members found by their id alone, memories, hostile members."""

from __future__ import annotations

import pytest
import trio

from mycel.dht.kad import place
from mycel.dht.kad.memory import read as read_memory
from mycel.dht.kad.message import FOREIGN_PROTOCOL, KAD_PROTOCOL, Kind, Message, read, write
from mycel.dht.kad.record import name_of, seal
from mycel.dht.kad.table import Contact
from mycel.node import contacts
from mycel.node.discovery import REMEMBERED
from mycel.node.host import Host
from mycel.node.memory import VolatileMemory
from mycel.node.metrics import render
from mycel.node.reach import verdict
from mycel.protocol import varint
from mycel.protocol.errors import DialError, Refused, StreamReset
from mycel.protocol.keys import OwnKey
from mycel.protocol.limits import DEFAULT_KAD_LIMITS as LIMITS
from mycel.protocol.mesh import PeerId
from mycel.simnet.network import SimNetwork


def spoken(node, other):
    """Whether `node` sees that `other` answers questions."""
    info = node.host.peers.get(other.host.peer_id)
    return info is not None and KAD_PROTOCOL in info.protocols


async def stated(t, *nodes):
    """Wait until these nodes' addresses are kept by somebody."""
    await t.until(lambda: all(node.discovery.kad.own_record(place.NAME) for node in nodes), 60)
    await trio.sleep(2)


def test_who_can_be_called_answers_and_who_cannot_only_asks_and_that_may_change(town):
    async def scenario(t):
        founder = await t.found()
        second = await t.join("second")
        home = await t.join("home", "full cone")
        await t.until(lambda: home.reach.verdict.kind is verdict.Kind.PUNCHABLE, 20)
        await t.until(lambda: not spoken(founder, home) and spoken(founder, second))
        await trio.sleep(1)
        assert founder.discovery.kad.table.find(home.host.peer_id) is None
        assert founder.discovery.kad.table.find(second.host.peer_id) is not None
        assert (await home.discovery.put("word", b"from home")).replicas == 2
        found = await founder.discovery.get(home.host.peer_id, "word")
        assert found.value == b"from home"
        large = bytes(range(256)) * 1024
        assert (await home.discovery.put("large", large)).replicas == 2
        assert (await founder.discovery.get(home.host.peer_id, "large")).value == large

        home.reach.set_mapped([t.forward("home")])
        await t.until(lambda: home.discovery.kad.is_serving and spoken(founder, home), 30)
        await trio.sleep(1)
        assert founder.discovery.kad.table.find(home.host.peer_id) is not None

    town(scenario)


def test_a_member_is_found_and_dialled_by_its_id_alone_wherever_it_is(town, monkeypatch):
    """Nodes that want few contacts are not all connected with each other."""
    monkeypatch.setattr(contacts, "CONTACTS_MAX", 2)

    async def scenario(t):
        await t.found()
        nodes = [await t.join(f"n{number}") for number in range(6)]
        home = await t.join("home", "symmetric")
        await stated(t, *nodes, home)

        async def part(askers, others):
            """Two whom the mesh does not keep connected, and who are not now; the second one's id too."""
            asker, other = next(
                (one, other)
                for one in askers
                for other in others
                if one is not other
                and not one.contacts.holds(other.host.peer_id)
                and not other.contacts.holds(one.host.peer_id)
            )
            asker.host.disconnect(other.host.peer_id, "unused")
            asker.discovery.kad.table.forget(other.host.peer_id)
            await t.until(lambda: other.host.peer_id not in asker.host.peers)
            return asker, other, other.host.peer_id

        asker, wanted, peer = await part(nodes, nodes)
        assert await asker.discovery.find(peer) == tuple(map(str, wanted.host.listen_addrs))
        await asker.discovery.connect(peer)
        assert peer in asker.host.peers

        unfit = [*home.reach.circuits.relays, *home.contacts._table]
        far, _, peer = await part([one for one in nodes if one.host.peer_id not in unfit], [home])
        assert "p2p-circuit" in (await far.discovery.find(peer))[-1]
        await far.discovery.connect(peer)
        assert peer in far.host.peers

        seeker, _, peer = await part(nodes[::-1], nodes)
        monkeypatch.setattr(contacts, "CONTACTS_MAX", 20)
        where = f"/ip4/11.200.1.1/tcp/4001/p2p/{peer}"
        seeker.contacts.learn(peer, [where], trio.current_time())
        await t.until(lambda: peer in seeker.host.peers, 60)
        assert not seeker.discovery.kad.asker.may_hang_up(peer), "the mesh wants it now"

    town(scenario)


def test_nobody_knows_a_peer_that_is_not_there(town):
    async def scenario(t):
        founder = await t.found()
        await t.join("second")
        with pytest.raises(DialError, match="nobody here knows"):
            await founder.discovery.connect(OwnKey(bytes(32)).peer_id)
        with pytest.raises(ValueError, match="peer id"):
            await founder.discovery.connect(PeerId("nonsense"))

    town(scenario)


def test_a_node_that_starts_again_needs_no_bootstrap_peer(town):
    async def scenario(t):
        founder = await t.found()
        second, third = await t.join("second"), await t.join("third")
        await stated(t, second)
        await second.discovery.put("word", b"kept")
        second.stop()
        await t.until(lambda: second.host.peer_id not in founder.host.peers)
        memory = VolatileMemory()
        memory.put(REMEMBERED, second.discovery.kad.memory())
        again = await t.again(second, memory)
        assert not again.contacts.idle()
        await t.until(lambda: len(again.host.peers) == 2, 30)
        assert third.host.peer_id in again.host.peers
        assert again.discovery.kad.own_record("word").value == b"kept"
        again.stop()
        await t.until(lambda: not third.host.peers.get(second.host.peer_id))
        kept = read_memory(memory.get(REMEMBERED))
        assert {one.peer for one in kept.contacts} == {founder.host.peer_id, third.host.peer_id}
        assert len(kept.records) == 2

    town(scenario)


async def ask(stream, *messages):
    """The answers to `messages`, which are sent at once over one stream."""
    answers, data = [], b""
    await stream.send(b"".join(map(write, messages)))
    for _ in messages:
        while (cut := varint.split_prefixed(data, 1 << 20)) is None:
            data += await stream.receive_some()
        data = data[cut[1] :]
        answers.append(read(cut[0], LIMITS))
    return answers


def test_what_a_hostile_member_sends_is_refused_counted_and_bounded(town):
    async def scenario(t):
        victim = await t.found()
        mallory = await t.join("mallory")
        host, kad = mallory.host, victim.discovery.kad
        wall = host.wall()

        def put(name="n", expires=60.0, author=host.peer_id, value=b"v"):
            raw_name = name_of(author, name, LIMITS)
            record = seal(host.peer_id, raw_name, (1, wall + expires, value), host.sign)
            return Message(Kind.PUT_VALUE, record.name, record.raw)

        own = Contact(host.peer_id, (b"a",))
        other = Contact(victim.host.peer_id, (b"a",))
        stream = await host.open_stream(victim.host.peer_id, KAD_PROTOCOL)
        bad = [
            put(author=victim.host.peer_id),
            put(expires=-1),
            put(expires=LIMITS.life_s + LIMITS.skew_s + 60),
            put(value=bytes(LIMITS.value_bytes + 1)),
            Message(Kind.PUT_VALUE, b"/pk/poison", b"poison"),
        ]
        answers = await ask(stream, *bad, Message(Kind.ADD_PROVIDER, b"key", providers=(other,)))
        assert not any(answer.record or answer.providers for answer in answers)
        flood = LIMITS.author_bytes // LIMITS.value_bytes + 8
        puts = [put(f"{number}", value=bytes(LIMITS.value_bytes)) for number in range(flood)]
        adds = [
            Message(Kind.ADD_PROVIDER, b"%d" % number, providers=(own,))
            for number in range(LIMITS.provider_keys + 8)
        ]
        for start in range(0, len(puts), 12):
            await ask(stream, *puts[start : start + 12])
            await trio.sleep(0.1)
        for start in range(0, len(adds), 24):
            await ask(stream, *adds[start : start + 24])
            await trio.sleep(0.1)
        await stream.aclose()
        rude = await host.open_stream(victim.host.peer_id, KAD_PROTOCOL)
        await rude.send(write(Message(Kind.PING)) * 100)
        with pytest.raises(StreamReset):
            while True:
                await rude.receive_some()
        told = render(victim)
        for reason in ("signature", "expired", "future", "size", "name", "provider_other", "flood"):
            assert f'mycel_kad_refused_total{{reason="{reason}"}} 1' in told, reason
        assert kad.counts["refused_quota"] >= 8
        assert f'mycel_kad_refused_total{{reason="quota"}} {kad.counts["refused_quota"]}' in told
        assert 'mycel_kad_refused_total{reason="provider_quota"} 8' in told
        assert kad.answerer.records.size <= LIMITS.author_bytes + 4096
        assert f"mycel_kad_providers {LIMITS.provider_keys}" in told
        assert (await mallory.discovery.put("good", b"word")).replicas == 1, "and goes on"

    town(scenario)


def test_strangers_are_answered_only_over_the_protocol_that_its_owner_opted_in(town):
    async def scenario(t):
        opened = await t.found(foreign_protocols=(FOREIGN_PROTOCOL,))
        closed = await t.join("closed")
        await t.join("third")
        await t.until(lambda: opened.discovery.kad.is_serving and closed.discovery.kad.is_serving)
        assert FOREIGN_PROTOCOL not in closed.host.protocols
        network = SimNetwork(t.net.add("outsider"))
        outsider = Host(network, OwnKey(network.entropy(32)), listen=["/ip4/0.0.0.0/tcp/4001"])
        async with trio.open_nursery() as nursery:
            await nursery.start(outsider.run)
            await outsider.connect(opened.host.listen_addrs)
            stream = await outsider.open_stream(opened.host.peer_id, FOREIGN_PROTOCOL)
            (answer,) = await ask(stream, Message(Kind.PING))
            assert answer.kind is Kind.PING
            with pytest.raises((Refused, StreamReset)):
                await ask(await outsider.open_stream(opened.host.peer_id, KAD_PROTOCOL), Message(Kind.PING))
            nursery.cancel_scope.cancel()

    town(scenario)
