"""Punching between hosts that know each other over a relayed connection only, and who gets in its way."""

from __future__ import annotations

from dataclasses import replace

import pytest
import trio
from multiaddr import Multiaddr

from mycel.node.reach.echo import Echo
from mycel.node.reach.exchange import send_all
from mycel.node.reach.punch import Puncher
from mycel.protocol import echo as wire
from mycel.protocol import punch
from mycel.protocol.address import endpoint_of, tcp_addr
from mycel.protocol.errors import PipeBroken
from mycel.protocol.limits_reach import DEFAULT_PUNCH_LIMITS
from mycel.protocol.mesh import Access, PathKind
from mycel.protocol.punch import PunchFailed


class Scene:
    """Two hosts connected with a relay, and over it with each other."""

    def __init__(self, world, hosts, echoes, punchers):
        self.world = world
        self.a, self.b, self.relay = hosts
        self.echoes = echoes
        self.punchers = punchers
        self.carrier = None

    async def carry(self, through=None):
        """A relayed connection from a to b; `through` a host, it really goes there, else it just says so."""
        if through is not None:
            await self.carry_through(through)
            return
        listener = await self.world.networks["b"].listen(Multiaddr("/ip4/0.0.0.0/tcp/9"))
        at = tcp_addr(self.world.net.machines["b"].ips[0], 9)
        near = await self.world.networks["a"].dial(at)
        far = await listener.accept()
        listener.close()
        self.carrier = near
        async with trio.open_nursery() as nursery:
            for host, pipe, peer, dialer in ((self.a, near, self.b, True), (self.b, far, self.a, False)):
                nursery.start_soon(self.world.adopt_relayed, host, pipe, self.relay, peer, dialer)

    async def carry_through(self, relay):
        """Byte by byte over a third machine."""
        world = self.world
        listener = await world.networks["r"].listen(Multiaddr("/ip4/0.0.0.0/tcp/9"))
        at = tcp_addr(world.net.machines["r"].ips[0], 9)
        near = await world.networks["a"].dial(at)
        near_end = await listener.accept()
        far = await world.networks["b"].dial(at)
        far_end = await listener.accept()
        listener.close()
        world.nursery.start_soon(pump, near_end, far_end)
        world.nursery.start_soon(pump, far_end, near_end)
        self.carrier = near
        async with trio.open_nursery() as nursery:
            for host, pipe, peer, dialer in ((self.a, near, self.b, True), (self.b, far, self.a, False)):
                nursery.start_soon(self.world.adopt_relayed, host, pipe, relay, peer, dialer)

    def path(self):
        return self.a.peers[self.b.peer_id].path, self.b.peers[self.a.peer_id].path


async def pump(source, target):
    """Carry bytes until either end is gone."""
    buffer = bytearray(65536)
    try:
        while (count := source.try_recv_into(buffer)) != 0:
            if count is None:
                await source.wait_readable()
            else:
                await send_all(target, bytes(buffer[:count]))
    except PipeBroken:
        pass
    target.close()


DIRECT = PathKind.DIRECT, PathKind.DIRECT
RELAYED = PathKind.RELAYED, PathKind.RELAYED


IPS = {"a": "11.7.0.1", "b": "11.7.0.2", "r": "11.7.0.3"}


async def scene(world, *, serve=True, ipv6=False, **options):
    hosts = []
    for name, ip in IPS.items():
        ips = (ip, f"2a0a:ffff::7:{len(hosts)}") if ipv6 else (ip,)
        hosts.append(await world.host(name, add={"ips": ips}, **options))
    echoes = []
    for host, name in zip(hosts, "abr", strict=True):
        echoes.append(Echo(host, world.networks[name]))
        await world.nursery.start(echoes[-1].run)
    if serve:
        echoes[2].serve()
    punchers = [
        Puncher(host, world.networks[name], echo)
        for host, name, echo in zip(hosts, "abr", echoes, strict=True)
    ]
    for host in hosts[:2]:
        await world.connect(host, hosts[2])
    await trio.sleep(1)
    found = Scene(world, hosts, echoes, punchers)
    await found.carry()
    assert found.path() == RELAYED
    return found


