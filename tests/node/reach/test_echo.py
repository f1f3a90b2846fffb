"""The address echo between hosts: what it says, to whom, and what a server or a network that lies gets."""

from __future__ import annotations

from dataclasses import replace

import pytest
import trio
from multiaddr import Multiaddr

from mycel.node.host import Host
from mycel.node.reach.echo import Echo, EchoFailed
from mycel.node.reach.exchange import receive_exactly, send_all
from mycel.node.tcp import TcpNetwork
from mycel.protocol import echo as wire
from mycel.protocol.address import tcp_addr
from mycel.protocol.keys import OwnKey
from mycel.protocol.limits_reach import DEFAULT_REACH_LIMITS
from mycel.protocol.mesh import Access

LOCAL = Multiaddr("/ip4/0.0.0.0/tcp/5555")


async def make_echo(world, name, **options):
    """A host and its running echo, not serving yet."""
    host = await world.host(name, **options)
    echo = Echo(host, world.networks[name])
    await world.nursery.start(echo.run)
    return host, echo


async def pair(world):
    a, asker = await make_echo(world, "a")
    b, server = await make_echo(world, "b")
    await world.connect(a, b)
    return asker, b, server


def test_an_open_machine_is_seen_as_it_is(play):
    async def scenario(world):
        asker, b, server = await pair(world)
        server.serve()
        mapped = await asker.ask(b.peer_id, LOCAL)
        assert mapped.first == mapped.second == tcp_addr(world.net.machines["a"].ips[0], 5555)
        assert not mapped.is_symmetric
        assert server.answered == 2

    play(scenario)


def test_the_port_can_be_listened_on_meanwhile(play):
    async def scenario(world):
        asker, b, server = await pair(world)
        server.serve()
        listener = await world.networks["a"].listen(LOCAL, shared=True)
        mapped = await asker.ask(b.peer_id, LOCAL)
        assert mapped.first == tcp_addr(world.net.machines["a"].ips[0], 5555)
        listener.close()

    play(scenario)


def test_nothing_is_listened_on_before_the_first_question_and_after_the_end(play):
    async def scenario(world):
        asker, b, server = await pair(world)
        machine = world.net.machines["b"]
        server.serve()
        assert wire.PROTOCOL in b.protocols
        assert len(machine.listeners) == 1
        await asker.ask(b.peer_id, LOCAL)
        assert len(machine.listeners) == 3
        assert len(server.ports) == 2
        server.stop()
        assert len(machine.listeners) == 1
        with pytest.raises(EchoFailed, match="offers no echo"):
            await asker.ask(b.peer_id, LOCAL)

    play(scenario)


def test_held_connections_stay_until_the_end(play):
    async def scenario(world):
        asker, b, server = await pair(world)
        server.serve()
        machine = world.net.machines["a"]
        before = len(machine.pipes)
        async with asker.hold(b.peer_id, LOCAL):
            await trio.sleep(5)
            assert len(machine.pipes) == before + 2
        assert len(machine.pipes) == before

    play(scenario)


def test_a_server_that_never_answers_costs_the_deadline(play):
    async def scenario(world):
        asker, b, _ = await pair(world)

        async def silent(stream):
            await trio.sleep_forever()

        b.serve_stream(wire.PROTOCOL, silent)
        began = trio.current_time()
        with pytest.raises(EchoFailed, match="did not echo within 3 s"):
            await asker.ask(b.peer_id, LOCAL)
        assert trio.current_time() - began == pytest.approx(3.0)

    play(scenario)


def test_a_filtered_echo_port_costs_the_deadline(play):
    async def scenario(world):
        asker, b, server = await pair(world)
        server.serve()
        await asker.ask(b.peer_id, LOCAL)
        world.net.machines["b"].silence()
        with pytest.raises(EchoFailed):
            await asker.ask(b.peer_id, LOCAL)

    play(scenario)


def test_a_peer_that_is_not_connected_is_named(play):
    async def scenario(world):
        _a, asker = await make_echo(world, "a")
        b, _ = await make_echo(world, "b")
        with pytest.raises(EchoFailed, match="not connected directly"):
            await asker.ask(b.peer_id, LOCAL)

    play(scenario)


def test_strangers_are_not_answered(play):
    async def scenario(world):
        a, asker = await make_echo(world, "a")
        b, server = await make_echo(world, "b", default_access=Access.STRANGER)
        await world.connect(a, b)
        server.serve()
        with pytest.raises(EchoFailed, match="offers no echo"):
            await asker.ask(b.peer_id, LOCAL)
        assert len(world.net.machines["b"].listeners) == 1

    play(scenario)


def test_a_question_without_its_key_is_not_answered(play):
    async def scenario(world):
        asker, b, server = await pair(world)
        server.serve()
        await asker.ask(b.peer_id, LOCAL)
        network = world.networks["a"]
        ip = world.net.machines["b"].ips[0]
        for question in (b"x" * wire.QUESTION_BYTES, b"GET / HTTP/1.1\r\n\r\n" + b"x" * 64):
            pipe = await network.dial(tcp_addr(ip, server.ports[0]))
            await send_all(pipe, question)
            with trio.fail_after(5):
                assert pipe.try_recv_into(bytearray(1)) is None
                await pipe.wait_readable()
            assert pipe.try_recv_into(bytearray(1)) == 0
            pipe.close()
        assert server.answered == 2

    play(scenario)


