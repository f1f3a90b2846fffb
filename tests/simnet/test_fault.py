"""Partitions, silent, paused, crashed and dark machines, as their peers see them."""

from __future__ import annotations

import itertools
import random

import pytest
import trio
from multiaddr import Multiaddr

from mycel.protocol.errors import DialError, PipeBroken
from mycel.simnet.fault import FaultOptions, plan_faults, schedule
from mycel.simnet.flow import retransmission_after


async def two_machines(scene):
    near, far = scene.network("near"), scene.network("far")
    return near, far, *(await scene.connect(near, far))


def test_retransmissions_double():
    tries = []
    at = 10.0
    while len(tries) < 5:
        at = retransmission_after(10.0, at)
        tries.append(round(at - 10.0, 6))
    assert tries == [0.2, 0.6, 1.4, 3.0, 6.2]
    assert retransmission_after(0.0, 1e6) - 1e6 <= 120.0


def test_bytes_that_meet_a_cut_come_with_a_retransmission_after_it_healed(play):
    async def scenario(scene):
        net = scene.net
        near, far, a, b = await two_machines(scene)
        net.cut([near.machine], [far.machine])
        began = trio.current_time()
        a.try_send(b"into the dark")
        with trio.move_on_after(4.0) as scope:
            await b.wait_readable()
        assert scope.cancelled_caught
        a.try_send(b", and more")
        net.heal()
        data = await scene.receive(b, 23)
        assert data == b"into the dark, and more"
        # Lost after one latency of 0.02 s, tried again 0.2, 0.6, 1.4, 3.0 and then 6.2 s later.
        assert trio.current_time() - began == pytest.approx(6.22, abs=1e-6)

    play(scenario)


def test_a_cut_has_two_sides_and_spares_each(play):
    async def scenario(scene):
        net = scene.net
        machines = [scene.network(name) for name in "abcd"]
        inside = await scene.connect(machines[0], machines[1])
        across = await scene.connect(machines[1], machines[2])
        net.cut([m.machine for m in machines[:2]], [m.machine for m in machines[2:]])
        inside[0].try_send(b"x")
        across[0].try_send(b"x")
        assert await scene.receive(inside[1], 1) == b"x"
        with trio.move_on_after(60):
            await across[1].wait_readable()
        assert across[1].try_recv_into(bytearray(1)) is None

    play(scenario)


def test_a_silent_machine_answers_no_dial_until_it_is_back(play):
    async def scenario(scene):
        near, far = scene.network("near"), scene.network("far")
        listener = await scene.listen(far)
        far.machine.silence()
        with trio.move_on_after(5.0) as scope:
            await near.dial(listener.addr)
        assert scope.cancelled_caught
        scene.net.timeline.after(10.0, far.machine.silence, False)
        began = trio.current_time()
        await near.dial(listener.addr)
        # SYNs went out after 0, 1, 3, 7 and 15 s.
        assert trio.current_time() - began == pytest.approx(15.04, abs=1e-6)

    play(scenario)


def test_a_dial_into_silence_ends_by_itself(play):
    async def scenario(scene):
        near, far = scene.network("near"), scene.network("far")
        listener = await scene.listen(far)
        far.machine.silence()
        began = trio.current_time()
        with pytest.raises(DialError, match="timed out"):
            await near.dial(listener.addr)
        assert trio.current_time() - began == pytest.approx(127.0)

    play(scenario)


def test_a_crash_resets_connections_within_a_latency_and_frees_its_ports(play):
    async def scenario(scene):
        near, far, a, b = await two_machines(scene)
        listener = await scene.listen(far)
        began = trio.current_time()
        far.machine.crash()
        await a.wait_readable()
        assert trio.current_time() - began == pytest.approx(0.02)
        with pytest.raises(PipeBroken, match="reset by peer"):
            a.try_recv_into(bytearray(1))
        with pytest.raises(PipeBroken, match="crashed"):
            b.try_send(b"x")
        with pytest.raises(DialError, match="refused"):
            await near.dial(listener.addr)
        await scene.listen(far)  # the next program on that machine may have the port

    play(scenario)


def test_a_crash_stops_programs_before_they_can_say_goodbye(play):
    async def scenario(scene):
        _near, far, a, b = await two_machines(scene)
        said = []

        async def program():
            try:
                await trio.sleep_forever()
            finally:
                with pytest.raises(PipeBroken):
                    b.try_send(b"goodbye")
                said.append("tried")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(far.machine.run, program)
            await trio.sleep(1)
            far.machine.crash()
        assert said == ["tried"]
        await a.wait_readable()
        with pytest.raises(PipeBroken):
            a.try_recv_into(bytearray(10))

    play(scenario)


