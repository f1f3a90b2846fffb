"""Connections of a host: dialing, one per pair, deadlines, death, bounds, news."""

from __future__ import annotations

import hashlib

import pytest
import trio
from multiaddr import Multiaddr

from mycel.node.host import Host
from mycel.protocol.errors import ConnectionLost, DialError, LimitExceeded
from mycel.protocol.keys import OwnKey
from mycel.protocol.limits import Limits
from mycel.protocol.mesh import Access, PeerDown, PeerUp
from mycel.simnet.link import LinkOptions
from mycel.simnet.network import SimNetwork


async def echo(stream):
    while data := await stream.receive_some():
        await stream.send(data)


def addr_of(host, ip=None):
    """The host's IPv4 address, or the same with another IP."""
    addr = str(host.listen_addrs[0])
    return addr if ip is None else f"/ip4/{ip}/tcp/4001/p2p/{host.peer_id}"


def test_connecting_twice_returns_at_once_with_the_same_connection(play):
    async def scenario(world):
        a, b, peer = await world.pair()
        began = trio.current_time()
        assert await a.connect(b.listen_addrs) == peer
        assert trio.current_time() == began
        assert a.connections == b.connections == 1

    play(scenario)


def test_peers_learn_about_each_other(play):
    async def scenario(world):
        a, b, peer = await world.pair()
        b.serve_stream("/echo", echo)
        await trio.sleep(1)
        seen = a.peers[peer]
        assert seen.agent.startswith("mycel/")
        assert {"/echo", "/ipfs/ping/1.0.0", "/ipfs/id/1.0.0"} <= set(seen.protocols)
        assert f"/ip4/{world.machine('b').ips[0]}/tcp/4001" in map(str, seen.listen_addrs)
        assert not seen.inbound
        assert b.peers[a.peer_id].inbound
        assert str(a.observed_addrs[peer]).startswith(f"/ip4/{world.machine('a').ips[0]}/tcp/")
        assert abs(a.rtt(peer) - 0.020) < 0.001
        assert abs(await a.ping(peer) - 0.020) < 0.001

    play(scenario)


def test_protocols_served_later_are_pushed(play):
    async def scenario(world):
        a, b, peer = await world.pair()
        await trio.sleep(1)
        assert "/late" not in a.peers[peer].protocols
        b.serve_stream("/late", echo)
        await trio.sleep(1)
        assert "/late" in a.peers[peer].protocols

    play(scenario)


@pytest.mark.parametrize("seed", range(12))
def test_simultaneous_dials_leave_one_connection_and_lose_no_stream(play, seed):
    async def scenario(world):
        rng = world.net.rng
        a, b = await world.host("a"), await world.host("b")
        for host in (a, b):
            host.serve_stream("/echo", echo)
        answers = []

        async def meet(host, other, delay):
            await trio.sleep(delay)
            peer = await host.connect(other.listen_addrs)
            for number in range(40):
                stream = await host.open_stream(peer, "/echo")
                data = b"%d" % number * 500
                await stream.send(data)
                await trio.sleep(rng.random() * 0.01)
                await stream.send(data, end=True)
                got = b""
                while piece := await stream.receive_some():
                    got += piece
                assert got == data + data
                await stream.aclose()
                answers.append(number)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(meet, a, b, 0)
            nursery.start_soon(meet, b, a, rng.random() * 0.03)
        assert len(answers) == 80
        await trio.sleep(5)
        assert a.connections == b.connections == 1
        (of_a,), (of_b,) = a.peers.values(), b.peers.values()
        assert of_a.inbound != of_b.inbound

    play(scenario, seed=seed)


@pytest.mark.parametrize("seed", range(8))
def test_a_stream_that_never_ends_does_not_keep_a_second_connection(play, seed):
    async def scenario(world):
        rng = world.net.rng
        a, b = await world.host("a"), await world.host("b")
        losses = []

        async def hold(stream):
            while await stream.receive_some():
                pass

        async def meet(host, other, delay):
            await trio.sleep(delay)
            peer = await host.connect(other.listen_addrs)
            while True:
                stream = await host.open_stream(peer, "/hold")
                try:
                    await stream.send(b"there")
                    await stream.receive_some()
                except ConnectionLost as error:
                    losses.append(error.reason)

        for host in (a, b):
            host.serve_stream("/hold", hold)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(meet, a, b, 0)
            nursery.start_soon(meet, b, a, rng.random() * 0.003)
            await trio.sleep(a.limits.drain_s + 5)
            assert a.connections == b.connections == 1
            assert a.streams >= 2  # both hold theirs, over the connection that stayed
            assert set(losses) <= {"superseded"}
            nursery.cancel_scope.cancel()

    play(scenario, seed=seed)


