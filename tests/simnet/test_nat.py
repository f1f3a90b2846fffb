"""A box's memory: which port outside, who may come in, how long; by cases and for any traffic."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mycel.simnet.conntrack import State, follow, may_reopen
from mycel.simnet.nat import (
    ADDRESS_RESTRICTED,
    FIREWALL,
    FULL_CONE,
    KINDS,
    OTHER_COUNT,
    OTHER_MIN,
    PORT_RESTRICTED,
    REJECTING,
    RENUMBERING,
    SYMMETRIC,
    Filter,
    Mapping,
    NatKind,
    Ports,
    Translator,
)
from mycel.simnet.packet import ACK, DATA, FIN, RST, SYN, SYN_ACK, Packet

HOME, NEIGHBOUR = ("192.168.1.2", 5000), ("192.168.1.3", 5000)
PEER, PEER_OTHER_PORT, STRANGER = ("11.0.0.1", 80), ("11.0.0.1", 81), ("11.0.0.2", 80)
IP = "11.128.1.1"


def box(kind):
    return Translator(kind, IP, random.Random(1))


def out(box, source=HOME, target=PEER, kind=SYN, now=0.0):
    """The source address that the packet has outside, None where it is dropped."""
    ruling = box.outward(Packet(kind, source, target), now)
    if ruling is None:
        return None
    assert not ruling.inwards
    assert ruling.packet.target == target
    return ruling.packet.source


def come_in(box, source, target, kind=SYN, now=0.0):
    """Whom the packet reaches inside, "reset" where it is refused, None where it is dropped."""
    ruling = box.inward(Packet(kind, source, target), now)
    if ruling is None:
        return None
    if ruling.packet.kind == RST and kind != RST:
        assert not ruling.inwards
        assert (ruling.packet.source, ruling.packet.target) == (target, source)
        return "reset"
    assert ruling.inwards
    assert ruling.packet.source == source
    return ruling.packet.target


def test_ports_are_kept_or_another_or_any():
    assert out(box(PORT_RESTRICTED)) == (IP, 5000)
    renumbered = out(box(RENUMBERING))
    assert renumbered == out(box(RENUMBERING), target=STRANGER)
    assert renumbered[1] != 5000
    assert OTHER_MIN <= renumbered[1] < OTHER_MIN + OTHER_COUNT
    assert out(box(FIREWALL), source=("11.128.1.2", 5000)) == ("11.128.1.2", 5000)


def test_a_symmetric_box_gives_each_connection_a_port_of_its_own():
    symmetric = box(SYMMETRIC)
    ports = [out(symmetric, target=peer) for peer in (PEER, PEER_OTHER_PORT, STRANGER)]
    assert len(set(ports)) == 3
    assert [out(symmetric, target=peer) for peer in (PEER, PEER_OTHER_PORT, STRANGER)] == ports


def test_a_box_that_maps_by_address_gives_one_port_for_each():
    by_address = box(NatKind(mapping=Mapping.PER_ADDRESS, ports=Ports.RANDOM))
    assert out(by_address, target=PEER) == out(by_address, target=PEER_OTHER_PORT)
    assert out(by_address, target=STRANGER) != out(by_address, target=PEER)


def test_a_neighbour_with_the_same_port_gets_another():
    kept = box(PORT_RESTRICTED)
    assert out(kept, source=HOME) == (IP, 5000)
    assert out(kept, source=NEIGHBOUR) == (IP, 5001)
    assert out(kept, source=HOME, target=STRANGER) == (IP, 5000)


@pytest.mark.parametrize(
    ("kind", "who_gets_in"),
    [
        (FULL_CONE, [HOME, HOME, HOME]),
        (ADDRESS_RESTRICTED, [HOME, HOME, None]),
        (PORT_RESTRICTED, [HOME, None, None]),
        (RENUMBERING, [HOME, None, None]),
        (SYMMETRIC, [HOME, None, None]),
        (REJECTING, [HOME, "reset", "reset"]),
    ],
)
def test_who_may_come_in(kind, who_gets_in):
    """The peer whose SYN crosses ours, its other port, and a stranger."""
    nat = box(kind)
    outside = out(nat)
    assert [come_in(nat, peer, outside) for peer in (PEER, PEER_OTHER_PORT, STRANGER)] == who_gets_in


def test_a_firewall_lets_in_what_was_asked_for():
    firewall = box(FIREWALL)
    home = ("11.128.1.2", 5000)
    assert come_in(firewall, PEER, home) is None
    out(firewall, source=home)
    assert come_in(firewall, PEER, home) == home
    assert come_in(firewall, STRANGER, home) is None


def test_a_port_that_nobody_inside_uses_is_nobodys():
    for kind in (FULL_CONE, ADDRESS_RESTRICTED, PORT_RESTRICTED):
        assert come_in(box(kind), PEER, (IP, 5000)) is None
    assert come_in(box(REJECTING), PEER, (IP, 5000)) == "reset"
    assert come_in(box(REJECTING), PEER, (IP, 5000), kind=RST) is None


def test_the_same_two_cannot_speak_through_two_ports():
    """Answers to the peer could not be told apart."""
    nat = box(NatKind(mapping=Mapping.PER_PORT, ports=Ports.RANDOM, filter=Filter.ANYBODY))
    theirs, strangers = out(nat), out(nat, target=STRANGER)
    assert come_in(nat, PEER, strangers) is None
    assert come_in(nat, PEER, theirs) == HOME
    assert come_in(nat, PEER_OTHER_PORT, strangers) == HOME


def test_what_opens_nothing_is_let_through_by_nobody():
    for kind in (SYN_ACK, RST):
        cone = box(FULL_CONE)
        assert out(cone, kind=kind) is None
        outside = out(cone)
        assert come_in(cone, STRANGER, outside, kind) is None
        assert come_in(cone, STRANGER, outside) == HOME


def test_an_acquaintance_is_forgotten():
    cone = box(replace(ADDRESS_RESTRICTED, keep_s=100.0))
    outside = out(cone)
    assert come_in(cone, PEER_OTHER_PORT, outside, now=99.0) == HOME
    assert come_in(cone, ("11.0.0.1", 82), outside, now=101.0) is None


def test_an_unanswered_syn_is_forgotten_after_two_minutes():
    nat = box(PORT_RESTRICTED)
    outside = out(nat)
    assert come_in(nat, PEER, outside, now=119.0) == HOME
    nat = box(PORT_RESTRICTED)
    outside = out(nat)
    assert come_in(nat, PEER, outside, now=121.0) is None


def establish(nat, now=0.0):
    outside = out(nat, now=now)
    assert come_in(nat, PEER, outside, SYN_ACK, now) == HOME
    assert out(nat, kind=ACK, now=now) == outside
    return outside


def test_an_idle_connection_is_forgotten_and_every_packet_keeps_it():
    nat = box(replace(PORT_RESTRICTED, idle_s=300.0))
    outside = establish(nat)
    for now in (299.0, 598.0):
        assert come_in(nat, PEER, outside, DATA, now) == HOME
    assert come_in(nat, PEER, outside, DATA, 899.0) is None


def test_a_port_outside_is_kept_as_long_as_a_connection_uses_it():
    nat = box(replace(PORT_RESTRICTED, idle_s=300.0, keep_s=10.0))
    outside = establish(nat)
    assert out(nat, source=NEIGHBOUR, now=100.0) == (IP, 5001)
    assert come_in(nat, PEER, outside, DATA, 290.0) == HOME
    assert out(nat, source=("192.168.1.4", 5000), now=580.0) == (IP, 5001)
    assert come_in(nat, PEER, outside, DATA, 585.0) == HOME
    assert out(nat, source=("192.168.1.5", 5000), now=1000.0) == outside


def test_a_forgotten_connection_is_picked_up_from_inside():
    nat = box(PORT_RESTRICTED)
    outside = establish(nat)
    nat.forget()
    assert come_in(nat, PEER, outside, DATA) is None
    assert out(nat, kind=DATA) == outside
    assert come_in(nat, PEER, outside, DATA) == HOME


def test_a_symmetric_box_picks_it_up_at_another_port():
    nat = box(SYMMETRIC)
    outside = establish(nat)
    nat.forget()
    assert out(nat, kind=DATA) not in (None, outside)


def test_a_reset_ends_a_connection_and_who_opened_it_may_open_it_again():
    nat = box(PORT_RESTRICTED)
    outside = out(nat)
    assert come_in(nat, PEER, outside, RST) == HOME
    assert come_in(nat, PEER, outside) is None
    assert out(nat) == outside
    assert come_in(nat, PEER, outside) == HOME


def test_a_symmetric_box_opens_it_again_at_another_port():
    nat = box(SYMMETRIC)
    outside = out(nat)
    assert come_in(nat, PEER, outside, RST) == HOME
    again = out(nat)
    assert again != outside
    assert come_in(nat, PEER, outside) is None
    assert come_in(nat, PEER, again) == HOME


def test_a_neighbour_is_reached_by_the_outer_address_only_where_the_box_turns_packets_around():
    for kind, turned in ((replace(PORT_RESTRICTED, hairpin=True), True), (PORT_RESTRICTED, False)):
        nat = box(kind)
        ours, theirs = out(nat), out(nat, source=NEIGHBOUR)
        ruling = nat.outward(Packet(SYN, HOME, theirs), 0.0)
        if turned:
            assert ruling.inwards
            assert (ruling.packet.source, ruling.packet.target) == (ours, NEIGHBOUR)
        else:
            assert ruling is None
    refused = box(REJECTING).outward(Packet(SYN, HOME, (IP, 1)), 0.0)
    assert (refused.inwards, refused.packet.kind, refused.packet.target) == (True, RST, HOME)


def test_when_all_ports_are_taken_the_next_connection_is_dropped(monkeypatch):
    monkeypatch.setattr("mycel.simnet.nat.PORT_MAX", 1024 + 99)
    nat = box(SYMMETRIC)
    ports = {out(nat, target=(f"11.1.0.{number}", 1)) for number in range(100)}
    assert ports == {(IP, port) for port in range(1024, 1124)}
    assert out(nat, target=STRANGER) is None
    assert out(nat, target=STRANGER, now=4000.0) is not None


def test_the_kinds_are_eleven():
    assert len(KINDS) == 11
    assert [len(boxes) for boxes in KINDS.values()] == [0, 1, 1, 1, 1, 1, 1, 2, 2, 1, 1]


# -- what a connection's states allow --------------------------------------------------------------------


def states(*packets):
    """The states after packets, each a kind and whether it goes forward; it begins with the opener's SYN."""
    state = State.SYN_SENT
    for kind, forward in packets:
        state = follow(state, kind, forward=forward)
        if state is None:
            return None
    return state


