"""Whole daemons behind whatever NAT: what each finds out about itself, tells others, and does for them."""

from __future__ import annotations

import math

import msgspec
import pytest
import trio
from multiaddr import Multiaddr

from mycel.commands.swarm import _reach_rows
from mycel.node.host import Host
from mycel.node.reach import probe
from mycel.node.reach.reach import choose_circuits
from mycel.node.reach.relay_server import RelayServer
from mycel.node.reach.verdict import Kind
from mycel.protocol import echo
from mycel.protocol.address import is_circuit, tcp_addr
from mycel.protocol.keys import OwnKey
from mycel.protocol.mesh import PathKind
from mycel.simnet.network import SimNetwork

VERDICTS = {
    "open": Kind.PUBLIC,
    "full cone": Kind.PUNCHABLE,
    "address": Kind.PUNCHABLE,
    "port": Kind.PUNCHABLE,
    "renumbering": Kind.PUNCHABLE,
    "rejecting": Kind.PUNCHABLE,
    "symmetric": Kind.SYMMETRIC,
    "carrier": Kind.PUNCHABLE,
    "carrier symmetric": Kind.SYMMETRIC,
    "udp blocked": Kind.PUNCHABLE,
    "firewall": Kind.PUNCHABLE,
}


def kind(node):
    return node.reach.verdict.kind


def addrs(node):
    return [str(addr) for addr in node.host.told_addrs]


@pytest.mark.parametrize("nat", VERDICTS)
def test_each_kind_of_nat_is_judged_as_what_it_is(town, nat):
    async def scenario(t):
        await t.found()
        await t.join("second")
        await trio.sleep(1)
        node = await t.join("home", nat)
        await t.until(lambda: kind(node) is VERDICTS[nat], 15)
        await trio.sleep(30)
        assert kind(node) is VERDICTS[nat], node.reach.verdict
        public = kind(node) is Kind.PUBLIC
        assert len(node.reach.circuits.relays) == (0 if public else 2)
        assert any(map(is_circuit, addrs(node))) is not public
        assert node.reach.relay.is_serving is public

    town(scenario)


def test_a_home_is_callable_over_relays_within_two_seconds(town):
    async def scenario(t):
        await t.found()
        await t.join("second")
        began = trio.current_time()
        node = await t.join("home", "port")
        await t.until(lambda: len(node.reach.circuits.relays) == 2, 10)
        assert trio.current_time() - began < 3.0

    town(scenario)


def test_the_founder_is_public_by_its_first_guest_and_asks_nobody(town):
    async def scenario(t):
        founder = await t.found()
        assert kind(founder) is Kind.LOCAL
        await t.join("home", "port")
        await t.until(lambda: kind(founder) is Kind.PUBLIC, 2)
        assert "never contacted" in founder.reach.verdict.evidence[0]
        assert founder.reach.verdict.addrs == (tcp_addr("11.0.0.1", 4001),)
        assert addrs(founder) == ["/ip4/11.0.0.1/tcp/4001"]

    town(scenario)


def test_a_newcomer_is_proven_by_a_witness_that_it_never_contacted(town):
    async def scenario(t):
        await t.found()
        await t.join("second")
        third = await t.join("third")
        await t.until(lambda: kind(third) is Kind.PUBLIC, 2)
        second = t.nodes["second"].host.peer_id
        assert any(f"{second} connected from 11.0.0.2" in line for line in third.reach.verdict.evidence)
        assert not third.reach.circuits.relays

    town(scenario)


def test_two_public_nodes_alone_do_not_take_a_contacted_peer_for_a_proof(town):
    """The second one has contacted the only other one, and one knock is not enough; a third member's is."""

    async def scenario(t):
        founder = await t.found()
        second = await t.join("second")
        await trio.sleep(20)
        assert kind(founder) is Kind.PUBLIC
        assert kind(second) is Kind.PUNCHABLE
        assert second.reach.circuits.relays == [founder.host.peer_id]
        assert any("fresh port" in line for line in second.reach.verdict.evidence)
        await t.join("third")
        await t.until(lambda: kind(second) is Kind.PUBLIC, 10)
        await t.until(lambda: not second.reach.circuits.relays, 10)
        assert addrs(second) == ["/ip4/11.0.0.2/tcp/4001"]

    town(scenario)


