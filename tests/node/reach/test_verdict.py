"""What follows from evidence: each verdict, who is believed, and what makes it void."""

from __future__ import annotations

from multiaddr import Multiaddr

from mycel.node.reach.verdict import CALLERS_MAX, Judge, Kind
from mycel.protocol.address import tcp_addr
from mycel.protocol.echo import Mapped
from mycel.protocol.mesh import PeerId

A, B, C, D = (PeerId(name) for name in ("anna", "bert", "cora", "dirk"))
PLACE = {A: "11.0.1.1", B: "11.0.1.2", C: "11.0.1.3", D: "11.0.1.3"}
OUT, OTHER, HOME = "11.0.0.1", "11.9.9.9", "192.168.1.2"


def judge(*ips: str) -> Judge:
    one = Judge()
    one.here([tcp_addr(ip, 4001) for ip in ips])
    return one


def mapped(first: int, second: int | None = None, ip: str = OUT) -> Mapped:
    return Mapped(tcp_addr(ip, first), tcp_addr(ip, second or first))


def words(one: Judge) -> str:
    return "; ".join(one.verdict().evidence)


def test_with_nobody_outside_in_sight_there_is_nothing_to_judge():
    verdict = judge(HOME).verdict()
    assert verdict.kind is Kind.LOCAL
    assert verdict.addrs == ()


def test_somebody_outside_who_says_nothing_yet_leaves_it_open():
    one = judge(HOME)
    one.reported({A: ""})
    assert one.is_outside
    assert one.verdict().kind is Kind.UNKNOWN


def test_a_call_from_a_stranger_address_proves_a_public_node():
    one = judge(OUT, HOME)
    one.reported({A: OUT})
    assert one.verdict().kind is Kind.UNKNOWN
    one.called(B, "11.0.0.7")
    verdict = one.verdict()
    assert verdict.kind is Kind.PUBLIC
    assert verdict.addrs == (tcp_addr(OUT, 4001),)
    assert verdict.ip == OUT
    assert "bert connected from 11.0.0.7, which this node had never contacted" in words(one)
    assert "it has that address itself" in words(one)


def test_a_call_alone_makes_no_address_behind_a_nat():
    """Somebody came through, but which address leads here is not known: others cannot be told."""
    one = judge(HOME)
    one.reported({A: OUT})
    one.called(B, "11.0.0.7")
    assert one.verdict().kind is not Kind.PUBLIC


def test_a_forwarded_port_is_public_once_called_and_knocked_at():
    one = judge(HOME)
    one.reported({A: OUT})
    at = tcp_addr(OUT, 4800)
    one.knocked(A, PLACE[A], [at], str(at), "")
    assert one.verdict().kind is Kind.UNKNOWN
    one.called(B, "11.0.0.7")
    verdict = one.verdict()
    assert verdict.kind is Kind.PUBLIC
    assert verdict.addrs == (at,)
    assert "stands behind a NAT" in words(one)


def test_two_members_that_get_through_from_different_addresses_are_proof_too():
    at = tcp_addr(OUT, 4001)
    for one in (judge(OUT), judge(HOME)):
        one.reported({A: OUT})
        for peer, kind in ((C, Kind.UNKNOWN), (D, Kind.UNKNOWN), (C, Kind.UNKNOWN)):
            one.knocked(peer, PLACE[peer], [at], str(at), "")
            assert one.verdict().kind is kind  # one house is one voice
    one = judge(HOME)
    one.reported({A: OUT})
    one.knocked(A, PLACE[A], [at], str(at), "")
    one.knocked(C, PLACE[C], [at], str(at), "")
    assert one.verdict().kind is Kind.PUBLIC
    assert one.verdict().addrs == (at,)
    assert "/ip4/11.0.0.1/tcp/4001 answered anna, who dialled it from a fresh port" in words(one)
    for peer in (A, C):
        one.knocked(peer, PLACE[peer], [at], "", "no answer")
    assert one.verdict().kind is Kind.UNKNOWN