def test_the_usual_handshake_and_a_simultaneous_one_end_established():
    assert states((SYN_ACK, False), (ACK, True)) is State.ESTABLISHED
    assert states((SYN, False), (SYN_ACK, True), (SYN_ACK, False), (ACK, True)) is State.ESTABLISHED
    assert states((SYN, False), (SYN_ACK, False), (SYN_ACK, True), (DATA, True)) is State.ESTABLISHED


def test_what_fits_no_state_is_invalid():
    assert states((DATA, True)) is None
    assert states((SYN_ACK, True)) is None
    assert states((SYN_ACK, False), (ACK, True), (SYN, False)) is None
    assert states((RST, False), (SYN, False)) is None


def test_both_ends_finish():
    opened = ((SYN_ACK, False), (ACK, True))
    assert states(*opened, (FIN, True), (FIN, False)) is State.TIME_WAIT
    assert states(*opened, (FIN, False), (DATA, True), (FIN, True)) is State.TIME_WAIT


def test_a_closed_connection_is_reopened_by_its_opener_a_finished_one_by_either():
    assert may_reopen(State.CLOSED, forward=True)
    assert not may_reopen(State.CLOSED, forward=False)
    assert may_reopen(State.TIME_WAIT, forward=False)
    assert not may_reopen(State.ESTABLISHED, forward=True)