def test_a_dark_machine_says_nothing_and_resets_old_connections_once_it_is_back(play):
    async def scenario(scene):
        _near, far, a, b = await two_machines(scene)
        far.machine.vanish()
        with pytest.raises(PipeBroken, match="lost power"):
            b.try_send(b"x")
        a.try_send(b"are you there?")
        with trio.move_on_after(30) as scope:
            await a.wait_readable()
        assert scope.cancelled_caught
        far.machine.boot()
        with trio.fail_after(120):
            await a.wait_readable()
        with pytest.raises(PipeBroken, match="reset by peer"):
            a.try_recv_into(bytearray(1))

    play(scenario)


def test_a_paused_machine_takes_what_its_kernel_takes_and_says_nothing(play):
    async def scenario(scene):
        _near, far, a, b = await two_machines(scene)
        b.try_send(b"written before")
        far.machine.pause()
        assert await scene.receive(a, 14) == b"written before"
        a.try_send(b"hello")
        assert b.try_send(b"nothing leaves") == 0
        with trio.move_on_after(10) as scope:
            await b.wait_readable()
        assert scope.cancelled_caught
        assert b.try_recv_into(bytearray(5)) is None
        scene.net.timeline.after(5, far.machine.resume)
        began = trio.current_time()
        await b.wait_readable()
        assert trio.current_time() - began == 5.0
        assert await scene.receive(b, 5) == b"hello"
        assert b.try_send(b"back") == 4

    play(scenario)


def test_a_dial_to_a_paused_machine_completes_and_waits(play):
    async def scenario(scene):
        near, far = scene.network("near"), scene.network("far")
        listener = await scene.listen(far)
        far.machine.pause()
        await near.dial(listener.addr)
        with trio.move_on_after(5) as scope:
            await listener.accept()
        assert scope.cancelled_caught
        scene.net.timeline.after(1, far.machine.resume)
        await listener.accept()

    play(scenario)


def test_an_unanswered_address_and_a_name_nobody_has(play):
    async def scenario(scene):
        near = scene.network("near")
        with pytest.raises(DialError, match="No route to host"):
            await near.dial(Multiaddr("/ip4/11.9.9.9/tcp/1"))
        with pytest.raises(DialError, match="cannot resolve"):
            await near.dial(Multiaddr("/dns/nobody.example/tcp/1"))

    play(scenario)


NAMES = [f"m{number}" for number in range(12)]
ROUGH = FaultOptions(
    until_s=300,
    stall_every_s=5,
    silence_every_s=8,
    pause_every_s=9,
    cut_every_s=20,
    crash_every_s=15,
    vanish_every_s=15,
    deaths_max=4,
)


def test_a_plan_follows_its_seed_and_its_bounds():
    plan = plan_faults(ROUGH, NAMES, random.Random(3))
    assert plan == plan_faults(ROUGH, NAMES, random.Random(3))
    assert plan != plan_faults(ROUGH, NAMES, random.Random(2))
    assert {fault.kind for fault in plan} == {"stall", "silence", "pause", "cut", "crash", "vanish"}
    deaths = [fault for fault in plan if fault.kind in ("crash", "vanish")]
    assert len(deaths) == 4
    assert all(fault.at >= 0 and fault.at + fault.seconds <= 300 for fault in plan)
    for death in deaths:
        later = [fault for fault in plan if fault.at > death.at]
        assert not any(death.machines[0] in fault.machines for fault in later)
    cuts = [fault for fault in plan if fault.kind == "cut"]
    assert all(before.at + before.seconds <= after.at for before, after in itertools.pairwise(cuts))


def test_a_quiet_world_has_no_faults():
    assert plan_faults(FaultOptions(), NAMES, random.Random(1)) == []


def test_a_plan_happens(play):
    async def scenario(scene):
        for name in NAMES:
            scene.network(name)
        plan = plan_faults(ROUGH, NAMES, random.Random(3))
        schedule(scene.net, plan)
        await trio.sleep(301)
        counts = scene.net.trace.counts
        planned = {kind: sum(fault.kind == kind for fault in plan) for kind in ("silence", "pause", "crash")}
        assert {kind: counts[kind] for kind in planned} == planned
        assert counts["unsilence"] == counts["silence"]
        assert counts["resume"] == counts["pause"]
        assert counts["heal"] == sum(fault.kind == "cut" for fault in plan)
        assert sum(machine.is_on for machine in scene.net.machines.values()) == 12 - counts["vanish"]

    play(scenario)