def test_a_swarm_in_one_house_wants_no_relays_and_opens_nothing(town):
    async def scenario(t):
        machines = t.net.add_site("house", "port", homes=3)
        await t.found_on(machines[0])
        for machine in machines[1:]:
            await t.settle(machine)
        await trio.sleep(30)
        for node in t.nodes.values():
            assert kind(node) is Kind.LOCAL
            assert len(node.host.peers) == 2
            assert not node.reach.circuits.relays
            assert not node.reach.relay.is_serving
            assert echo.PROTOCOL not in node.host.protocols
        assert all(len(machine.listeners) == 1 for machine in machines)

    town(scenario)


def test_a_node_on_loopback_probes_nothing(town):
    async def scenario(t):
        node = await t.found(listen=("/ip4/127.0.0.1/tcp/4001",))
        await trio.sleep(30)
        assert node.reach.is_local
        assert kind(node) is Kind.LOCAL
        assert not t.net.machines["founder"].pipes
        assert len(t.net.machines["founder"].listeners) == 1

    town(scenario)


def test_a_home_whose_router_forwards_a_port_becomes_public_and_stops_being_so(town):
    async def scenario(t):
        await t.found()
        await t.join("second")
        node = await t.join("home", "full cone")
        await t.until(lambda: len(node.reach.circuits.relays) == 2, 10)
        outside = t.forward("home")
        node.reach.set_mapped([outside])
        await t.until(lambda: kind(node) is Kind.PUBLIC, 20)
        assert node.reach.verdict.addrs == (outside,)
        await t.until(lambda: not node.reach.circuits.relays, 5)
        assert addrs(node)[0] == str(outside)
        assert node.reach.relay.is_serving
        assert echo.PROTOCOL not in node.host.protocols  # its echo ports are not forwarded
        t.net.boxes["home box 0"].reboot()
        node.reach.set_mapped([])
        await t.until(lambda: len(node.reach.circuits.relays) == 2, 10)
        assert kind(node) is not Kind.PUBLIC
        assert str(outside) not in addrs(node)
        assert not node.reach.relay.is_serving

    town(scenario)


def test_a_port_forwarded_without_a_word_is_found_by_a_knock(town):
    async def scenario(t):
        await t.found()
        await t.join("second")
        machine = t.net.add_site("home", "full cone")[0]
        outside = t.forward("home")
        node = await t.settle(machine)
        await t.until(lambda: kind(node) is Kind.PUBLIC, 20)
        assert node.reach.verdict.addrs == (outside,)
        late = await t.join("late")
        await t.until(lambda: node.host.peer_id in late.host.peers, 10)
        assert late.host.peers[node.host.peer_id].path is PathKind.DIRECT

    town(scenario)


def test_a_router_that_promises_in_vain_is_not_believed(town):
    async def scenario(t):
        await t.found()
        await t.join("second")
        node = await t.join("home", "port")
        node.reach.set_mapped([tcp_addr("11.128.1.1", 4001)])
        await trio.sleep(40)
        assert kind(node) is Kind.PUNCHABLE
        assert any("4001 did not answer" in line for line in node.reach.verdict.evidence)
        assert len(node.reach.circuits.relays) == 2

    town(scenario)


def test_announced_addresses_are_told_instead_and_relays_besides(town):
    async def scenario(t):
        await t.found()
        node = await t.join("home", "symmetric", announce=("/dns4/example.org/tcp/4800",))
        assert addrs(node) == ["/dns4/example.org/tcp/4800"]
        await t.until(lambda: node.reach.circuits.relays, 10)
        assert addrs(node)[0] == "/dns4/example.org/tcp/4800"
        assert all(map(is_circuit, addrs(node)[1:]))
        assert len(addrs(node)) > 1

    town(scenario)


