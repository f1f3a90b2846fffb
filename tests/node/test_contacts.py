"""The plan of whom to dial: back-off, forgetting, bounds."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from mycel.node.contacts import ADDR_CHARS_MAX, ADDRS_MAX, CONTACTS_MAX, DIALS_MAX, FAILURES_MAX, Contacts
from mycel.protocol.mesh import PeerId

ME, A, B = PeerId("me"), PeerId("a"), PeerId("b")


def table() -> Contacts:
    return Contacts(ME, redial_s=1.0, redial_max_s=8.0)


def fail(contacts: Contacts, peer: PeerId, now: float, *, refused: bool = False) -> None:
    contacts.on_failed(peer, now, 0.5, "no answer", refused=refused)  # 0.5: in the middle of the spread


def test_a_new_contact_is_dialled_at_once_and_only_once() -> None:
    contacts = table()
    contacts.learn(A, ["/x"], 5.0)
    assert contacts.next_s() == 5.0
    assert [one.peer for one in contacts.plan_dials(5.0)] == [A]
    assert contacts.plan_dials(100.0) == []
    assert contacts.next_s() == math.inf


def test_this_node_is_no_contact_of_its_own() -> None:
    contacts = table()
    contacts.learn(ME, ["/x"], 0.0)
    assert contacts.plan_dials(0.0) == []


def test_a_contact_without_addresses_is_not_dialled() -> None:
    contacts = table()
    contacts.learn(A, [], 0.0)
    assert contacts.plan_dials(0.0) == []
    contacts.learn(A, ["/x"], 0.0)
    assert [one.addrs for one in contacts.plan_dials(0.0)] == [("/x",)]


def test_failures_double_the_wait_up_to_the_longest() -> None:
    contacts = table()
    contacts.learn(A, ["/x"], 0.0, lasting=True)
    now, waits = 0.0, []
    for _ in range(6):
        assert [one.peer for one in contacts.plan_dials(now)] == [A]
        fail(contacts, A, now)
        waits.append(contacts.next_s() - now)
        now = contacts.next_s()
    assert waits == [1.0, 2.0, 4.0, 8.0, 8.0, 8.0]


def test_a_refusal_waits_longest() -> None:
    contacts = table()
    contacts.learn(A, ["/x"], 0.0, lasting=True)
    contacts.plan_dials(0.0)
    fail(contacts, A, 0.0, refused=True)
    assert contacts.next_s() == 8.0
    assert [(one.peer, one.trouble) for one in contacts.troubled()] == [(A, "no answer")]


def test_contacts_are_forgotten_unless_lasting() -> None:
    contacts = table()
    contacts.learn(A, ["/x"], 0.0)
    contacts.learn(B, ["/y"], 0.0, lasting=True)
    now = 0.0
    for _ in range(FAILURES_MAX):
        for contact in contacts.plan_dials(now):
            fail(contacts, contact.peer, now)
        now += 100
    assert [one.peer for one in contacts.plan_dials(now)] == [B]


def test_a_lost_peer_is_dialled_again_soon_and_its_trouble_ends_with_the_connection() -> None:
    contacts = table()
    contacts.learn(A, ["/x"], 0.0)
    contacts.plan_dials(0.0)
    fail(contacts, A, 0.0)
    contacts.on_up(A)
    assert contacts.troubled() == []
    assert [one.peer for one in contacts.told()] == [A]
    contacts.on_down(A, 50.0)
    assert contacts.told() == []
    assert contacts.next_s() == 51.0


def test_newer_addresses_come_first_and_are_bounded() -> None:
    contacts = table()
    contacts.learn(A, [f"/{i}" for i in range(ADDRS_MAX)], 0.0)
    contacts.learn(A, ["/new", "/3"], 0.0)
    (contact,) = contacts.plan_dials(0.0)
    assert contact.addrs[:3] == ("/new", "/3", "/0")
    assert len(contact.addrs) == ADDRS_MAX


def test_dials_at_once_and_contacts_are_bounded() -> None:
    contacts = table()
    for number in range(CONTACTS_MAX + 50):
        contacts.learn(PeerId(f"p{number}"), ["/x"], 0.0)
    assert len(contacts.plan_dials(0.0)) == DIALS_MAX
    assert contacts.plan_dials(0.0) == []
    fail(contacts, PeerId("p0"), 0.0)
    assert len(contacts.plan_dials(0.0)) == 1


def test_a_full_table_makes_room_but_not_of_lasting_contacts() -> None:
    contacts = table()
    for number in range(CONTACTS_MAX):
        contacts.learn(PeerId(f"p{number}"), ["/x"], 0.0, lasting=True)
    contacts.learn(A, ["/x"], -1.0)
    assert A not in [one.peer for one in contacts.plan_dials(0.0)]


peers = st.sampled_from([PeerId(name) for name in "abcdef"])
events = st.one_of(
    st.tuples(st.just("learn"), peers, st.booleans()),
    st.tuples(st.just("up"), peers, st.none()),
    st.tuples(st.just("down"), peers, st.none()),
    st.tuples(st.just("fail"), peers, st.booleans()),
    st.tuples(st.just("dial"), st.none(), st.none()),
)


@given(st.lists(st.tuples(events, st.floats(0, 10)), max_size=60))
def test_whatever_happens_no_connected_or_dialled_peer_is_dialled_again(
    steps: list[tuple[tuple[str, PeerId, bool], float]],
) -> None:
    contacts, now = table(), 0.0
    connected: dict[str, None] = {}
    dialling: dict[str, None] = {}
    known: dict[str, None] = {}
    for (kind, peer, flag), passed in steps:
        now += passed
        if kind == "learn":
            contacts.learn(peer, ["/x"], now, lasting=flag)
            known[peer] = None
        elif kind == "up" and peer in known:
            contacts.learn(peer, ["/x"], now)
            contacts.on_up(peer)
            connected[peer] = None
            dialling.pop(peer, None)
        elif kind == "down" and peer in connected:
            contacts.on_down(peer, now)
            connected.pop(peer)
        elif kind == "fail" and peer in dialling:
            fail(contacts, peer, now, refused=flag)
            dialling.pop(peer)
        elif kind == "dial":
            for contact in contacts.plan_dials(now):
                assert contact.peer not in connected
                assert contact.peer not in dialling
                assert contact.due_s <= now
                dialling[contact.peer] = None
    assert all(one.peer in connected for one in contacts.told())


def test_who_left_in_order_is_not_dialled_until_it_is_heard_of_later() -> None:
    contacts = table()
    contacts.learn(A, ["/x"], 0.0)
    contacts.on_up(A)
    contacts.on_down(A, 10.0, left=True)
    assert contacts.plan_dials(1000.0) == []
    assert contacts.next_s() == math.inf
    contacts.learn(A, ["/x"], 12.0)  # by somebody who does not know yet
    assert contacts.plan_dials(1000.0) == []
    contacts.learn(A, ["/x"], 30.0)
    assert [one.peer for one in contacts.plan_dials(30.0)] == [A]


def test_who_left_and_came_back_is_dialled_again_after_a_crash() -> None:
    contacts = table()
    contacts.learn(A, ["/x"], 0.0)
    contacts.on_up(A)
    contacts.on_down(A, 10.0, left=True)
    contacts.on_up(A)
    contacts.on_down(A, 20.0)
    assert [one.peer for one in contacts.plan_dials(21.0)] == [A]


def test_a_lasting_contact_is_dialled_also_after_its_goodbye() -> None:
    contacts = table()
    contacts.learn(A, ["/x"], 0.0, lasting=True)
    contacts.on_up(A)
    contacts.on_down(A, 10.0, left=True)
    assert [one.peer for one in contacts.plan_dials(11.0)] == [A]


def test_contacts_that_left_make_room_first() -> None:
    contacts = table()
    contacts.learn(B, ["/x"], 0.0)
    contacts.on_up(B)
    contacts.on_down(B, 0.0, left=True)
    for number in range(CONTACTS_MAX - 1):
        contacts.learn(PeerId(f"p{number}"), ["/x"], 0.0)
    contacts.learn(A, ["/x"], 0.0)
    for now in range(1000):
        for one in contacts.plan_dials(float(now)):
            assert one.peer != B
            contacts.on_up(one.peer)
    assert len(contacts.told()) == CONTACTS_MAX


def test_a_connected_peers_own_word_replaces_what_others_said() -> None:
    contacts = table()
    contacts.learn(A, ["/old", "/older"], 0.0)
    contacts.on_up(A)
    contacts.state(A, ["/relayed", "/direct"])
    contacts.learn(A, ["/old"], 1.0)
    (contact,) = contacts.told()
    assert contact.addrs == contact.current == ("/relayed", "/direct")
    contacts.state(A, ["/direct"])
    assert contacts.told()[0].addrs == ("/direct",)
    contacts.on_down(A, 2.0)
    contacts.learn(A, ["/new"], 3.0)
    assert [one.addrs for one in contacts.plan_dials(9.0)] == [("/new", "/direct")]


def test_addresses_that_were_given_stay_but_are_not_told_to_others() -> None:
    contacts = table()
    contacts.learn(A, ["/ticket"], 0.0, lasting=True)
    contacts.on_up(A)
    contacts.state(A, [f"/{i}" for i in range(2 * ADDRS_MAX)])
    (contact,) = contacts.told()
    assert contact.current == tuple(f"/{i}" for i in range(ADDRS_MAX))
    assert contact.addrs == (*(f"/{i}" for i in range(ADDRS_MAX - 1)), "/ticket")
    contacts.on_down(A, 1.0)
    contacts.learn(A, [f"/new{i}" for i in range(ADDRS_MAX)], 1.0)
    assert contacts.idle()[0].addrs[-1] == "/ticket"


def test_a_new_address_is_tried_at_once_whatever_failed_before() -> None:
    contacts = table()
    contacts.learn(A, ["/x"], 0.0)
    for _ in range(3):
        contacts.plan_dials(contacts.next_s())
        fail(contacts, A, 10.0)
    assert contacts.next_s() > 10.0
    contacts.learn(A, ["/x"], 10.5)
    assert contacts.next_s() > 10.5
    contacts.learn(A, ["/y"], 10.5)
    assert contacts.next_s() == 10.5


def test_a_new_address_does_not_soften_a_refusal() -> None:
    contacts = table()
    contacts.learn(A, ["/x"], 0.0)
    contacts.plan_dials(0.0)
    fail(contacts, A, 0.0, refused=True)
    contacts.learn(A, ["/y"], 1.0)
    assert contacts.next_s() == 8.0


def test_a_contact_on_hold_waits_and_is_then_dialled() -> None:
    contacts = table()
    contacts.learn(A, ["/x"], 0.0)
    contacts.hold(A, 3.0)
    contacts.learn(A, ["/y"], 1.0)
    assert contacts.plan_dials(2.9) == []
    assert contacts.next_s() == 3.0
    assert [one.peer for one in contacts.plan_dials(3.0)] == [A]


def test_endless_addresses_are_left_out() -> None:
    contacts = table()
    contacts.learn(A, ["/" + "x" * ADDR_CHARS_MAX, "/y"], 0.0)
    contacts.on_up(A)
    assert contacts.told()[0].addrs == ("/y",)
    contacts.state(A, ["/" + "x" * ADDR_CHARS_MAX])
    assert contacts.told()[0].current == ("/y",)