def test_when_the_connection_that_stayed_dies_the_peer_is_down_and_can_be_dialled(play):
    """The one that was given up for it opens no streams any more: it does not stand for being connected."""

    async def scenario(world):
        a, b = await world.host("a"), await world.host("b")

        async def hold(host, other):
            peer = await host.connect(other.listen_addrs)
            stream = await host.open_stream(peer, "/echo")
            with pytest.raises(ConnectionLost):
                while True:
                    await stream.send(b"there")
                    await stream.receive_some()

        for host in (a, b):
            host.serve_stream("/echo", echo)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(hold, a, b)
            nursery.start_soon(hold, b, a)
            await trio.sleep(1)
            assert a.connections == b.connections == 2
            (kept,) = [link for link in a._links if not link.draining]
            events = []
            world.nursery.start_soon(world.collect, a, events)
            await trio.sleep(0.1)
            kept.end("silent", "cut by the test")
            await trio.sleep(0.3)
            assert [(event.peer, event.reason) for event in events] == [(b.peer_id, "silent")]
        await a.connect(b.listen_addrs)
        stream = await a.open_stream(b.peer_id, "/echo")
        await stream.send(b"again")
        assert await stream.receive_some() == b"again"

    play(scenario)


def test_simultaneous_dials_are_told_as_one_peer_coming_up(play):
    async def scenario(world):
        a, b = await world.host("a"), await world.host("b")
        events = []
        world.nursery.start_soon(world.collect, a, events)
        await trio.lowlevel.checkpoint()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(a.connect, b.listen_addrs)
            nursery.start_soon(b.connect, a.listen_addrs)
        await trio.sleep(5)
        assert events == [PeerUp(b.peer_id, Access.MEMBER)]
        assert a.connections == 1

    play(scenario)


def test_a_reset_is_noticed_within_half_a_second(play):
    async def scenario(world):
        a, _, peer = await world.pair()
        await trio.sleep(5)
        began = trio.current_time()
        world.machine("b").crash()
        down = await world.down(a, peer)
        assert down.reason == "reset"
        assert down.text.count("connection") == 2  # "connection to ... lost: connection reset by peer"
        assert trio.current_time() - began < 0.5
        assert peer not in a.peers

    play(scenario)


@pytest.mark.parametrize("phase", [0.0, 0.13, 0.31, 0.49])
def test_a_silent_peer_is_noticed_within_three_seconds(play, phase):
    async def scenario(world):
        a, _, peer = await world.pair()
        await trio.sleep(10 + phase)
        assert peer in a.peers  # an idle connection stays
        began = trio.current_time()
        world.machine("b").silence()
        down = await world.down(a, peer)
        assert down.reason == "silent"
        assert 1.9 < trio.current_time() - began < 3.0

    play(scenario)


def test_a_silent_peer_is_noticed_in_the_middle_of_a_transfer_too(play):
    async def scenario(world):
        a, b, peer = await world.pair(link=LinkOptions(latency_s=0.005, up_bytes_per_s=1e6))

        async def drain(stream):
            while await stream.receive_some():
                pass

        b.serve_stream("/drain", drain)
        stream = await a.open_stream(peer, "/drain")
        ended = []

        async def write():
            try:
                await stream.send(bytes(100_000_000))
            except ConnectionLost as error:
                ended.append((trio.current_time(), error.reason))

        world.nursery.start_soon(write)
        await trio.sleep(3)
        began = trio.current_time()
        world.machine("b").silence()
        await world.down(a, peer)
        await trio.lowlevel.checkpoint()
        assert ended[0][1] == "silent"
        assert ended[0][0] - began < 3.0

    play(scenario)


def test_a_short_outage_ends_nothing(play):
    async def scenario(world):
        a, b, peer = await world.pair()
        b.serve_stream("/echo", echo)
        await trio.sleep(5)
        world.machine("b").silence()
        await trio.sleep(1.5)
        world.machine("b").silence(False)
        await trio.sleep(5)
        stream = await a.open_stream(peer, "/echo")
        await stream.send(b"x")
        assert await stream.receive_exactly(1) == b"x"

    play(scenario)


def test_disconnect_gives_both_sides_the_reason(play):
    async def scenario(world):
        a, b, peer = await world.pair()
        downs = []

        async def watch(host, other):
            downs.append(await world.down(host, other))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch, a, peer)
            nursery.start_soon(watch, b, a.peer_id)
            await trio.sleep(0.1)
            a.disconnect(peer, "sends nonsense")
        assert all("sends nonsense" in down.text for down in downs)
        assert [down.reason for down in downs] == ["closed", "closed"]

    play(scenario)


