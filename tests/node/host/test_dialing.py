"""Dialing: deadlines, several addresses, the wrong peer, and what is left when a dial fails or is ended."""

from __future__ import annotations

import pytest
import trio
from multiaddr import Multiaddr

from mycel.node.dialer import STAGGER_MAX_S, STAGGER_MIN_S, Race, Stagger
from mycel.protocol.errors import DialError, Refused
from mycel.simnet.network import SimNetwork


def addr_of(host, ip=None):
    """The host's IPv4 address, or the same with another IP."""
    addr = str(host.listen_addrs[0])
    return addr if ip is None else f"/ip4/{ip}/tcp/4001/p2p/{host.peer_id}"


def test_dialing_silence_ends_with_the_deadline(play):
    async def scenario(world):
        a, b = await world.host("a"), await world.host("b")
        world.machine("b").silence()
        began = trio.current_time()
        with pytest.raises(DialError, match="no answer within 5 s"):
            await a.connect([addr_of(b)])
        assert trio.current_time() - began < 5.1
        began = trio.current_time()
        with pytest.raises(DialError, match=r"within 0\.7 s"):
            await a.connect([addr_of(b)], timeout=0.7)
        assert trio.current_time() - began < 0.71
        assert a.connections == 0

    play(scenario)


def test_a_dial_ends_when_the_peer_comes_by_itself(play):
    async def scenario(world):
        a, b, elsewhere = await world.host("a"), await world.host("b"), await world.host("elsewhere")
        world.machine("elsewhere").silence()
        silent = addr_of(b, world.machine("elsewhere").ips[0])
        assert not elsewhere.connections
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(b.connect, [addr_of(a)])
            assert await a.connect([silent]) == b.peer_id
        assert trio.current_time() - began < 0.5
        assert b.peer_id in a.peers
        assert a.connections == 1

    play(scenario)


def test_a_listener_that_never_shakes_hands_ends_with_the_deadline(play):
    async def scenario(world):
        a = await world.host("a")
        machine = world.net.add("mute")
        await SimNetwork(machine).listen(Multiaddr("/ip4/0.0.0.0/tcp/4001"))
        began = trio.current_time()
        with pytest.raises(DialError, match="no handshake within 5 s"):
            await a.connect([f"/ip4/{machine.ips[0]}/tcp/4001"])
        assert trio.current_time() - began < 5.3
        assert a.connections == 0

    play(scenario)


def test_a_dialer_that_never_shakes_hands_is_dropped(play):
    async def scenario(world):
        b = await world.host("b")
        pipe = await SimNetwork(world.net.add("mute")).dial(Multiaddr(addr_of(b)))
        await trio.sleep(1)
        assert b.connections == 1
        await trio.sleep(5)
        assert b.connections == 0
        buffer = bytearray(100)
        await pipe.wait_readable()
        assert pipe.try_recv_into(buffer) == 0

    play(scenario)


def test_the_wrong_peer_at_an_address_is_refused(play):
    async def scenario(world):
        a, b, c = await world.host("a"), await world.host("b"), await world.host("c")
        wrong = addr_of(c, ip=world.machine("b").ips[0])
        with pytest.raises(Refused, match=f"expected peer {c.peer_id}, found {b.peer_id}"):
            await a.connect([wrong])
        assert not a.peers

    play(scenario)


def test_a_node_does_not_connect_to_itself(play):
    async def scenario(world):
        a = await world.host("a")
        with pytest.raises(Refused, match="this node"):
            await a.connect([f"/ip4/{world.machine('a').ips[0]}/tcp/4001"])
        await trio.sleep(1)
        assert a.connections == 0
        assert not a.peers

    play(scenario)


def test_of_several_addresses_the_first_that_works_wins_without_waiting_for_the_others(play):
    async def scenario(world):
        a, b = await world.host("a"), await world.host("b")
        world.net.add("dead")
        world.machine("dead").silence()
        dead = addr_of(b, ip=world.machine("dead").ips[0])
        nobody = f"/ip4/{world.machine('b').ips[0]}/tcp/1/p2p/{b.peer_id}"
        began = trio.current_time()
        await a.connect([nobody, addr_of(b)])
        assert trio.current_time() - began < 0.08  # a refusal (20 ms), then the connection (40 ms)
        a.disconnect(b.peer_id, "again")
        await trio.sleep(1)
        began = trio.current_time()
        await a.connect([dead, addr_of(b)])
        assert trio.current_time() - began < 0.25  # one stagger
        a.disconnect(b.peer_id, "again")
        await trio.sleep(1)
        began = trio.current_time()
        await a.connect([addr_of(b), dead])
        assert trio.current_time() - began < 0.05

    play(scenario)


def test_a_failed_dial_names_every_address_and_blocks_nothing(play):
    async def scenario(world):
        a, b = await world.host("a"), await world.host("b")
        nobody = f"/ip4/{world.machine('b').ips[0]}/tcp/1"
        nowhere = "/ip4/11.9.9.9/tcp/1"
        with pytest.raises(DialError) as caught:
            await a.connect([nobody, nowhere])
        assert nobody in str(caught.value)
        assert nowhere in str(caught.value)
        await a.connect([addr_of(b)])

    play(scenario)


def test_a_cancelled_connect_leaves_nothing(play):
    async def scenario(world):
        a, b = await world.host("a"), await world.host("b")
        for step in range(1, 12):
            with trio.move_on_after(step * 0.004):
                await a.connect(b.listen_addrs)
            a.disconnect(b.peer_id, "again")
            await trio.sleep(1)
            assert a.connections == b.connections == 0
        assert await a.connect(b.listen_addrs) == b.peer_id

    play(scenario)


def test_connect_calls_for_one_peer_share_one_connection(play):
    async def scenario(world):
        a, b = await world.host("a"), await world.host("b")
        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(a.connect, b.listen_addrs)
        await trio.sleep(0.1)
        assert b.counters.accepted == 1

    play(scenario)


def test_a_dead_first_address_costs_less_once_the_network_is_known_to_be_quick():
    stagger = Stagger()
    before = stagger.seconds
    for _ in range(20):
        stagger.learn(0.002)
    assert stagger.seconds == STAGGER_MIN_S < before
    for _ in range(20):
        stagger.learn(5.0)
    assert stagger.seconds == STAGGER_MAX_S


async def test_a_slower_try_that_came_through_all_the_same_is_discarded(autojump_clock):
    discarded = []

    async def attempt(addr):
        with trio.CancelScope(shield=True):
            await trio.sleep(1.0)
        return str(addr)

    addrs = [Multiaddr(f"/ip4/11.0.0.{i}/tcp/1") for i in (1, 2)]
    race = Race(addrs, attempt, discard=discarded.append)
    assert await race.run() == str(addrs[0])
    assert discarded == [str(addrs[1])]


def test_an_address_that_this_node_has_itself_is_not_dialled_where_there_is_another(play):
    async def scenario(world):
        a, b = await world.host("a"), await world.host("b")
        await a.connect([addr_of(b, ip=world.machine("a").ips[0]), addr_of(b)])
        assert a.counters.accepted == 0
        assert not a.counters.lost

    play(scenario)
