"""Circuit relay between hosts in virtual time: who is reached, what is allowed, and what ends it."""

from __future__ import annotations

import hashlib

import pytest
import trio

from mycel.protocol.errors import ConnectionLost, DialError, StreamReset
from mycel.protocol.limits import KIB, MIB
from mycel.protocol.limits_reach import RelayLimits
from mycel.protocol.mesh import Access, PathKind, PeerDown
from mycel.protocol.method import Method
from mycel.protocol.rpc import Rpc
from mycel.protocol.tensor import Tensor

STRANGER = Access.STRANGER


def through(client, hidden):
    """Where `hidden` is reached."""
    return [f"{addr}/p2p/{hidden.peer_id}" for addr in client.addrs]


def test_a_peer_that_listens_nowhere_is_reached_through_a_relay(play_relays):
    async def scenario(world):
        relay, server, hidden, client, caller = await world.trio()
        (addr,) = through(client, hidden)
        ip = world.net.machines["relay"].ips[0]
        assert str(addr) == f"/ip4/{ip}/tcp/4001/p2p/{relay.peer_id}/p2p-circuit/p2p/{hidden.peer_id}"
        assert await caller.connect([addr]) == hidden.peer_id
        await world.up(hidden, caller.peer_id)
        assert caller.peers[hidden.peer_id].path is PathKind.RELAYED
        assert hidden.peers[caller.peer_id].path is PathKind.RELAYED
        assert hidden.peers[caller.peer_id].inbound
        data = hashlib.sha256(b"x").digest() * 100_000
        assert await world.talk(caller, hidden.peer_id, data) == data
        assert await caller.ping(hidden.peer_id) == pytest.approx(0.16, abs=0.01)
        assert server.reservations == 1
        assert server.circuits == 1
        assert server.forwarded > 6_400_000

    play_relays(scenario)


