"""The handshake: crossing dials, lost segments, leftovers of old connections."""

from __future__ import annotations

import pytest
import trio
import trio.testing
from multiaddr import Multiaddr

from mycel.protocol.address import tcp_addr
from mycel.protocol.errors import DialError, PipeBroken
from mycel.simnet.internet import InternetOptions, internet
from mycel.simnet.network import SimNetwork

LATENCY_S = 0.02
"""One way between two machines of these scenes."""


async def dial(pipes, name, network, target, local=None):
    pipes[name] = await network.dial(tcp_addr(*target), local=local and tcp_addr(*local))


async def cross(scene, a, b, pause=0.0):
    """Let two dial each other, each from the port that the other one calls; returns both pipes."""
    ends = (a.machine.ips[0], 5000), (b.machine.ips[0], 6000)
    pipes = {}
    async with trio.open_nursery() as nursery:
        nursery.start_soon(dial, pipes, "a", a, ends[1], ends[0])
        await trio.sleep(pause)
        nursery.start_soon(dial, pipes, "b", b, ends[0], ends[1])
    return pipes["a"], pipes["b"]


@pytest.mark.parametrize("listening", [False, True])
def test_two_dials_that_cross_are_one_connection(play, listening):
    async def scenario(scene):
        a, b = scene.network("a"), scene.network("b")
        listeners = []
        if listening:
            listeners.append(await a.listen(Multiaddr("/ip4/0.0.0.0/tcp/5000"), shared=True))
            listeners.append(await b.listen(Multiaddr("/ip4/0.0.0.0/tcp/6000"), shared=True))
        began = trio.current_time()
        near, far = await cross(scene, a, b)
        assert trio.current_time() - began == pytest.approx(2 * LATENCY_S)
        assert (near.local, near.remote) == (far.remote, far.local)
        near.try_send(b"from a")
        far.try_send(b"from b")
        assert await scene.receive(far, 6) == b"from a"
        assert await scene.receive(near, 6) == b"from b"
        for listener in listeners:
            with trio.move_on_after(5) as scope:
                await listener.accept()
            assert scope.cancelled_caught, "the connection was accepted as well"

    play(scenario)


def test_they_cross_as_long_as_the_second_leaves_before_the_first_arrives(play):
    async def scenario(scene):
        a, b = scene.network("a"), scene.network("b")
        near, far = await cross(scene, a, b, pause=0.9 * LATENCY_S)
        near.try_send(b"still")
        assert await scene.receive(far, 5) == b"still"

    play(scenario)


def test_later_the_first_finds_nobody_and_the_second_is_refused(play):
    async def scenario(scene):
        a, b = scene.network("a"), scene.network("b")
        with pytest.raises(ExceptionGroup) as caught:
            await cross(scene, a, b, pause=2.1 * LATENCY_S)
        assert caught.group_contains(DialError, match="refused")

    play(scenario)


def test_a_dial_to_whom_a_listener_has_taken_already_is_in_use(play):
    async def scenario(scene):
        a, b = scene.network("a"), scene.network("b")
        own = await b.listen(Multiaddr("/ip4/0.0.0.0/tcp/6000"), shared=True)
        ends = (a.machine.ips[0], 5000), (b.machine.ips[0], 6000)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(dial, {}, "a", a, ends[1], ends[0])
            for wait in (1.5, 4.0):  # while the handshake has an end to go, and once it is done
                await trio.sleep(wait * LATENCY_S)
                with pytest.raises(DialError, match="Address already in use"):
                    await dial({}, "b", b, ends[0], ends[1])
        assert (await own.accept()).remote == tcp_addr(*ends[0])

    play(scenario)


def test_a_port_that_dials_itself_is_refused(play):
    async def scenario(scene):
        a = scene.network("a")
        for ip in (a.machine.ips[0], "127.0.0.1"):
            with pytest.raises(DialError, match="refused"):
                await dial({}, "a", a, (ip, 5000), (ip, 5000))

    play(scenario)


def test_a_dial_given_up_before_the_answer_is_never_accepted(play):
    async def scenario(scene):
        a, b = scene.network("a"), scene.network("b")
        listener = await scene.listen(b)
        with trio.move_on_after(1.5 * LATENCY_S) as scope:
            await a.dial(listener.addr)
        assert scope.cancelled_caught
        with trio.move_on_after(100) as scope:
            await listener.accept()
        assert scope.cancelled_caught
        assert not b.machine.tcp.openings
        assert not listener.coming

    play(scenario)


