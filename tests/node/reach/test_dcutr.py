"""DCUtR between two hosts that are strangers to each other, over a connection that came through a relay."""

from __future__ import annotations

import pytest
import trio
from multiaddr import Multiaddr

from mycel.node.reach.dcutr import Dcutr
from mycel.node.reach.echo import Echo
from mycel.node.reach.locate import Locator
from mycel.protocol import dcutr
from mycel.protocol.address import endpoint_of, tcp_addr
from mycel.protocol.limits_reach import DEFAULT_PUNCH_LIMITS
from mycel.protocol.mesh import Access, PathKind
from mycel.protocol.punch import PunchFailed


async def scene(world, may_dial):
    """(a, b, their upgrades): a called b over the relay."""
    a, b, r = [await world.host(name, default_access=Access.STRANGER) for name in "abr"]
    works = []
    for host in (a, b):
        network = world.networks["b" if host is b else "a"]
        locator = Locator(host, Echo(host, network), DEFAULT_PUNCH_LIMITS)
        works.append(Dcutr(host, network, locator, may_dial, DEFAULT_PUNCH_LIMITS))
        await world.connect(host, r)
    await trio.sleep(1)
    # What a host tells of where it listens is what the unilateral upgrade would dial.
    for host in (a, b):
        host.announce([Multiaddr(f"{r.listen_addrs[0]}/p2p-circuit")])
    listener = await world.networks["b"].listen(Multiaddr("/ip4/0.0.0.0/tcp/9"))
    near = await world.networks["a"].dial(tcp_addr(world.net.machines["b"].ips[0], 9))
    far = await listener.accept()
    listener.close()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.adopt_relayed, a, near, r, b, True)
        nursery.start_soon(world.adopt_relayed, b, far, r, a, False)
    await trio.sleep(1)
    assert a.peers[b.peer_id].path is PathKind.RELAYED
    return a, b, works


def test_the_called_side_leads_and_the_caller_is_the_dialer(play):
    async def scenario(world):
        a, b, (_, lead) = await scene(world, lambda peer, addr: True)
        began = trio.current_time()
        await lead.lead(a.peer_id)
        await trio.sleep(0.2)
        assert trio.current_time() - began < 1.5
        at_a, at_b = a.peers[b.peer_id], b.peers[a.peer_id]
        assert at_a.path is at_b.path is PathKind.DIRECT
        assert (at_a.inbound, at_b.inbound) == (False, True)
        assert endpoint_of(at_a.addr).port != 4001

    play(scenario)


def test_a_caller_with_a_public_address_is_just_dialled(play):
    async def scenario(world):
        a, b, (_, lead) = await scene(world, lambda peer, addr: True)
        a.announce([])
        await trio.sleep(1)
        await lead.lead(a.peer_id)
        assert b.peers[a.peer_id].addr == tcp_addr(world.net.machines["a"].ips[0], 4001)

    play(scenario)


def test_a_strangers_addresses_are_dialled_only_where_they_may(play):
    async def scenario(world):
        a, b, (_, lead) = await scene(world, lambda peer, addr: False)
        before = world.networks["b"].contacted(), world.networks["a"].contacted()
        with pytest.raises(PunchFailed) as caught:
            await lead.lead(a.peer_id)
        assert caught.value.reason == "failed"
        assert (world.networks["b"].contacted(), world.networks["a"].contacted()) == before
        assert b.peers[a.peer_id].path is PathKind.RELAYED

    play(scenario)


def test_one_side_that_dials_is_enough_where_the_other_only_accepts(play):
    async def scenario(world):
        a, b, (_, lead) = await scene(world, lambda peer, addr: True)
        lead._may_dial = lambda peer, addr: False
        await lead.lead(a.peer_id)
        await trio.sleep(0.2)
        assert a.peers[b.peer_id].path is b.peers[a.peer_id].path is PathKind.DIRECT

    play(scenario)


def test_a_stranger_on_the_port_is_turned_away_by_the_handshake(play):
    async def scenario(world):
        a, b, (_, lead) = await scene(world, lambda peer, addr: True)
        evil = await world.host("mallory", default_access=Access.STRANGER)
        bind = lead.network.listen

        async def listen(addr, *, shared=False):
            listener = await bind(addr, shared=shared)
            if ":" not in endpoint_of(listener.addr).host:
                at = tcp_addr(world.net.machines["b"].ips[0], endpoint_of(listener.addr).port)
                world.nursery.start_soon(knock, at)
            return listener

        async def knock(at):
            await evil.adopt(await world.networks["mallory"].dial(at), expected=b.peer_id, dialer=True)
            knocked.set()

        knocked = trio.Event()
        lead.network.listen = listen
        await lead.lead(a.peer_id)
        await knocked.wait()
        await trio.sleep(1)
        assert a.peers[b.peer_id].path is PathKind.DIRECT
        assert evil.peer_id not in b.peers
        assert b.peer_id not in evil.peers

    play(scenario)


def test_a_peer_that_says_nothing_or_nonsense_ends_in_time(play):
    async def silent(stream):
        await trio.sleep_forever()

    async def nonsense(stream):
        await stream.send(b"\x05hello")
        await trio.sleep_forever()

    async def too_much(stream):
        await stream.send(b"\xff\xff\xff\x01")
        await trio.sleep_forever()

    async def out_of_turn(stream):
        await stream.send(dcutr.write(dcutr.Message(dcutr.Kind.SYNC)))
        await trio.sleep_forever()

    async def scenario(world):
        a, _, (_, lead) = await scene(world, lambda peer, addr: True)
        for answer, reason in (
            (silent, "deadline"),
            (nonsense, "protocol"),
            (too_much, "protocol"),
            (out_of_turn, "protocol"),
        ):
            a.stop_serving(dcutr.PROTOCOL)
            a.serve_stream(dcutr.PROTOCOL, answer, access=Access.STRANGER)
            began = trio.current_time()
            with pytest.raises(PunchFailed) as caught:
                await lead.lead(a.peer_id)
            assert caught.value.reason == reason, answer
            assert trio.current_time() - began < DEFAULT_PUNCH_LIMITS.step_s + 2

    play(scenario)
