"""The light mesh: distances, cuts, deaths, and thousands of nodes."""

from __future__ import annotations

import pytest
import trio

from mycel.protocol.errors import ConnectionLost, DialError, LimitExceeded
from mycel.protocol.limits import DEFAULT_LIMITS
from mycel.protocol.mesh import PeerDown
from mycel.simnet import clock
from mycel.simnet.mesh import MeshOptions, mesh_world

ECHO = "/test/echo/1"


async def echo(stream):
    while data := await stream.receive_some():
        await stream.send(data)


def play(scenario, **options):
    """Run `scenario(world)` in virtual time; returns what it returns."""

    async def main():
        async with mesh_world(MeshOptions(**options)) as world:
            with trio.fail_after(600):
                return await scenario(world)

    return clock.run(main, options.get("seed", 0))


async def pair(world):
    a, b = world.add("a"), world.add("b")
    b.serve_stream(ECHO, echo)
    await a.connect(b.listen_addrs)
    return a, b, await a.open_stream(b.peer_id, ECHO)


def test_a_round_trip_takes_twice_the_latency_of_the_pair():
    async def scenario(world):
        a, b, stream = await pair(world)
        world.set_latency(a, b, 0.125)
        began = trio.current_time()
        await stream.send(b"x")
        await stream.receive_exactly(1)
        assert trio.current_time() - began == pytest.approx(0.25)
        assert a.rtt(b.peer_id) == 0.25

    play(scenario)


def test_bandwidth_and_window_bound_a_transfer():
    async def scenario(world):
        a, b, _ = await pair(world)
        world.set_latency(a, b, 0.05)
        took = trio.Event()

        async def sink(stream):
            while await stream.receive_some():
                pass
            took.set()

        b.serve_stream("/test/sink/1", sink)
        stream = await a.open_stream(b.peer_id, "/test/sink/1")
        began = trio.current_time()
        await stream.send(bytes(4_000_000))
        await stream.send_eof()
        await took.wait()
        return trio.current_time() - began

    assert play(scenario, bytes_per_s=1e6) == pytest.approx(4.05, rel=0.05)
    assert play(scenario, window_bytes=100_000) == pytest.approx(40 * 0.1, rel=0.05)


def test_a_cut_holds_bytes_back_and_heals():
    async def scenario(world):
        a, b, stream = await pair(world)
        async with a.events() as news:
            world.cut([a], [b])
            await stream.send(b"held")
            with trio.move_on_after(2.0) as scope:
                await stream.receive_some()
            assert scope.cancelled_caught
            world.heal()
            assert await stream.receive_exactly(4) == b"held"
            await trio.sleep(10)
            assert a.peers
            with trio.move_on_after(0) as scope:
                await anext(news)
            assert scope.cancelled_caught

    play(scenario)


def test_a_cut_that_lasts_ends_the_connection_at_both_sides():
    async def scenario(world):
        a, b, stream = await pair(world)
        c = world.add("c")
        await c.connect(b.listen_addrs)
        world.cut([a], [b, c])
        began = trio.current_time()
        with pytest.raises(ConnectionLost) as caught:
            await stream.receive_some()
        assert caught.value.reason == "silent"
        assert trio.current_time() - began == pytest.approx(2.5)
        await trio.sleep(0.1)
        assert not a.peers
        assert list(b.peers) == [c.peer_id]
        with pytest.raises(DialError, match="no answer within"):
            await a.connect(b.listen_addrs)
        world.heal()
        await a.connect(b.listen_addrs)

    play(scenario)


def test_a_killed_nodes_handlers_stop_and_its_peers_hear_a_reset():
    async def scenario(world):
        a, b = world.add("a"), world.add("b")
        ended = []

        async def forever(stream):
            try:
                await trio.sleep_forever()
            finally:
                ended.append(stream.peer)

        b.serve_stream("/test/forever/1", forever)
        await a.connect(b.listen_addrs)
        stream = await a.open_stream(b.peer_id, "/test/forever/1")
        await trio.sleep(1)
        async with a.events() as news:
            world.kill(b)
            with pytest.raises(ConnectionLost):
                await stream.receive_some()
            down = await anext(news)
        assert isinstance(down, PeerDown)
        assert down.reason == "reset"
        assert ended == [a.peer_id]
        assert not b.is_alive
        with pytest.raises(DialError, match="refused"):
            await a.connect(b.listen_addrs)

    play(scenario)


def test_a_handlers_failure_is_counted():
    async def scenario(world):
        a, b, _ = await pair(world)

        async def broken(stream):
            raise ValueError("a bug in a handler")

        b.serve_stream("/test/broken/1", broken)
        await a.open_stream(b.peer_id, "/test/broken/1")
        await trio.sleep(1)
        assert b.handler_errors == 1
        assert isinstance(b.last_handler_error, ValueError)

    play(scenario)


def test_a_watcher_that_lags_too_far_behind_is_told():
    async def scenario(world):
        a, b = world.add("a"), world.add("b")
        async with a.events() as news:
            for _ in range(DEFAULT_LIMITS.events // 2 + 1):
                await a.connect(b.listen_addrs)
                a.disconnect(b.peer_id, "again")
                await trio.sleep(0.01)
            with pytest.raises(LimitExceeded, match=r"limits\.events"):
                async for _ in news:
                    pass

    play(scenario, latency_s_min=0.001, latency_s_max=0.002)


async def gossip(world, nodes, rounds):
    """Every node asks random others for a while; returns who heard from whom, and when."""
    heard = []
    meshes = [world.add() for _ in range(nodes)]
    for mesh in meshes:
        mesh.serve_stream(ECHO, echo)

    async def ask(number, mesh):
        for _ in range(rounds):
            other = meshes[int.from_bytes(mesh.entropy(4), "big") % nodes]
            if other is mesh:
                continue
            peer = await mesh.connect(other.listen_addrs)
            stream = await mesh.open_stream(peer, ECHO)
            await stream.send(mesh.entropy(8))
            heard.append((trio.current_time(), number, await stream.receive_exactly(8)))
            await stream.aclose()

    async with trio.open_nursery() as nursery:
        for number, mesh in enumerate(meshes):
            nursery.start_soon(ask, number, mesh)
    return heard


def test_a_mesh_replays_from_its_seed():
    def run(seed):
        return play(lambda world: gossip(world, 40, 5), seed=seed)

    first = run(1)
    assert len(first) > 150
    assert first == run(1)
    assert first != run(2)


def test_two_thousand_nodes():
    heard = play(lambda world: gossip(world, 2000, 2))
    assert len(heard) > 3900
