"""Machines behind boxes: what each kind does to bare connections, and what gets through two of them."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from itertools import combinations_with_replacement
from pathlib import Path

import pytest
import trio
from multiaddr import Multiaddr

from mycel.protocol.address import tcp_addr
from mycel.protocol.errors import DialError, PipeBroken
from mycel.simnet.box import CARRIER_NET
from mycel.simnet.link import LinkOptions
from mycel.simnet.nat import (
    FIREWALL,
    KINDS,
    PORT_RESTRICTED,
    REJECTING,
    SYMMETRIC,
    Filter,
    Mapping,
    Ports,
)
from mycel.simnet.network import SimNetwork
from mycel.simnet.rawpunch import ECHO_PORTS, echoes, knock, punch, seen_from

LINE = LinkOptions(latency_s=0.01)
SILENT = ("silent", "silent")
BEHAVIOUR = {
    # keeps the port, is symmetric, (stranger, acquaintance)
    "open": (True, False, ("in", "in")),
    "full cone": (True, False, ("in", "in")),
    "address": (True, False, ("silent", "in")),
    "port": (True, False, SILENT),
    "renumbering": (False, False, SILENT),
    "rejecting": (True, False, ("refused", "refused")),
    "symmetric": (False, True, SILENT),
    "carrier": (True, False, SILENT),
    "carrier symmetric": (False, True, SILENT),
    "udp blocked": (True, False, SILENT),
    "firewall": (True, False, SILENT),
}
"""The same as of real kernels: tests/netns/test_boxes.py."""
ANSWERS_SYMMETRIC = ("open", "full cone", "address")
"""Whom a symmetric site can be connected with: they do not ask which port an answer comes from."""


def play_home(play, scenario, kind="port", **options):
    """`scenario(scene, home, server)`: a home of that kind and a machine with an address echo."""

    async def main(scene):
        known = scene.network("known")
        (home,) = scene.net.add_site("home", kind, **options)
        async with echoes(known.machine) as server:
            await scenario(scene, SimNetwork(home), server)

    return play(main, link=LINE)


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_behaves_as_its_name_says(play, kind):
    async def scenario(scene, home, server):
        listener = await home.listen(Multiaddr("/ip4/0.0.0.0/tcp/5000"), shared=True)
        other, stranger = scene.network("other"), scene.network("stranger")
        async with echoes(other.machine) as other_server:
            seen = []
            for asked in (server, (server[0], ECHO_PORTS[1]), other_server):
                addr, _ = await seen_from(home, listener.addr, asked)
                seen.append(addr)
        keeps_port, is_symmetric, comes_in = BEHAVIOUR[kind]
        assert all((addr[1] == 5000) == keeps_port for addr in seen)
        assert (len(set(seen)) > 1) == is_symmetric
        known = SimNetwork(scene.net.machines["known"])
        assert (await knock(stranger, seen[0]), await knock(known, seen[0])) == comes_in

    play_home(play, scenario, kind)


def test_every_kind_is_looked_at():
    assert list(BEHAVIOUR) == list(KINDS)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_fifty_one_of_the_sixty_six_pairs_can_be_punched(play, seed):
    async def scenario(scene):
        net = scene.net
        seconds = {}

        async def try_it(*kinds):
            ends = [net.add_site(f"{'+'.join(kinds)} {number}", kind)[0] for number, kind in enumerate(kinds)]
            seconds[kinds] = await punch(*map(SimNetwork, ends), server)

        async with echoes(net.add("known")) as server, trio.open_nursery() as nursery:
            for pair in combinations_with_replacement(KINDS, 2):
                nursery.start_soon(try_it, *pair)
        return seconds

    seconds = play(scenario, link=LINE, seed=seed)
    expected = {
        pair
        for pair in seconds
        if not any("symmetric" in kind for kind in pair) or any(kind in ANSWERS_SYMMETRIC for kind in pair)
    }
    assert {pair for pair, took in seconds.items() if took is not None} == expected
    assert (len(seconds), len(expected)) == (66, 51)


@pytest.mark.parametrize("hairpin", [True, False])
def test_two_machines_of_one_home_and_two_homes_of_one_carrier(play, hairpin):
    async def scenario(scene):
        net = scene.net
        ends = [SimNetwork(machine) for machine in net.add_site("home", "port", homes=2, hairpin=hairpin)]
        carrier = net.add_nat("carrier", replace(PORT_RESTRICTED, hairpin=hairpin), net=CARRIER_NET)
        homes = [
            SimNetwork(net.add(name, behind=net.add_nat(name, PORT_RESTRICTED, behind=carrier)))
            for name in ("left", "right")
        ]
        async with echoes(net.add("known")) as server:
            assert (await punch(*ends, server) is not None) == hairpin
            assert await punch(*ends, server, inside=True) is not None
            assert (await punch(*homes, server, inside=True) is not None) == hairpin

    play(scenario, link=LINE)


def test_both_ends_see_what_the_boxes_made_of_the_addresses(play):
    async def scenario(scene):
        net = scene.net
        far = scene.network("far")
        outer = net.add_nat("outer", PORT_RESTRICTED, net=CARRIER_NET)
        inner = net.add_nat("inner", PORT_RESTRICTED, behind=outer)
        home = SimNetwork(net.add("home", behind=inner))
        near, accepted = await scene.connect(home, far)
        assert (home.machine.ips, inner.ip) == (("192.168.1.2",), "100.64.0.2")
        assert near.local == tcp_addr("192.168.1.2", near.near[1])
        assert near.remote == accepted.local == tcp_addr(far.machine.ips[0], 4001)
        assert accepted.remote == tcp_addr(outer.ip, near.near[1])
        near.try_send(b"from home")
        accepted.try_send(b"to home")
        assert await scene.receive(accepted, 9) == b"from home"
        assert await scene.receive(near, 7) == b"to home"

    play(scenario, link=LINE)


def test_a_firewall_translates_nothing(play):
    async def scenario(scene):
        far = scene.network("far")
        home = SimNetwork(scene.net.add("home", behind=scene.net.add_nat("wall", FIREWALL)))
        near, accepted = await scene.connect(home, far)
        assert accepted.remote == near.local
        assert await knock(far, (home.machine.ips[0], near.near[1])) == "silent"

    play(scenario, link=LINE)


def test_latency_adds_up_over_the_way_and_the_narrowest_line_counts(play):
    async def scenario(scene):
        net = scene.net
        far = scene.network("far", link=LinkOptions(latency_s=0.01))
        line = LinkOptions(latency_s=0.03, up_bytes_per_s=1e6, down_bytes_per_s=4e6)
        box = net.add_nat("box", PORT_RESTRICTED, link=line)
        homes = [
            SimNetwork(net.add(name, behind=box, link=LinkOptions(latency_s=0.002)))
            for name in ("one", "two")
        ]
        began = trio.current_time()
        near, accepted = await scene.connect(homes[0], far)
        assert trio.current_time() - began == pytest.approx(3 * 0.042)
        bare = scene.network("bare", link=replace(line, latency_s=0.032))
        as_fast = await scene.connect(bare, far)
        for _ in ("up", "down"):
            seconds = await scene.transfer(near, accepted, 10**6)
            assert seconds == pytest.approx(await scene.transfer(*as_fast, 10**6))
            near, accepted, as_fast = accepted, near, (as_fast[1], as_fast[0])
        # Two machines of one home share its line, and have each other's at hand.
        second = await scene.connect(homes[1], far)
        took = []

        async def send(near, accepted):
            took.append(await scene.transfer(near, accepted, 10**6))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send, near, accepted)
            nursery.start_soon(send, *second)
        assert took == pytest.approx([2.042, 2.042], rel=0.01)
        assert await scene.transfer(*await scene.connect(*homes), 10**6) == pytest.approx(0.004, rel=0.01)

    play(scenario, link=LINE)


def test_addresses_inside_are_the_same_in_every_home_and_mean_another_machine_in_each(play):
    async def scenario(scene):
        net = scene.net
        homes = [
            [SimNetwork(machine) for machine in net.add_site(name, "full cone", homes=2)]
            for name in ("one", "two")
        ]
        assert homes[0][0].machine.ips == homes[1][0].machine.ips
        listener = await homes[1][1].listen(Multiaddr("/ip4/0.0.0.0/tcp/4001"))
        at = (homes[1][1].machine.ips[0], 4001)
        assert await knock(homes[1][0], at) == "in"
        assert (await listener.accept()).remote == tcp_addr(homes[1][0].machine.ips[0], 32768)
        assert await knock(homes[0][0], at) == "refused"

    play(scenario, link=LINE)


def test_private_addresses_lead_nowhere_from_outside(play):
    async def scenario(scene):
        far = scene.network("far")
        home = SimNetwork(scene.net.add_site("home", "full cone")[0])
        assert await knock(far, (home.machine.ips[0], 1)) == "silent"
        began = trio.current_time()
        with pytest.raises(DialError, match="No route to host"):
            await home.dial(tcp_addr("192.168.1.77", 1))
        assert trio.current_time() - began == pytest.approx(3.0)
        with pytest.raises(DialError, match="No route to host"):
            await home.dial(tcp_addr("11.99.0.1", 1))

    play(scenario, link=LINE)


async def talk(scene, near, far):
    """Whether bytes go both ways within a while."""
    for one, other in ((near, far), (far, near)):
        one.try_send(b"ping")
        with trio.move_on_after(1.0) as scope:
            assert await scene.receive(other, 4) == b"ping"
        if scope.cancelled_caught:
            return False
    return True


def test_a_box_that_reboots_learns_a_connection_anew_from_inside(play):
    async def scenario(scene):
        far = scene.network("far")
        box = scene.net.add_nat("box", PORT_RESTRICTED)
        home = SimNetwork(scene.net.add("home", behind=box))
        near, accepted = await scene.connect(home, far)
        box.reboot()
        assert not await talk(scene, accepted, near)
        assert await talk(scene, near, accepted)
        assert await scene.receive(near, 4) == b"ping", "what was lost comes with a retransmission"

    play(scenario, link=LINE)


def test_behind_a_symmetric_box_a_reboot_ends_connections(play):
    async def scenario(scene):
        far = scene.network("far")
        box = scene.net.add_nat("box", SYMMETRIC)
        near, accepted = await scene.connect(SimNetwork(scene.net.add("home", behind=box)), far)
        box.reboot()
        near.try_send(b"from another port now")
        await near.wait_readable()
        with pytest.raises(PipeBroken, match="reset by peer"):
            near.try_recv_into(bytearray(1))
        assert accepted.try_recv_into(bytearray(1)) is None

    play(scenario, link=LINE)


def test_a_rejecting_box_that_forgot_a_connection_resets_it(play):
    async def scenario(scene):
        far = scene.network("far")
        box = scene.net.add_nat("box", REJECTING)
        _, accepted = await scene.connect(SimNetwork(scene.net.add("home", behind=box)), far)
        box.reboot()
        accepted.try_send(b"who?")
        await accepted.wait_readable()
        with pytest.raises(PipeBroken, match="reset by peer"):
            accepted.try_recv_into(bytearray(1))

    play(scenario, link=LINE)


@pytest.mark.parametrize(("pause", "alive"), [(250.0, True), (350.0, False)])
def test_an_idle_connection_is_forgotten_in_its_time(play, pause, alive):
    async def scenario(scene):
        far = scene.network("far")
        box = scene.net.add_nat("box", replace(PORT_RESTRICTED, idle_s=300.0))
        near, accepted = await scene.connect(SimNetwork(scene.net.add("home", behind=box)), far)
        assert await talk(scene, near, accepted)
        for _ in range(2):
            await trio.sleep(pause)
            assert await talk(scene, accepted, near) == alive
            if not alive:
                return

    play(scenario, link=LINE)


def test_an_end_of_stream_and_a_reset_cross_boxes(play):
    async def scenario(scene):
        far = scene.network("far")
        home = SimNetwork(scene.net.add_site("home", "carrier")[0])
        near, accepted = await scene.connect(home, far)
        near.close()
        assert await scene.receive(accepted, 1) == b""
        near, accepted = await scene.connect(home, far)
        accepted.reset()
        await near.wait_readable()
        with pytest.raises(PipeBroken, match="reset by peer"):
            near.try_recv_into(bytearray(1))

    play(scenario, link=LINE)


def test_a_silent_machine_behind_a_box_is_silent(play):
    async def scenario(scene):
        far = scene.network("far")
        home = SimNetwork(scene.net.add_site("home", "port")[0])
        near, accepted = await scene.connect(home, far)
        home.machine.silence()
        assert not await talk(scene, accepted, near)
        with trio.move_on_after(5) as scope:
            await home.dial(tcp_addr(far.machine.ips[0], 1))
        assert scope.cancelled_caught
        home.machine.silence(False)
        assert await scene.receive(near, 4) == b"ping"

    play(scenario, link=LINE)


def test_boxes_are_told_apart(play):
    async def scenario(scene):
        outer = scene.net.add_nat("outer", PORT_RESTRICTED)
        with pytest.raises(ValueError, match="already"):
            scene.net.add_nat("outer", PORT_RESTRICTED)
        with pytest.raises(ValueError, match="on both sides"):
            scene.net.add_nat("inner", PORT_RESTRICTED, behind=outer)

    play(scenario)


def test_the_kinds_are_those_that_are_built_from_real_kernels():
    path = Path(__file__).parents[1] / "netns" / "netlab" / "boxes.py"
    spec = importlib.util.spec_from_file_location("netlab_boxes", path)
    real = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = real  # dataclasses look themselves up there
    spec.loader.exec_module(real)
    assert [kind.name for kind in real.KINDS] == list(KINDS)
    filters = {Filter.ANYBODY: "anybody", Filter.ADDRESS: "address", Filter.PORT: "port"}
    for kind in real.KINDS:
        for theirs, ours in zip(kind.boxes, KINDS[kind.name], strict=True):
            assert theirs.filter == filters[ours.filter]
            assert theirs.is_symmetric == (ours.mapping is Mapping.PER_PORT)
            assert (not theirs.is_symmetric and theirs.keeps_port) == (ours.ports is Ports.KEPT)
            for name in ("rejects", "passes_udp", "translates", "hairpin"):
                assert getattr(theirs, name) == getattr(ours, name), (kind.name, name)