def test_calls_with_tensors_run_over_a_relay_both_ways(play_relays):
    async def scenario(world):
        _, server, hidden, client, caller = await world.trio()
        rpcs = [Rpc(host) for host in (hidden, caller)]
        double = Method("test.double", Tensor, Tensor)

        def answer(call, request):
            return Tensor(request.dtype, (2, *request.shape), bytes(request.data) * 2)

        for rpc in rpcs:
            await world.nursery.start(rpc.run)
            rpc.serve(double, answer, inline=True)
        await caller.connect(through(client, hidden))
        await world.up(hidden, caller.peer_id)
        for size in (8, 1000, 1_000_000):
            rows = Tensor("float32", (size,), bytes(range(256)) * (size // 64))
            rows = Tensor("float32", (len(rows.data) // 4,), rows.data)
            for rpc, peer in zip(rpcs, (caller.peer_id, hidden.peer_id), strict=True):
                got = await rpc.call(peer, double, rows, deadline_s=20)
                assert bytes(got.data) == bytes(rows.data) * 2
        assert server.forwarded > 6 * 4_000_000

    play_relays(scenario)


def test_closing_a_relayed_connection_ends_its_circuit_and_tells_the_reason(play_relays):
    async def scenario(world):
        _, server, hidden, client, caller = await world.trio()
        await caller.connect(through(client, hidden))
        await world.up(hidden, caller.peer_id)
        async with hidden.events() as events:
            caller.disconnect(hidden.peer_id, "enough")
            async for event in events:
                assert isinstance(event, PeerDown)
                assert "enough" in event.text
                break
        await world.until(lambda: not server.circuits)

    play_relays(scenario)


def test_a_reservation_ends_with_the_connection_of_its_peer(play_relays):
    async def scenario(world):
        _relay, server, hidden, client, caller = await world.trio()
        addrs = through(client, hidden)
        began = trio.current_time()
        world.net.machines["hidden"].crash()
        await world.until(lambda: not server.reservations)
        assert trio.current_time() - began < 0.5
        with pytest.raises(DialError, match="NO_RESERVATION"):
            await caller.connect(addrs)

    play_relays(scenario)


def test_two_relays_are_kept_and_a_dead_one_is_replaced_at_once(play_relays):
    async def scenario(world):
        relays = {}
        for name in ("r1", "r2", "r3"):
            host, server = await world.relay(name)
            relays[host.peer_id] = (name, host, server)
        _hidden, client = await world.client("hidden", *(one[1] for one in relays.values()), want=2)
        await world.until(lambda: len(client.relays) == 2)
        dead, stays = client.relays
        spare = next(peer for peer in relays if peer not in (dead, stays))
        began = trio.current_time()
        world.net.machines[relays[dead][0]].crash()
        await world.until(lambda: set(client.relays) == {stays, spare})
        assert trio.current_time() - began < 0.5
        assert len(client.addrs) == 2
        assert sum(server.reservations for _, _, server in relays.values()) == 2

    play_relays(scenario)


def test_a_relay_that_falls_silent_is_replaced_when_that_is_noticed(play_relays):
    async def scenario(world):
        one, _ = await world.relay("r1")
        two, _ = await world.relay("r2")
        _hidden, client = await world.client("hidden", one, two, want=1)
        await world.until(lambda: client.relays)
        first = client.relays[0]
        world.net.machines["r1" if first == one.peer_id else "r2"].silence()
        await world.until(lambda: client.relays and client.relays[0] != first, 5.0)

    play_relays(scenario)


def test_reservations_are_renewed_before_they_end(play_relays):
    async def scenario(world):
        _, server, hidden, client, caller = await world.trio(limits=RelayLimits(reservation_s=60))
        for _ in range(30):
            await trio.sleep(10)
            assert server.reservations == 1
            assert len(client.addrs) == 1
        await caller.connect(through(client, hidden))

    play_relays(scenario)


def test_a_relay_that_serves_no_more_is_left_when_the_reservation_ends(play_relays):
    async def scenario(world):
        one, first = await world.relay("r1", RelayLimits(reservation_s=60))
        hidden, client = await world.client("hidden", one, want=1)
        await world.until(lambda: client.relays)
        first.serve(False)
        two, _ = await world.relay("r2")
        await world.connect(hidden, two)
        await world.until(lambda: client.relays == [two.peer_id], 90)

    play_relays(scenario)


def test_no_reservations_are_kept_where_none_are_wanted(play_relays):
    async def scenario(world):
        _, _, _, client, _ = await world.trio()
        client.want(0)
        assert list(client.addrs) == []
        await trio.sleep(100)
        assert list(client.addrs) == []

    play_relays(scenario)


def test_a_configured_relay_is_used_where_no_member_relays(play_relays):
    async def scenario(world):
        foreign, _ = await world.relay()
        addr = str(foreign.listen_addrs[0])
        _hidden, client = await world.client("hidden", want=2, configured=[addr], default_access=STRANGER)
        await world.until(lambda: client.relays == [foreign.peer_id])

    play_relays(scenario)


def test_strangers_that_relay_are_not_asked_unless_configured(play_relays):
    async def scenario(world):
        foreign, server = await world.relay()
        _, client = await world.client("hidden", foreign, want=2, default_access=STRANGER)
        await trio.sleep(30)
        assert not client.relays
        assert not server.reservations

    play_relays(scenario)


@pytest.mark.parametrize(
    ("limits", "status"),
    [
        (RelayLimits(reservations=0), "RESERVATION_REFUSED"),
        (RelayLimits(circuits=0), "RESOURCE_LIMIT_EXCEEDED"),
    ],
)
def test_a_relay_over_its_limits_says_so(play_relays, limits, status):
    async def scenario(world):
        relay, server = await world.relay(limits=limits)
        hidden, client = await world.client("hidden", relay, want=1)
        await trio.sleep(5)
        if not limits.reservations:
            assert status in client.troubles[relay.peer_id]
        else:
            caller, _ = await world.client("caller")
            with pytest.raises(DialError, match=status):
                await caller.connect(through(client, hidden))
        assert server.counters[status] >= 1

    play_relays(scenario)


def test_one_peer_gets_so_many_circuits_and_no_more(play_relays):
    async def scenario(world):
        relay, server = await world.relay(limits=RelayLimits(circuits_per_peer=2))
        addrs = []
        for name in ("h1", "h2", "h3"):
            hidden, client = await world.client(name, relay, want=1)
            await world.until(lambda client=client: client.addrs)
            addrs.append(through(client, hidden))
        caller, _ = await world.client("caller")
        first = await caller.connect(addrs[0])
        await caller.connect(addrs[1])
        with pytest.raises(DialError, match="its limits are reached"):
            await caller.connect(addrs[2])
        caller.disconnect(first, "make room")
        await world.until(lambda: server.circuits == 1)
        await caller.connect(addrs[2])

    play_relays(scenario)


def test_a_circuit_over_its_bytes_is_cut_and_both_ends_know_what_was_allowed(play_relays):
    async def scenario(world):
        _, server, hidden, client, caller = await world.trio(limits=RelayLimits(circuit_bytes=MIB))
        await caller.connect(through(client, hidden))
        await world.up(hidden, caller.peer_id)
        async with caller.events() as at_caller, hidden.events() as at_hidden:
            with pytest.raises((ConnectionLost, StreamReset)):
                await world.say(caller, hidden.peer_id, bytes(2 * MIB))
            for events in (at_caller, at_hidden):
                async for event in events:
                    assert isinstance(event, PeerDown)
                    assert f"the relay allows it {MIB} bytes" in event.text
                    break
        assert not server.circuits
        assert await caller.connect(through(client, hidden)) == hidden.peer_id

    play_relays(scenario)


def test_a_circuit_over_its_time_is_cut(play_relays):
    async def scenario(world):
        _, _server, hidden, client, caller = await world.trio(limits=RelayLimits(circuit_s=30))
        await caller.connect(through(client, hidden))
        began = trio.current_time()
        await world.until(lambda: hidden.peer_id not in caller.peers, 40)
        assert trio.current_time() - began == pytest.approx(30, abs=0.5)

    play_relays(scenario)


def test_strangers_get_bounds_that_members_do_not(play_relays):
    async def scenario(world):
        limits = RelayLimits(stranger_circuit_bytes=MIB)
        _relay, _, hidden, client, caller = await world.trio(limits=limits, default_access=STRANGER)
        await caller.connect(through(client, hidden))
        with pytest.raises((ConnectionLost, StreamReset)):
            await world.say(caller, hidden.peer_id, bytes(2 * MIB))

    play_relays(scenario)


@pytest.mark.parametrize("limits", [RelayLimits(bytes_per_s=MIB), RelayLimits(bytes_per_s_per_peer=MIB)])
def test_a_rate_is_held_and_nothing_is_lost(play_relays, limits):
    async def scenario(world):
        _, _server, hidden, client, caller = await world.trio(limits=limits)
        await caller.connect(through(client, hidden))
        data = hashlib.sha256(b"y").digest() * (5 * MIB // 32)
        began = trio.current_time()
        assert await world.talk(caller, hidden.peer_id, data) == data
        took = trio.current_time() - began
        assert took == pytest.approx(10, rel=0.1)  # five MiB there and five back

    play_relays(scenario)


def test_circuits_share_a_rate_fairly(play_relays):
    async def scenario(world):
        relay, _ = await world.relay(limits=RelayLimits(bytes_per_s=MIB))
        took = {}

        async def one(name):
            hidden, client = await world.client(f"hidden-{name}", relay, want=1)
            hidden.serve_stream("/echo", world.echo, access=STRANGER)
            await world.until(lambda: client.addrs)
            caller, _ = await world.client(f"caller-{name}")
            await caller.connect(through(client, hidden))
            await trio.sleep_until(20)
            await world.talk(caller, hidden.peer_id, bytes(MIB))
            took[name] = trio.current_time() - 20

        async with trio.open_nursery() as nursery:
            for name in range(4):
                nursery.start_soon(one, name)
        assert max(took.values()) == pytest.approx(8, rel=0.15)
        assert min(took.values()) > 5

    play_relays(scenario)


def test_a_reader_who_pauses_stops_the_writer_through_the_relay(play_relays):
    async def scenario(world):
        _relay, server, hidden, client, caller = await world.trio()
        arrived = []

        async def slow(stream):
            arrived.append(stream)
            await trio.sleep_forever()

        hidden.serve_stream("/slow", slow, access=STRANGER)
        await caller.connect(through(client, hidden))
        stream = await caller.open_stream(hidden.peer_id, "/slow")
        with trio.move_on_after(5) as scope:
            await stream.send(bytes(64 * MIB))
        assert scope.cancelled_caught
        assert server.forwarded < 2 * MIB
        assert await caller.ping(hidden.peer_id) < 1  # the connection itself is not stuck

    play_relays(scenario)


def test_a_rate_far_below_what_is_sent_does_not_look_like_silence(play_relays):
    async def scenario(world):
        _, _, hidden, client, caller = await world.trio(limits=RelayLimits(bytes_per_s=32 * KIB))
        done = []

        async def sink(stream):
            while data := await stream.receive_some():
                done.append(len(data))
            await stream.send(b"!")

        hidden.serve_stream("/sink", sink, access=STRANGER)
        await caller.connect(through(client, hidden))
        stream = await caller.open_stream(hidden.peer_id, "/sink")
        await stream.send(bytes(2 * MIB), end=True)
        assert await stream.receive_exactly(1) == b"!"
        assert sum(done) == 2 * MIB

    play_relays(scenario)