# -- any traffic -----------------------------------------------------------------------------------------

INSIDE = st.tuples(st.sampled_from(["192.168.1.2", "192.168.1.3"]), st.integers(5000, 5003))
PEERS = st.tuples(st.sampled_from(["11.0.0.1", "11.0.0.2"]), st.integers(80, 82))
KIND = st.builds(
    NatKind,
    mapping=st.sampled_from(Mapping),
    ports=st.sampled_from(Ports),
    rejects=st.booleans(),
    idle_s=st.just(50.0),
    keep_s=st.sampled_from([10.0, 100.0]),
)
SEGMENTS = st.sampled_from([SYN, SYN_ACK, ACK, DATA, FIN, RST])
TRAFFIC = st.lists(
    st.tuples(st.booleans(), INSIDE, PEERS, SEGMENTS, st.floats(0.0, 60.0)), min_size=1, max_size=60
)


@given(KIND, TRAFFIC)
def test_for_any_traffic_ports_outside_belong_to_one_and_answers_find_back(kind, traffic):
    """`seen` is what the world outside knows: by which address whom it hears from, and when last."""
    nat = box(kind)
    now = 0.0
    seen = {}
    for outward, inside, peer, segment, pause in traffic:
        now += pause
        if outward:
            source = out(nat, source=inside, target=peer, kind=segment, now=now)
            if source is None:
                continue
            assert source[0] == IP
            owners = {who for (addr, _), (who, at) in seen.items() if addr == source and now - at < 10.0}
            assert owners <= {inside}, "two machines inside share a port outside"
            if kind.mapping is Mapping.ENDPOINT:
                others = {
                    addr for (addr, _), (who, at) in seen.items() if who == inside and now - at < kind.keep_s
                }
                assert others <= {source}, "one port inside has two outside"
            seen[source, peer] = (inside, now)
            assert nat.outside_of(inside, peer, now) == source
        else:
            for (addr, known), (who, at) in list(seen.items()):
                if known != peer:
                    continue
                got = come_in(nat, peer, addr, segment, now)
                assert got in (who, None, "reset") or now - at >= 10.0


@given(TRAFFIC)
def test_strangers_never_get_through_a_port_restricted_box(traffic):
    nat = box(replace(PORT_RESTRICTED, keep_s=1e6))
    now = 0.0
    written = set()
    for outward, inside, peer, segment, pause in traffic:
        now += pause
        if outward:
            source = out(nat, source=inside, target=peer, kind=segment, now=now)
            if source is not None:
                written.add((source, peer))
        else:
            for port in range(5000, 5008):
                got = come_in(nat, peer, (IP, port), segment, now)
                assert got is None or ((IP, port), peer) in written