def test_a_dial_given_up_at_the_moment_of_its_answer_is_reset():
    async def main():
        async with internet(InternetOptions()) as net:
            a, b = SimNetwork(net.add("a")), SimNetwork(net.add("b"))
            listener = await b.listen(Multiaddr("/ip4/0.0.0.0/tcp/4001"))
            with trio.CancelScope() as scope:
                net.timeline.after(2 * LATENCY_S, scope.cancel)
                await a.dial(tcp_addr(b.machine.ips[0], 4001))
            assert scope.cancelled_caught
            assert trio.current_time() == 2 * LATENCY_S
            accepted = await listener.accept()
            await accepted.wait_readable()
            with pytest.raises(PipeBroken, match="reset"):
                accepted.try_recv_into(bytearray(1))
            assert not a.machine.pipes

    # On this clock all that happens at one moment happens before any task runs.
    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_nobody_answers_for_two_minutes(play):
    async def scenario(scene):
        a, b = scene.network("a"), scene.network("b")
        listener = await scene.listen(b)
        b.machine.silence()
        began = trio.current_time()
        with pytest.raises(DialError, match="timed out"):
            await a.dial(listener.addr)
        assert trio.current_time() - began == pytest.approx(127.0)

    play(scenario)


def cut_after(scene, a, b, seconds, until):
    """Nothing passes between two machines from then until then."""
    scene.net.timeline.after(seconds, scene.net.cut, [a.machine], [b.machine])
    scene.net.timeline.after(until, scene.net.heal)


def test_a_lost_ack_is_made_up_for_when_the_answer_is_repeated(play):
    async def scenario(scene):
        a, b = scene.network("a"), scene.network("b")
        listener = await scene.listen(b)
        cut_after(scene, a, b, 2.5 * LATENCY_S, 0.5)
        near = await a.dial(listener.addr)
        far = await listener.accept()
        # The SYN-ACK went out after one latency, again a second later, and was acknowledged.
        assert trio.current_time() == pytest.approx(1.0 + 3 * LATENCY_S)
        far.try_send(b"at last")
        assert await scene.receive(near, 7) == b"at last"

    play(scenario)


def test_a_lost_ack_is_made_up_for_by_data(play):
    async def scenario(scene):
        a, b = scene.network("a"), scene.network("b")
        listener = await scene.listen(b)
        cut_after(scene, a, b, 2.5 * LATENCY_S, 0.1)
        near = await a.dial(listener.addr)
        await trio.sleep_until(0.2)
        near.try_send(b"hello")
        far = await listener.accept()
        assert trio.current_time() == pytest.approx(0.2 + LATENCY_S)
        assert await scene.receive(far, 5) == b"hello"

    play(scenario)


def test_an_end_that_waited_too_long_refuses_what_comes_then(play):
    async def scenario(scene):
        a, b = scene.network("a"), scene.network("b")
        listener = await scene.listen(b)
        cut_after(scene, a, b, 2.5 * LATENCY_S, 100.0)
        near = await a.dial(listener.addr)
        await trio.sleep_until(99.0)
        assert not b.machine.tcp.openings
        await trio.sleep_until(101.0)
        near.try_send(b"too late")
        await near.wait_readable()
        with pytest.raises(PipeBroken, match="reset"):
            near.try_recv_into(bytearray(1))

    play(scenario)


def test_what_is_left_of_an_old_connection_is_swept_away_by_a_dial_from_the_same_port(play):
    async def scenario(scene):
        a, b = scene.network("a"), scene.network("b")
        listener = await scene.listen(b)
        await dial({}, "first", a, listener.at, (a.machine.ips[0], 5000))
        old = await listener.accept()
        a.machine.vanish()
        a.machine.boot()
        began = trio.current_time()
        await dial({}, "second", a, listener.at, (a.machine.ips[0], 5000))
        # The first SYN met the old connection; what that answered was refused, and the second SYN got in.
        assert trio.current_time() - began == pytest.approx(1.0 + 2 * LATENCY_S)
        with pytest.raises(PipeBroken, match="reset"):
            old.try_recv_into(bytearray(1))
        assert (await listener.accept()).remote == old.remote

    play(scenario)


def test_a_machine_that_loses_power_in_a_handshake_holds_nothing(play):
    async def scenario(scene):
        a, b = scene.network("a"), scene.network("b")
        listener = await scene.listen(b)
        scene.net.timeline.after(2.5 * LATENCY_S, b.machine.vanish)
        near = await a.dial(listener.addr)
        await trio.sleep(LATENCY_S)
        assert not b.machine.tcp.openings
        b.machine.boot()
        near.try_send(b"anybody?")
        await near.wait_readable()
        with pytest.raises(PipeBroken, match="reset"):
            near.try_recv_into(bytearray(1))

    play(scenario)
