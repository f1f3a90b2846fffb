"""Relays that are not what they should be, and requests that no relay should grant, in virtual time."""

from __future__ import annotations

import hashlib

import pytest
import trio
from multiaddr import Multiaddr

from mycel.node.reach.relay_server import RelayServer
from mycel.protocol import relay as wire
from mycel.protocol.delimited import receive_prefixed
from mycel.protocol.errors import DialError, Refused, StreamReset
from mycel.protocol.keys import OwnKey
from mycel.protocol.mesh import Access
from mycel.protocol.relay import HOP, STOP, Kind, Message, Status

STRANGER = Access.STRANGER


def through(client, hidden):
    """Where `hidden` is reached."""
    return [f"{addr}/p2p/{hidden.peer_id}" for addr in client.addrs]


async def false_relay(world, answer):
    """A host that answers HOP in its own way."""
    host = await world.host("relay")
    host.serve_stream(HOP, answer, access=STRANGER)
    return host


def addr_at(host, peer):
    return Multiaddr(f"{host.listen_addrs[0]}/p2p-circuit/p2p/{peer}")


def status(code, **fields):
    return wire.write_hop(Message(Kind.STATUS, status=code, **fields))


async def say_nothing(stream):
    await trio.sleep_forever()


async def say_nonsense(stream):
    await stream.send(b"\x05hello")
    await trio.sleep_forever()


async def say_much(stream):
    await stream.send(b"\xff\xff\x7f")
    await trio.sleep_forever()


async def drop(stream):
    await receive_prefixed(stream, 4096)
    await stream.send(status(Status.OK))
    async for _ in iter_some(stream):
        pass


async def flood(stream):
    await receive_prefixed(stream, 4096)
    await stream.send(status(Status.OK))
    while True:
        await stream.send(bytes(65536))


async def reset(stream):
    stream.reset()


async def ask_back(stream):
    await stream.send(wire.write_hop(Message(Kind.RESERVE)))
    await trio.sleep_forever()


async def iter_some(stream):
    while data := await stream.receive_some():
        yield data


@pytest.mark.parametrize("answer", [say_nothing, say_nonsense, say_much, drop, flood, reset, ask_back])
def test_a_bad_relay_is_a_clear_error_within_the_deadline(play_relays, answer):
    async def scenario(world):
        relay = await false_relay(world, answer)
        caller, _ = await world.client("caller")
        stranger = await world.host("stranger")
        began = trio.current_time()
        with pytest.raises(DialError, match="12D3Koo"):
            await caller.connect([addr_at(relay, stranger.peer_id)])
        assert trio.current_time() - began < 11
        assert relay.peer_id in caller.peers

    play_relays(scenario)


@pytest.mark.parametrize("answer", [say_nothing, say_nonsense, drop, flood, reset])
def test_behind_a_bad_relay_the_next_address_is_taken(play_relays, answer):
    async def scenario(world):
        _, _, hidden, client, caller = await world.trio(name="good")
        bad = await false_relay(world, answer)
        began = trio.current_time()
        assert await caller.connect([addr_at(bad, hidden.peer_id), *through(client, hidden)])
        assert trio.current_time() - began < 2

    play_relays(scenario)


def test_a_relay_that_connects_with_somebody_else_is_found_out(play_relays):
    async def scenario(world):
        relay, _, hidden, _client, caller = await world.trio()
        other, other_client = await world.client("other", relay, want=1)
        await world.until(lambda: other_client.addrs)

        async def wrong(stream):
            await receive_prefixed(stream, 4096)
            onward = await bad.open_stream(relay.peer_id, HOP)
            await onward.send(wire.write_hop(Message(Kind.CONNECT, other.peer_id)))
            await receive_prefixed(onward, 4096)
            await stream.send(status(Status.OK))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(copy, stream, onward)
                nursery.start_soon(copy, onward, stream)

        async def copy(one, two):
            while data := await one.receive_some():
                await two.send(data)

        bad = await world.host("bad")
        bad.serve_stream(HOP, wrong, access=STRANGER)
        await world.connect(bad, relay)
        with pytest.raises(Refused, match="expected peer"):
            await caller.connect([addr_at(bad, hidden.peer_id)])

    play_relays(scenario)


def test_a_relay_may_not_bring_circuits_that_were_not_reserved(play_relays):
    async def scenario(world):
        hidden, _ = await world.client("hidden")
        pusher = await world.host("pusher")
        await world.connect(pusher, hidden)
        stream = await pusher.open_stream(hidden.peer_id, STOP)
        await stream.send(wire.write_stop(Message(Kind.CONNECT, pusher.peer_id)))
        answer = wire.read_stop(await receive_prefixed(stream, 4096))
        assert answer.status == Status.PERMISSION_DENIED

    play_relays(scenario)