@pytest.mark.parametrize("serve", [True, False], ids=["echo", "guess"])
def test_a_punch_replaces_the_relayed_connection(play, serve):
    async def scenario(world):
        s = await scene(world, serve=serve)
        began = trio.current_time()
        await s.punchers[0].punch(s.b.peer_id)
        assert trio.current_time() - began < 0.5
        await trio.sleep(0.1)
        assert s.path() == DIRECT
        # At the fresh ports, not where the hosts listen.
        assert endpoint_of(s.a.peers[s.b.peer_id].addr).port not in (4001, 9)
        await trio.sleep(s.a.limits.drain_s + 1)
        assert s.a.connections == s.b.connections == 2, "the relay and each other"

    play(scenario, latency_s=0.01)  # a round trip of 40 ms


def test_either_side_may_ask_and_both_at_once(play):
    async def scenario(world):
        s = await scene(world)
        ends = []

        async def ask(puncher, peer):
            try:
                await puncher.punch(peer)
            except PunchFailed as error:
                ends.append(error.reason)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, s.punchers[0], s.b.peer_id)
            nursery.start_soon(ask, s.punchers[1], s.a.peer_id)
        await trio.sleep(1)
        assert s.path() == DIRECT
        assert ends in ([], ["busy"])
        assert s.a.connections == s.b.connections
        await s.punchers[0].punch(s.b.peer_id)  # nothing to do any more

    play(scenario)


@pytest.mark.parametrize("public", [0, 1], ids=["reverse", "dial"])
def test_a_public_side_is_dialled_where_it_listens(play, public):
    async def scenario(world):
        s = await scene(world)
        at = tcp_addr(world.net.machines["ab"[public]].ips[0], 4001)
        s.punchers[public].public = lambda: [at]
        await s.punchers[0].punch(s.b.peer_id)
        await trio.sleep(0.1)
        assert s.path() == DIRECT
        dialled = (s.a.peers[s.b.peer_id], s.b.peers[s.a.peer_id])[1 - public]
        assert dialled.addr == at
        assert not dialled.inbound

    play(scenario)


def test_a_public_address_that_is_none_costs_two_seconds_and_then_they_punch(play):
    async def scenario(world):
        s = await scene(world)
        world.net.add("dead")
        world.net.machines["dead"].silence()
        s.punchers[1].public = lambda: [tcp_addr(world.net.machines["dead"].ips[0], 4001)]
        began = trio.current_time()
        await s.punchers[0].punch(s.b.peer_id)
        assert 2 < trio.current_time() - began < 3

    play(scenario)


def test_streams_go_on_over_the_relay_until_they_end(play):
    async def scenario(world):
        s = await scene(world)

        async def echo(stream):
            while data := await stream.receive_some():
                await stream.send(data)

        s.b.serve_stream("/test/echo/1", echo)
        stream = await s.a.open_stream(s.b.peer_id, "/test/echo/1")
        await stream.send(b"before")
        assert await stream.receive_exactly(6) == b"before"
        await s.punchers[0].punch(s.b.peer_id)
        await stream.send(b"after")
        assert await stream.receive_exactly(5) == b"after"
        await stream.aclose()

    play(scenario)


# Hostile


def test_a_stranger_on_the_punched_port_gets_nothing_and_stops_nothing(play):
    async def scenario(world):
        s = await scene(world)
        world.net.add("evil")
        evil = world.networks["a"].__class__(type(world.networks["a"]._network)(world.net.machines["evil"]))
        s.punchers[0].network = Watched(s.punchers[0].network)
        heard = []

        async def knock(listener):
            at = tcp_addr(world.net.machines["a"].ips[0], endpoint_of(listener.addr).port)
            for hello in (b"x" * 48, b"", b"\x13/multistream/1.0.0\n"):
                pipe = await evil.dial(at)
                pipe.try_send(hello)
                heard.append(pipe)

        s.punchers[0].network.on_listen = lambda listener: world.nursery.start_soon(knock, listener)
        await s.punchers[0].punch(s.b.peer_id)
        assert s.path()[0] is PathKind.DIRECT
        assert len(heard) == 3

    play(scenario)