def test_a_knock_proves_only_the_addresses_that_were_asked_for():
    one = judge(HOME)
    one.reported({A: OUT})
    one.knocked(A, PLACE[A], [tcp_addr(OUT, 4800)], f"/ip4/{OTHER}/tcp/1", "")
    assert one.public_addrs() == []


def test_equal_ports_are_punchable_and_different_ones_symmetric():
    for seen, kind in ((mapped(5000), Kind.PUNCHABLE), (mapped(5000, 5001), Kind.SYMMETRIC)):
        one = judge(HOME)
        one.reported({A: OUT})
        one.echoed(A, seen)
        assert one.verdict().kind is kind
        assert "two ports of anna see it at /ip4/11.0.0.1/tcp/5000" in words(one)


def test_a_port_that_differs_from_server_to_server_is_symmetric_too():
    one = judge(HOME)
    one.echoed(A, mapped(5000))
    one.reported({A: OUT})
    one.echoed(B, mapped(6000))
    assert one.verdict().kind is Kind.SYMMETRIC


def test_echoes_that_all_fail_leave_the_relays():
    one = judge(HOME)
    one.reported({A: OUT})
    one.echo_failed(A, "its ports are filtered")
    assert one.verdict().kind is Kind.RELAY_ONLY
    assert "no echo: its ports are filtered" in words(one)
    one.echoed(A, mapped(5000))
    assert one.verdict().kind is Kind.PUNCHABLE
    one.echo_failed(A, "later")
    assert one.verdict().kind is Kind.PUNCHABLE


def test_one_lying_echo_is_outvoted_by_two():
    one = judge(HOME)
    one.reported({A: OUT, B: OUT, C: OUT})
    one.echoed(A, mapped(5000))
    one.echoed(B, mapped(5000))
    one.echoed(C, mapped(666, ip=OTHER))
    verdict = one.verdict()
    assert verdict.kind is Kind.PUNCHABLE
    assert verdict.ip == OUT
    assert "cora says otherwise and is outvoted" in verdict.evidence


def test_one_echo_that_lies_about_the_port_is_outvoted_by_two():
    one = judge(HOME)
    one.reported({A: OUT, B: OUT, C: OUT})
    for server in (A, B):
        one.echoed(server, mapped(5000))
    one.echoed(C, mapped(666, 667))
    assert one.verdict().kind is Kind.PUNCHABLE


def test_two_that_contradict_each_other_decide_nothing_and_say_so():
    one = judge(HOME)
    one.reported({A: OUT, B: OTHER})
    verdict = one.verdict()
    assert verdict.kind is Kind.RELAY_ONLY
    assert verdict.ip == ""
    assert "peers do not agree" in words(one)
    assert "a third public member would decide" in words(one)
    one.reported({A: OUT, B: OTHER, C: OUT})
    assert one.verdict().ip == OUT


def test_no_peer_talks_a_node_out_of_an_address_that_it_has():
    one = judge(OUT)
    one.reported({A: OUT})
    one.called(B, "11.0.0.7")
    assert not one.reported({A: OTHER})
    assert not one.reported({A: OTHER, C: OTHER})
    assert one.is_proven


def test_new_listening_addresses_void_everything():
    one = judge(OUT)
    one.reported({A: OUT})
    one.called(B, "11.0.0.7")
    assert one.here([tcp_addr("11.0.0.2", 4001)])
    assert one.epoch == 1
    assert one.verdict().kind is Kind.LOCAL
    assert not one.here([tcp_addr("11.0.0.2", 4001)])


