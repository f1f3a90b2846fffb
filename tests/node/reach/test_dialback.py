"""Dial-backs between hosts: who is knocked at, by whom, and what bounds it."""

from __future__ import annotations

import pytest
import trio
from multiaddr import Multiaddr

from mycel.node.reach.dialback import DialBack
from mycel.protocol import dialback as wire
from mycel.protocol.address import tcp_addr
from mycel.protocol.errors import RemoteProtocolError
from mycel.protocol.limits_reach import DEFAULT_REACH_LIMITS


async def make(world, name, **options):
    """A host that does dial-backs."""
    host = await world.host(name, **options)
    dialback = DialBack(host, world.networks[name])
    dialback.serve()
    return host, dialback


async def chain(world):
    """`a` and `c` connected with `b`, and not with each other."""
    made = [await make(world, name) for name in "abc"]
    hosts = [host for host, _ in made]
    await world.connect(hosts[0], hosts[1])
    await world.connect(hosts[2], hosts[1])
    return hosts, [dialback for _, dialback in made]


def at(world, name, port=4001):
    return tcp_addr(world.net.machines[name].ips[0], port)


def test_a_knock_says_which_address_answered(play):
    async def scenario(world):
        hosts, (asker, _, _) = await chain(world)
        outcome = await asker.knock(hosts[1].peer_id, [at(world, "a", 9), at(world, "a")])
        assert outcome == wire.Outcome(str(at(world, "a")), tried=True)

    play(scenario)


def test_a_knock_in_vain_says_why(play):
    async def scenario(world):
        hosts, (asker, _, _) = await chain(world)
        outcome = await asker.knock(hosts[1].peer_id, [at(world, "a", 9)])
        assert outcome.tried
        assert not outcome.addr
        assert "refused" in outcome.why

    play(scenario)


def test_a_witness_calls_and_is_seen_with_own_eyes(play):
    async def scenario(world):
        hosts, (asker, _, _) = await chain(world)
        a, b, c = hosts
        outcome = await asker.call_by(b.peer_id, c.peer_id, [at(world, "a")])
        assert outcome.tried
        assert outcome.addr.startswith(str(at(world, "a")))
        await world.up(a, c.peer_id)
        assert a.peers[c.peer_id].inbound
        assert not world.networks["a"].has_contacted(world.net.machines["c"].ips[0])

    play(scenario)


def test_nobody_is_made_to_knock_elsewhere(play):
    """A member that names somebody else's address gets nothing sent there."""

    async def scenario(world):
        hosts, (asker, _, _) = await chain(world)
        world.net.add("victim")
        for addrs in ([at(world, "victim", 80)], [Multiaddr("/dns4/victim/tcp/80")], [at(world, "c")]):
            for outcome in (
                await asker.knock(hosts[1].peer_id, addrs),
                await asker.call_by(hosts[1].peer_id, hosts[2].peer_id, addrs),
            ):
                assert not outcome.tried
                await trio.sleep(DEFAULT_REACH_LIMITS.dialback_every_s)
        assert not world.networks["b"].has_contacted(world.net.machines["victim"].ips[0])
        assert not world.networks["c"].has_contacted(world.net.machines["victim"].ips[0])

    play(scenario)


def test_a_witness_that_is_connected_already_does_not_call_again(play):
    async def scenario(world):
        hosts, (asker, _, _) = await chain(world)
        await world.connect(hosts[0], hosts[2])
        outcome = await asker.call_by(hosts[1].peer_id, hosts[2].peer_id, [at(world, "a")])
        assert outcome == wire.Outcome(why="connected already")

    play(scenario)


def test_an_unknown_witness_is_named_as_such_and_so_is_the_asker_itself(play):
    async def scenario(world):
        hosts, (asker, _, _) = await chain(world)
        stranger = await world.host("stranger")
        for witness in (stranger.peer_id, hosts[0].peer_id):
            outcome = await asker.call_by(hosts[1].peer_id, witness, [at(world, "a")])
            assert not outcome.tried
            assert "not connected with that witness" in outcome.why
            await trio.sleep(DEFAULT_REACH_LIMITS.dialback_every_s)

    play(scenario)


def test_who_asks_too_often_is_told_so(play):
    async def scenario(world):
        hosts, (asker, _, _) = await chain(world)
        assert (await asker.knock(hosts[1].peer_id, [at(world, "a")])).addr
        outcome = await asker.knock(hosts[1].peer_id, [at(world, "a")])
        assert not outcome.tried
        assert "asked too often" in outcome.why

    play(scenario)


def test_a_member_that_never_answers_costs_the_deadline(play):
    async def scenario(world):
        a, asker = await make(world, "a")
        b = await world.host("b")
        await world.connect(a, b)

        async def silent(stream):
            await trio.sleep_forever()

        b.serve_stream(wire.PROTOCOL, silent)
        began = trio.current_time()
        outcome = await asker.knock(b.peer_id, [at(world, "a")])
        assert not outcome.tried
        assert trio.current_time() - began == pytest.approx(DEFAULT_REACH_LIMITS.dialback_s)

    play(scenario)


def test_a_member_that_answers_nonsense_is_no_evidence(play):
    async def scenario(world):
        a, asker = await make(world, "a")
        b = await world.host("b")
        await world.connect(a, b)

        async def babble(stream):
            await stream.send(b"\x05hello", end=True)

        b.serve_stream(wire.PROTOCOL, babble)
        outcome = await asker.knock(b.peer_id, [at(world, "a")])
        assert not outcome.tried
        assert "not the outcome" in outcome.why

    play(scenario)


def test_nonsense_asked_ends_its_own_stream_only(play):
    async def scenario(world):
        hosts, _ = await chain(world)
        stream = await hosts[0].open_stream(hosts[1].peer_id, wire.PROTOCOL)
        await stream.send(b"\x03abc", end=True)
        with pytest.raises(Exception, match="reset"):
            await stream.receive_some()
        assert hosts[1].peer_id in hosts[0].peers

    play(scenario)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\xc0",
        wire.write(wire.Outcome("x"))[:-1],
        wire.write(wire.Knock(("a",) * (wire.ADDRS_MAX + 1))),
        wire.write(wire.Knock(())),
        wire.write(wire.Knock(("a" * (wire.TEXT_MAX + 1),))),
    ],
)
def test_what_is_no_request_is_refused(raw):
    with pytest.raises(RemoteProtocolError):
        wire.read_request(raw)


@pytest.mark.parametrize(
    "request_",
    [wire.Knock(("/ip4/11.0.0.1/tcp/1",)), wire.CallBy("w", ("a", "b")), wire.Call("p", ("a",))],
)
def test_requests_come_back_as_they_were(request_):
    assert wire.read_request(wire.write(request_)) == request_