def test_status_says_it_in_plain_words(town):
    async def scenario(t):
        founder = await t.found()
        await t.join("second")
        node = await t.join("home", "symmetric")
        other = await t.join("flat", "port")
        await t.until(lambda: kind(node) is Kind.SYMMETRIC, 30)
        await t.until(lambda: other.host.peer_id in node.host.peers, 30)
        await trio.sleep(15)
        told = msgspec.to_builtins(node.status())["reach"]
        text = "\n".join(f"{what:>8}  {line}" for what, line in _reach_rows(told))
        assert text.startswith("   reach  symmetric: others call it through relays; directly only those")
        assert "two ports of founder see it at /ip4/11.128.1.1/tcp/" in text
        assert "reached through" in text
        assert "indirect  flat, over a relay: " in text
        assert "12D3Koo" not in text
        told = msgspec.to_builtins(founder.status())["reach"]
        text = "\n".join(line for _, line in _reach_rows(told))
        assert "public: others can call it from outside" in text
        assert "which this node had never contacted" in text
        assert "for 2 peers, " in text
        assert " circuits now" in text

    town(scenario)


def test_a_lost_address_voids_the_verdict_and_the_new_one_is_proven_and_told(town):
    async def scenario(t):
        founder = await t.found()
        await t.join("second")
        third = await t.join("third")
        await t.until(lambda: kind(third) is Kind.PUBLIC, 5)
        await move(t, "third", "11.7.7.7")
        await t.until(lambda: kind(third) is not Kind.PUBLIC, 2 * probe.CHECK_S)
        assert addrs(third)[0] == "/ip4/11.7.7.7/tcp/4001"
        await t.until(lambda: kind(third) is Kind.PUBLIC, 60)
        assert third.reach.verdict.ip == "11.7.7.7"
        new = (tcp_addr("11.7.7.7", 4001),)
        await t.until(lambda: founder.host.peers[third.host.peer_id].listen_addrs == new, 5)

    town(scenario)


async def move(t, name, ip):
    """Pull a machine's cable and plug it in where it has another address; what it spoke over is gone."""
    machine = t.net.machines[name]
    machine.silence()
    await trio.sleep(5)
    for old in machine.ips:
        del machine.lan.stations[old]
    machine.ips = (ip,)
    machine.lan.stations[ip] = machine
    machine.silence(False)


def test_a_lost_relay_is_replaced_and_others_are_told(town):
    async def scenario(t):
        await t.found()
        for name in ("second", "third"):
            await t.join(name)
        node = await t.join("home", "symmetric")
        await t.until(lambda: len(node.reach.circuits.relays) == 2, 10)
        first = node.reach.circuits.relays[0]
        name = next(name for name, one in t.nodes.items() if one.host.peer_id == first)
        t.net.machines[name].vanish()
        await t.until(lambda: first not in node.reach.circuits.relays, 10)
        await t.until(lambda: len(node.reach.circuits.relays) == 2, 10)
        assert not any(first in addr for addr in addrs(node))
        other = next(one for other, one in t.nodes.items() if other not in (name, "home"))
        await t.until(
            lambda: not any(first in str(a) for a in other.host.peers[node.host.peer_id].listen_addrs)
        )

    town(scenario)


def test_relay_off_relays_for_nobody_and_on_even_at_home(town):
    async def scenario(t):
        founder = await t.found(relay="off")
        node = await t.join("home", "port", relay="on")
        await t.until(lambda: kind(founder) is Kind.PUBLIC, 5)
        await trio.sleep(5)
        assert not founder.reach.relay.is_serving
        assert node.reach.relay.is_serving
        assert not node.reach.circuits.relays

    town(scenario)