def test_private_addresses_and_those_within_one_ipv6_network_come_and_go():
    one = judge(OUT, HOME, "2a0a:1::5")
    one.reported({A: OUT})
    one.called(B, "11.0.0.7")
    for ips in (
        (OUT, HOME, "172.17.0.1", "2a0a:1::5"),
        (OUT, "2a0a:1::99"),
        (OUT, HOME, "2a0a:1::5", "2a0a:1::6"),
    ):
        assert not one.here([tcp_addr(ip, 4001) for ip in ips])
    assert one.verdict().kind is Kind.PUBLIC
    assert one.here([tcp_addr(ip, 4001) for ip in (OUT, "2a0a:1:0:1::5")])


def test_the_first_addresses_are_no_change():
    assert not Judge().here([tcp_addr(OUT, 1)])


def test_another_address_by_majority_voids_everything():
    one = judge(HOME)
    one.reported({A: OUT, B: OUT})
    one.echoed(A, mapped(5000))
    assert not one.reported({A: OTHER, B: OUT})
    assert one.reported({A: OTHER, B: OTHER})
    assert one.epoch == 1
    verdict = one.verdict()
    assert verdict.kind is Kind.UNKNOWN
    assert verdict.ip == OTHER


def test_peers_that_go_take_nothing_back():
    one = judge(HOME)
    one.reported({A: OUT})
    one.echoed(A, mapped(5000))
    assert not one.reported({})
    assert one.verdict().kind is Kind.PUNCHABLE


def test_a_proof_falls_when_two_knock_in_vain_and_not_by_one():
    one = judge(OUT)
    one.reported({A: OUT})
    one.called(B, "11.0.0.7")
    at = [tcp_addr(OUT, 4001)]
    one.knocked(A, PLACE[A], at, "", "no answer")
    one.knocked(A, PLACE[A], at, "", "no answer")
    assert one.doubts == 1
    assert one.verdict().kind is Kind.PUBLIC
    assert "anna could not reach it any more; another one is asked" in words(one)
    one.knocked(C, PLACE[C], at, "", "no answer")
    assert one.verdict().kind is Kind.UNKNOWN
    assert "/ip4/11.0.0.1/tcp/4001 did not answer cora: no answer" in words(one)
    one.called(D, "11.0.0.8")
    assert one.verdict().kind is Kind.PUBLIC


def test_a_knock_that_is_answered_ends_the_doubt():
    one = judge(OUT)
    one.reported({A: OUT})
    one.called(B, "11.0.0.7")
    at = tcp_addr(OUT, 4001)
    one.knocked(A, PLACE[A], [at], "", "no answer")
    one.knocked(C, PLACE[C], [at], str(at), "")
    assert one.doubts == 0
    one.knocked(A, PLACE[A], [at], "", "no answer")
    assert one.verdict().kind is Kind.PUBLIC


def test_ipv4_decides_where_both_are_seen():
    six = "2a0a:1::5"
    one = judge(HOME, six)
    one.reported({A: six})
    one.called(B, "2a0a:2::1")
    assert one.verdict().kind is Kind.PUBLIC
    assert one.verdict().addrs == (tcp_addr(six, 4001),)
    one.reported({A: six, C: OUT})
    verdict = one.verdict()
    assert verdict.kind is Kind.UNKNOWN
    assert verdict.ip == OUT
    assert one.is_natted


def test_a_node_that_listens_nowhere_is_relay_only():
    assert judge().verdict().kind is Kind.RELAY_ONLY


def test_what_is_remembered_is_bounded():
    one = judge(OUT)
    for number in range(100):
        one.called(PeerId(f"p{number}"), f"11.1.0.{number}")
    assert len(one._callers) == CALLERS_MAX
    assert len(one.verdict().evidence) < 10


def test_web_addresses_count_by_their_ip():
    one = Judge()
    one.here([Multiaddr(f"/ip4/{OUT}/tcp/443/ws")])
    one.reported({A: OUT})
    one.called(B, "11.0.0.7")
    assert one.verdict().addrs == (Multiaddr(f"/ip4/{OUT}/tcp/443/ws"),)