def test_inbound_connections_are_bounded_in_all_and_per_address(play):
    async def scenario(world):
        b = await world.host("b", limits=Limits(connections=5, connections_per_ip=3))
        hosts = [await world.host(f"h{number}") for number in range(3)]
        for host in hosts:
            await host.connect(b.listen_addrs)
        await trio.sleep(1)
        crowd = world.net.add("crowd")

        async def one(number):
            key = OwnKey(hashlib.sha256(b"crowd%d" % number).digest())
            host = Host(SimNetwork(crowd), key, default_access=Access.MEMBER)
            await world.nursery.start(host.run)
            try:
                await host.connect(b.listen_addrs)
            except DialError:
                return False
            return True

        results = [await one(number) for number in range(4)]
        assert results == [True, True, False, False]
        assert b.counters.refused["connections"] == 2
        hosts[0].disconnect(b.peer_id, "make room")
        hosts[1].disconnect(b.peer_id, "make room")
        await trio.sleep(1)
        assert [await one(10), await one(11)] == [True, False]
        assert b.counters.refused["per_ip"] == 1

    play(scenario)


def test_handshakes_under_way_are_bounded(play):
    async def scenario(world):
        b = await world.host("b", limits=Limits(pending_handshakes=8))
        flood = SimNetwork(world.net.add("flood"))
        pipes = [await flood.dial(Multiaddr(addr_of(b))) for _ in range(20)]
        await trio.sleep(0.5)
        assert b.connections == 8
        assert b.counters.refused["handshakes"] == 12
        await trio.sleep(6)
        assert b.connections == 0
        a = await world.host("a")
        await a.connect(b.listen_addrs)
        assert len(pipes) == 20

    play(scenario)


def test_a_watcher_that_lags_too_far_is_told(play):
    async def scenario(world):
        a = await world.host("a", limits=Limits(events=3))
        async with a.events() as events:
            for number in range(4):
                other = await world.host(f"h{number}")
                await other.connect(a.listen_addrs)
            await trio.sleep(1)
            with pytest.raises(LimitExceeded, match="3"):
                await anext(events)

    play(scenario)


def test_every_coming_and_going_is_told_in_order(play):
    async def scenario(world):
        a, b = await world.host("a"), await world.host("b")
        events = []
        world.nursery.start_soon(world.collect, a, events)
        for _ in range(3):
            await b.connect(a.listen_addrs)
            await trio.sleep(0.5)
            b.disconnect(a.peer_id, "turn")
            await trio.sleep(0.5)
        assert [type(event) for event in events] == [PeerUp, PeerDown] * 3

    play(scenario)


def test_leaving_run_closes_the_listener_and_tells_the_peers(play):
    async def scenario(world):
        a = await world.host("a")
        machine = world.net.add("b")
        key = OwnKey(b"\7" * 32)
        host = Host(SimNetwork(machine), key, listen=["/ip4/0.0.0.0/tcp/4001"], default_access=Access.MEMBER)
        async with trio.open_nursery() as nursery:
            await nursery.start(host.run)
            await a.connect(host.listen_addrs)
            await world.up(host, a.peer_id)
            nursery.cancel_scope.cancel()
        assert not machine.listeners
        assert host.connections == 0
        down = await world.down(a, host.peer_id)
        assert down.reason == "left"
        assert "the node shut down" in down.text
        async with trio.open_nursery() as nursery:  # and the port is free again
            await nursery.start(host.run)
            await a.connect(host.listen_addrs)
            nursery.cancel_scope.cancel()

    play(scenario)


def test_a_peer_that_dials_again_after_losing_its_power_replaces_its_old_connection(play):
    async def scenario(world):
        _, b, _ = await world.pair()
        await trio.sleep(1)
        world.machine("a").vanish()
        world.machine("a").boot()
        again = Host(
            SimNetwork(world.machine("a")),
            OwnKey(hashlib.sha256(b"a").digest()),
            default_access=Access.MEMBER,
        )
        await world.nursery.start(again.run)
        b.serve_stream("/echo", echo)
        peer = await again.connect(b.listen_addrs)
        stream = await again.open_stream(peer, "/echo")
        await stream.send(b"x")
        assert await stream.receive_exactly(1) == b"x"
        await trio.sleep(5)
        assert b.connections == 1
        assert again.peer_id in b.peers

    play(scenario)


def test_signatures_of_peers_are_checked_with_their_keys(play):
    async def scenario(world):
        a, b, peer = await world.pair()
        signature = b.sign(b"data")
        assert a.verify(peer, b"data", signature)
        assert not a.verify(peer, b"other", signature)
        assert not a.verify(a.peer_id, b"data", signature)
        assert not a.verify("nonsense", b"data", signature)

    play(scenario)