def test_a_node_that_listens_nowhere_is_reached_through_relays(town):
    async def scenario(t):
        await t.found()
        await t.join("second")
        node = await t.join("mute", listen=())
        await t.until(lambda: len(node.reach.circuits.relays) == 2, 10)
        assert kind(node) is Kind.RELAY_ONLY
        assert all(map(is_circuit, addrs(node)))
        late = await t.join("late")
        await t.until(lambda: node.host.peer_id in late.host.peers, 10)

    town(scenario)


def test_one_lying_observer_is_outvoted(town):
    async def scenario(t):
        liar = await t.found()
        for name in ("second", "third"):
            await t.join(name)
        ask = liar.reach.prober.echo._make_offer

        async def lie(peer, family):
            offer = await ask(peer, family)
            listeners = liar.reach.prober.echo._listeners
            assert listeners
            return offer

        liar.reach.prober.echo._make_offer = lie
        real = echo.answer
        lies = []

        def false(question, key, index, seen):
            if liar.reach.prober.echo._keys.get(echo.key_id_of(question)) is not None:
                lies.append(seen)
                seen = tcp_addr("11.66.66.66", 666 + index)
            return real(question, key, index, seen)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(echo, "answer", false)
            node = await t.join("home", "port")
            await t.until(lambda: node.reach._judge.answers == 3, 30)
        assert lies
        assert kind(node) is Kind.PUNCHABLE
        assert node.reach.verdict.ip == "11.128.1.1"
        assert any("says otherwise and is outvoted" in line for line in node.reach.verdict.evidence)

    town(scenario)


def test_a_direct_way_is_dialled_before_a_relayed_one(town):
    async def scenario(t):
        await t.found()
        await t.join("second")
        home = await t.join("home", "full cone")
        await t.until(lambda: len(home.reach.circuits.relays) == 2, 10)
        told = addrs(home)
        assert [is_circuit(addr) for addr in told] == sorted(is_circuit(addr) for addr in told)
        late = await t.join("late")
        await t.until(lambda: home.host.peer_id in late.host.peers, 10)
        await t.until(lambda: late.host.peers[home.host.peer_id].path is PathKind.DIRECT, 10)

    town(scenario)


def test_a_firewalled_node_waits_for_a_call_only_for_the_grace(town):
    async def scenario(t):
        await t.found()
        await t.join("second")
        await t.join("third")
        await t.until(lambda: all(kind(node) is Kind.PUBLIC for node in t.nodes.values()), 20)
        began = trio.current_time()
        node = await t.join("home", "firewall")
        found = math.inf
        await t.until(lambda: len(node.reach.circuits.relays) == 2, 10)
        found = trio.current_time() - began
        assert probe.GRACE_S < found < probe.GRACE_S + 3

    town(scenario)


def test_homes_of_others_are_not_dialled_at_their_private_addresses(town):
    """192.168.1.2 is somebody in this house, wherever else there is one too."""

    async def scenario(t):
        await t.found()
        await t.join("second")
        one = await t.join("one", "symmetric")
        other = await t.join("other", "symmetric", listen=("/ip4/0.0.0.0/tcp/4002",))
        assert any("/192.168.1." in addr for addr in addrs(other))
        assert one.reach.can_lead("/ip4/192.168.1.77/tcp/1")
        assert not one.reach.can_lead("/ip4/192.168.2.77/tcp/1")
        assert not one.reach.can_lead("/ip4/10.0.0.1/tcp/1")
        assert one.reach.can_lead("/ip4/11.0.0.1/tcp/1")
        await t.until(lambda: other.host.peer_id in one.host.peers, 30)
        assert one.host.peers[other.host.peer_id].path is PathKind.RELAYED

    town(scenario)