async def _ask_hop(host, peer, raw):
    stream = await host.open_stream(peer, HOP)
    await stream.send(raw)
    answer = wire.read_hop(await receive_prefixed(stream, 4096))
    await stream.aclose()
    return answer.status


def test_requests_that_cannot_be_are_answered_with_their_status(play_relays):
    async def scenario(world):
        relay, server, _hidden, _client, caller = await world.trio()
        await world.connect(caller, relay)
        ask = lambda raw: _ask_hop(caller, relay.peer_id, raw)  # noqa: E731
        assert await ask(b"\x02hi") == Status.MALFORMED_MESSAGE
        assert await ask(b"\x80\x80\x01") == Status.MALFORMED_MESSAGE
        assert await ask(wire.write_hop(Message(Kind.CONNECT))) == Status.MALFORMED_MESSAGE
        assert await ask(status(Status.OK)) == Status.UNEXPECTED_MESSAGE
        connect = lambda peer: wire.write_hop(Message(Kind.CONNECT, peer))  # noqa: E731
        assert await ask(connect(caller.peer_id)) == Status.PERMISSION_DENIED
        assert await ask(connect(relay.peer_id)) == Status.PERMISSION_DENIED
        assert await ask(connect(client_id("nobody"))) == Status.NO_RESERVATION
        assert server.circuits == 0

    play_relays(scenario)


def client_id(name):
    return OwnKey(hashlib.sha256(name.encode()).digest()).peer_id


def test_a_request_that_says_nothing_ends_with_the_deadline(play_relays):
    async def scenario(world):
        relay, server = await world.relay()
        caller, _ = await world.client("caller", relay)
        stream = await caller.open_stream(relay.peer_id, HOP)
        await stream.send(b"")
        with trio.fail_after(11), pytest.raises(StreamReset):
            await stream.receive_some()
        assert server.counters["TOO_SLOW"] == 1

    play_relays(scenario)


def test_one_peer_that_asks_without_end_keeps_nobody_else_waiting(play_relays):
    async def scenario(world):
        relay, server, hidden, client, caller = await world.trio()
        pest, _ = await world.client("pest", relay)
        for _ in range(400):
            stream = await pest.open_stream(relay.peer_id, HOP)
            await stream.send(b"\x05")
        assert await caller.connect(through(client, hidden)) == hidden.peer_id
        assert server.counters["BUSY"] > 300

    play_relays(scenario)


def test_a_target_that_does_not_answer_is_a_failed_connection(play_relays):
    async def scenario(world):
        relay, server = await world.relay()
        hidden = await world.host("hidden", listen=[])
        hidden.serve_stream(STOP, say_nothing, access=STRANGER)
        await world.connect(hidden, relay)
        assert await _ask_hop(hidden, relay.peer_id, wire.write_hop(Message(Kind.RESERVE))) == Status.OK
        caller, _ = await world.client("caller", relay)
        asked = wire.write_hop(Message(Kind.CONNECT, hidden.peer_id))
        with trio.fail_after(6):
            assert await _ask_hop(caller, relay.peer_id, asked) == Status.CONNECTION_FAILED
        assert server.circuits == 0

    play_relays(scenario)


def test_circuits_are_not_chained(play_relays):
    async def scenario(world):
        relay, _, hidden, client, caller = await world.trio()
        await caller.connect(through(client, hidden))
        nested = RelayServer(hidden)
        await world.nursery.start(nested.run)
        nested.serve(True)
        assert await _ask_hop(caller, hidden.peer_id, wire.write_hop(Message(Kind.RESERVE))) == (
            Status.PERMISSION_DENIED
        )
        with pytest.raises(DialError, match="leads to nobody else"):
            await caller.connect([f"{relay.listen_addrs[0]}/p2p-circuit/p2p/{caller.peer_id}"])
        with pytest.raises(DialError, match="not chained"):
            await caller.connect(
                [f"/ip4/11.0.0.9/tcp/1/p2p/{hidden.peer_id}/p2p-circuit/p2p/{client_id('nobody')}"]
            )

    play_relays(scenario)


def test_a_cancelled_dial_leaves_nothing_behind(play_relays):
    async def scenario(world):
        relay, server = await world.relay()
        hidden = await world.host("hidden", listen=[])
        hidden.serve_stream(STOP, say_nothing, access=STRANGER)
        await world.connect(hidden, relay)
        await _ask_hop(hidden, relay.peer_id, wire.write_hop(Message(Kind.RESERVE)))
        caller, _ = await world.client("caller", relay)
        with trio.move_on_after(1) as scope:
            await caller.connect([addr_at(relay, hidden.peer_id)])
        assert scope.cancelled_caught
        await trio.sleep(6)
        assert server.circuits == 0
        assert (relay.streams, caller.streams, hidden.streams) == (0, 0, 0)

    play_relays(scenario)