class Watched:
    """A network that tells of its listeners."""

    def __init__(self, network):
        self._network = network
        self.on_listen = None

    def __getattr__(self, name):
        return getattr(self._network, name)

    async def listen(self, addr, *, shared=False):
        listener = await self._network.listen(addr, shared=shared)
        if self.on_listen and ":" not in endpoint_of(listener.addr).host:
            self.on_listen(listener)
        return listener


def test_a_peer_without_the_key_does_not_get_in(play, monkeypatch):
    async def scenario(world):
        s = await scene(world)
        right = punch.Exchange._try

        def wrong(self, way, at_s):
            found = right(self, way, at_s)
            return found if self.asks else replace(found, shares=(found.shares[0], b"\0" * 32))

        monkeypatch.setattr(punch.Exchange, "_try", wrong)
        began = trio.current_time()
        with pytest.raises(PunchFailed, match="nobody was met") as caught:
            await s.punchers[0].punch(s.b.peer_id)
        assert caught.value.reason == "failed"
        assert trio.current_time() - began < 5
        assert s.path() == RELAYED
        assert s.punchers[1].strangers

    play(scenario)


def raw(host, replies):
    """Let `host` answer the punch protocol by what `replies(stream)` does."""
    host.stop_serving(punch.PROTOCOL)
    host.serve_stream(punch.PROTOCOL, replies)


async def read(stream):
    size = int.from_bytes(await stream.receive_exactly(4), "big")
    return punch.decode(await stream.receive_exactly(size))


def test_a_peer_that_says_nothing_or_nonsense_or_too_much_ends_in_time(play):
    async def silent(stream):
        await trio.sleep_forever()

    async def nonsense(stream):
        await stream.send(b"\0\0\0\x05hello")
        await trio.sleep_forever()

    async def too_much(stream):
        await stream.send(b"\0\x10\0\0" + bytes(100))
        await trio.sleep_forever()

    async def hangs_up(stream):
        await stream.aclose()

    async def out_of_turn(stream):
        await stream.send(punch.encode(punch.Go(punch.Way.PUNCH)))
        await trio.sleep_forever()

    async def stops_half_way(stream):
        await read(stream)
        await stream.send(punch.encode(punch.Offer(bytes(32))))
        await trio.sleep_forever()

    async def scenario(world):
        s = await scene(world)
        for answer, reason in (
            (silent, "deadline"),
            (nonsense, "protocol"),
            (too_much, "protocol"),
            (hangs_up, "lost"),
            (out_of_turn, "protocol"),
            (stops_half_way, "deadline"),
        ):
            raw(s.b, answer)
            began = trio.current_time()
            with pytest.raises(PunchFailed) as caught:
                await s.punchers[0].punch(s.b.peer_id)
            assert caught.value.reason == reason, answer
            limits = DEFAULT_PUNCH_LIMITS
            assert trio.current_time() - began < limits.step_s + limits.learn_s + 1
            assert s.path()[0] is PathKind.RELAYED

    play(scenario)


def test_a_peer_that_lies_about_its_addresses_is_dialled_at_most_there(play):
    """It names the loopback, the LAN and a third machine: only the last gets a packet, and no answer."""

    async def scenario(world):
        s = await scene(world)
        third = world.net.add("third")
        home = world.net.machines["a"].ips[0]
        lies = ["127.0.0.1", "192.168.1.1", "10.0.0.1", third.ips[0]]
        addrs = tuple(f"/ip4/{ip}/tcp/4001" for ip in lies)

        async def lie(stream):
            await read(stream)
            offer = punch.Offer(bytes(32), addrs, near=(*addrs, f"/ip4/{home}/tcp/4001"))
            await read(stream)
            go = punch.Go(punch.Way.PUNCH)
            await stream.send(punch.encode(offer) + punch.encode(go))
            await trio.sleep_forever()

        raw(s.b, lie)
        before = len(world.networks["a"].contacted())
        with pytest.raises(PunchFailed) as caught:
            await s.punchers[0].punch(s.b.peer_id)
        assert caught.value.reason == "deadline"
        assert world.networks["a"].contacted()[before:] == (third.ips[0],)

    play(scenario)