def test_while_nobody_outside_is_in_sight_every_private_address_may_lead(town):
    async def scenario(t):
        machines = t.net.add_site("house", "port", homes=2)
        node = await t.found_on(machines[0])
        await t.settle(machines[1])
        await trio.sleep(5)
        assert node.reach.can_lead("/ip4/10.3.0.1/tcp/1")

    town(scenario)


def test_a_founder_at_home_is_joined_through_a_relay_outside_the_swarm(town):
    """Nobody of the swarm is public: a relay that the owner names carries the first connections."""

    async def scenario(t):
        network = SimNetwork(t.net.add("hub"))
        hub = Host(network, OwnKey(network.entropy(32)), listen=["/ip4/0.0.0.0/tcp/4001"])
        relay = RelayServer(hub)
        await t.nursery.start(hub.run)
        await t.nursery.start(relay.run)
        relay.serve(True)
        relays = (str(hub.listen_addrs[0]),)
        founder = await t.found(kind="port", relays=relays)
        await t.until(lambda: founder.reach.circuits.relays, 10)
        assert kind(founder) is not Kind.PUBLIC
        guest = await t.join("guest", "carrier", relays=relays)
        assert founder.host.peer_id in guest.host.peers
        await t.until(lambda: guest.host.peers[founder.host.peer_id].path is PathKind.DIRECT, 20)

    town(scenario)


def test_of_relayed_addresses_the_far_ones_are_told_two_of_each_relay():
    def circuits(relay, *ips):
        return [Multiaddr(f"/ip4/{ip}/tcp/1/p2p/{relay}/p2p-circuit") for ip in ips]

    keys = [OwnKey(bytes([number]) * 32).peer_id for number in (1, 2)]
    many = circuits(keys[0], "192.168.1.2", "11.0.0.1", "11.0.0.2", "11.0.0.3")
    assert choose_circuits(many) == many[1:3]
    near = circuits(keys[1], "192.168.1.3", "192.168.1.4", "192.168.1.5")
    assert choose_circuits([*many, *near]) == [*many[1:3], *near[:2]]
    named = [Multiaddr(f"/dns4/example.org/tcp/1/p2p/{keys[1]}/p2p-circuit")]
    assert choose_circuits([*near, *named]) == named
    assert choose_circuits([]) == []


def test_a_relay_in_somebody_elses_private_network_is_not_dialled(town):
    async def scenario(t):
        founder = await t.found()
        node = await t.join("home", "port")
        await t.until(lambda: node.reach.circuits.relays, 10)
        relay = founder.host.peer_id
        assert not node.reach.can_lead(f"/ip4/10.0.0.1/tcp/1/p2p/{relay}/p2p-circuit/p2p/{relay}")
        assert node.reach.can_lead(f"/ip4/11.0.0.1/tcp/1/p2p/{relay}/p2p-circuit/p2p/{relay}")

    town(scenario)


def test_nonsense_among_a_peers_addresses_is_left_out_and_spoils_nothing(town):
    async def scenario(t):
        founder = await t.found()
        node = await t.join("second")
        elsewhere = OwnKey(bytes(32)).peer_id
        good = Multiaddr("/ip4/11.0.0.2/tcp/4001")
        nonsense = [
            Multiaddr("/ip4/11.0.0.2/udp/4001/quic-v1"),
            Multiaddr(f"/ip4/11.0.0.2/tcp/4001/p2p/{elsewhere}"),
            Multiaddr(f"/ip4/11.0.0.2/tcp/1/p2p/{elsewhere}/p2p-circuit/p2p/{elsewhere}/p2p-circuit"),
        ]
        node.reach._told = lambda: [*nonsense, good]
        node.reach.changed()
        peer = node.host.peer_id
        await t.until(lambda: peer in founder.host.peers, 5)
        await t.until(lambda: nonsense[0] in founder.host.peers[peer].listen_addrs, 10)
        told = {one.peer: one.current for one in founder.contacts.told()}
        assert told[peer] == (f"{good}/p2p/{peer}",)

    town(scenario)