def test_a_copied_question_is_not_answered_a_second_time(play):
    """Whoever reads along must not get the server to sign his own address for the asker's nonce."""

    async def scenario(world):
        asker, b, server = await pair(world)
        server.serve()
        offer = await asker._offer(b.peer_id, 4)
        question = wire.ask(offer.key_id, offer.key, b"n" * 16, 0)
        at = tcp_addr(world.net.machines["b"].ips[0], offer.ports[0])
        first = await world.networks["a"].dial(at)
        await send_all(first, question)
        assert len(await receive_exactly(first, wire.ANSWER_BYTES)) == wire.ANSWER_BYTES
        second = await world.networks["a"].dial(at)
        await send_all(second, question)
        await second.wait_readable()
        assert second.try_recv_into(bytearray(1)) == 0

    play(scenario)


def test_an_answer_that_was_changed_on_the_way_is_refused(play):
    async def scenario(world):
        asker, b, server = await pair(world)

        async def changed(pipe, index):
            question = await receive_exactly(pipe, wire.QUESTION_BYTES)
            key = server._keys[wire.key_id_of(question)]
            said = bytearray(wire.answer(question, key.key, index, tcp_addr("11.99.99.99", 1)))
            said[15] ^= 1
            await send_all(pipe, said)

        server._answer_question = changed
        server.serve()
        with pytest.raises(EchoFailed, match="its server did not give"):
            await asker.ask(b.peer_id, LOCAL)

    play(scenario)


def test_one_asker_gets_so_many_keys_and_others_go_on(play):
    async def scenario(world):
        a, asker = await make_echo(world, "a")
        c, other = await make_echo(world, "c")
        b, server = await make_echo(world, "b")
        for one in (a, c):
            await world.connect(one, b)
        server.serve()
        for _ in range(DEFAULT_REACH_LIMITS.echo_keys_per_peer):
            assert (await asker._offer(b.peer_id, 4)).ports
        with pytest.raises(EchoFailed, match="as many keys as it may"):
            await asker.ask(b.peer_id, LOCAL)
        await other.ask(b.peer_id, LOCAL)
        await trio.sleep(DEFAULT_REACH_LIMITS.echo_key_s)
        await asker.ask(b.peer_id, LOCAL)

    play(scenario)


def test_a_flood_of_connections_is_bounded(play):
    async def scenario(world):
        a, asker = await make_echo(world, "a")
        b = await world.host("b")
        server = Echo(b, world.networks["b"], replace(DEFAULT_REACH_LIMITS, echo_sockets=4))
        await world.nursery.start(server.run)
        await world.connect(a, b)
        server.serve()
        await asker.ask(b.peer_id, LOCAL)
        await trio.sleep(1)
        at = tcp_addr(world.net.machines["b"].ips[0], server.ports[0])
        before = len(world.net.machines["b"].pipes)
        for _ in range(20):
            await world.networks["a"].dial(at)
        await trio.sleep(1)
        assert len(world.net.machines["b"].pipes) == before + 4
        await trio.sleep(DEFAULT_REACH_LIMITS.echo_s + DEFAULT_REACH_LIMITS.echo_hold_s)
        assert len(world.net.machines["b"].pipes) == before
        await asker.ask(b.peer_id, LOCAL)

    play(scenario)


async def test_over_real_sockets_it_is_the_same():
    network = TcpNetwork()
    hosts = [
        Host(network, OwnKey(bytes([n]) * 32), listen=["/ip4/127.0.0.1/tcp/0"], default_access=Access.MEMBER)
        for n in (1, 2)
    ]
    asker, server = (Echo(host, network) for host in hosts)
    async with trio.open_nursery() as nursery:
        for host in hosts:
            await nursery.start(host.run)
        for echo in (asker, server):
            await nursery.start(echo.run)
        server.serve()
        peer = await hosts[0].connect(hosts[1].listen_addrs)
        listener = await network.listen(tcp_addr("127.0.0.1", 0), shared=True)
        mapped = await asker.ask(peer, listener.addr)
        assert mapped.first == mapped.second == listener.addr
        listener.close()
        nursery.cancel_scope.cancel()


def test_a_server_asked_before_answers_a_round_trip_sooner(play):
    async def scenario(world):
        asker, b, server = await pair(world)
        server.serve()
        took = []
        for port in (5555, 5556):
            began = trio.current_time()
            mapped = await asker.ask(b.peer_id, Multiaddr(f"/ip4/0.0.0.0/tcp/{port}"))
            assert mapped.first == tcp_addr(world.net.machines["a"].ips[0], port)
            took.append(trio.current_time() - began)
        assert took == pytest.approx([0.24, 0.16], abs=0.01)  # of 80 ms each

    play(scenario)


def test_a_server_that_opened_other_ports_since_is_asked_there(play):
    async def scenario(world):
        asker, b, server = await pair(world)
        server.serve()
        await asker.ask(b.peer_id, LOCAL)
        before = server.ports
        server.stop()
        await trio.sleep(5)
        server.serve()
        mapped = await asker.ask(b.peer_id, LOCAL)
        assert mapped.first == mapped.second == tcp_addr(world.net.machines["a"].ips[0], 5555)
        assert server.ports != before

    play(scenario)