@pytest.mark.parametrize("symmetric", [False, True])
def test_an_echo_that_lies_costs_the_direct_connection_and_nothing_else(play, monkeypatch, symmetric):
    """It says, with a good proof, that everybody is a third machine, at one port or at two."""

    async def scenario(world):
        s = await scene(world)
        third = world.net.add("third")
        right = wire.answer

        def lie(question, key, index, seen):
            return right(question, key, index, tcp_addr(third.ips[0], 4001 + index * symmetric))

        monkeypatch.setattr(wire, "answer", lie)
        began = trio.current_time()
        with pytest.raises(PunchFailed) as caught:
            await s.punchers[0].punch(s.b.peer_id)
        assert caught.value.reason == ("impossible" if symmetric else "failed")
        assert trio.current_time() - began < (1 if symmetric else 5)
        assert s.path() == RELAYED
        monkeypatch.setattr(wire, "answer", right)
        await s.punchers[0].punch(s.b.peer_id)

    play(scenario)


def test_ipv6_is_direct_whatever_the_nats_of_ipv4(play, monkeypatch):
    async def scenario(world):
        s = await scene(world, ipv6=True)
        right = wire.answer

        def symmetric(question, key, index, seen):
            return right(question, key, index, tcp_addr("11.7.0.9", 4001 + index))

        monkeypatch.setattr(wire, "answer", symmetric)
        await s.punchers[0].punch(s.b.peer_id)
        assert endpoint_of(s.a.peers[s.b.peer_id].addr).host == "2a0a:ffff::7:1"

    play(scenario)


@pytest.mark.parametrize("delay_s", [0.2, 0.5])
def test_a_relay_that_delays_costs_time_and_nothing_else(play, delay_s):
    async def scenario(world):
        s = await scene(world)
        for name in "ab":
            world.net.set_latency(world.net.machines[name], world.net.machines["r"], delay_s)
        for host in (s.a, s.b):
            host.disconnect(s.relay.peer_id, "to come back over a slow line")
            host.disconnect(s.b.peer_id if host is s.a else s.a.peer_id, "to come back over a slow line")
        await trio.sleep(5)
        for host in (s.a, s.b):
            await world.connect(host, s.relay)
        await trio.sleep(5)
        await s.carry(through=s.relay)
        began = trio.current_time()
        await s.punchers[0].punch(s.b.peer_id)
        assert s.path()[0] is PathKind.DIRECT
        assert trio.current_time() - began < 12 * delay_s

    play(scenario)


def test_a_relay_that_falls_silent_or_dies_leaves_no_hang(play):
    async def scenario(world):
        s = await scene(world)
        for wreck in (s.carrier.reset, world.net.machines["b"].silence):
            if s.b.peer_id not in s.a.peers:
                await s.carry()
            began = trio.current_time()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(fails, s)
                await trio.sleep(0.09)
                wreck()
            assert trio.current_time() - began < 20

    async def fails(s):
        with pytest.raises(PunchFailed):
            await s.punchers[0].punch(s.b.peer_id)

    play(scenario)


def test_who_is_no_member_is_not_served(play):
    async def scenario(world):
        s = await scene(world, default_access=Access.SUBMIT)
        with pytest.raises(PunchFailed) as caught:
            await s.punchers[0].punch(s.b.peer_id)
        assert caught.value.reason == "lost"

    play(scenario)


def test_a_peer_that_asks_without_end_is_answered_one_at_a_time(play):
    async def scenario(world):
        s = await scene(world)
        streams = [await s.a.open_stream(s.b.peer_id, punch.PROTOCOL) for _ in range(20)]
        for stream in streams:
            await stream.send(punch.encode(punch.Ask()))
        words = [await read(stream) for stream in streams[1:]]
        assert all(isinstance(word, punch.Over) and word.reason == "busy" for word in words)
        await streams[0].send(punch.encode(punch.Offer(bytes(32))))
        assert isinstance(await read(streams[0]), punch.Offer)

    play(scenario)
