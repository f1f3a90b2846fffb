"""What is heard on the local network: only this swarm's peers, only at addresses of this network."""

from __future__ import annotations

from ipaddress import ip_network

from hypothesis import given
from hypothesis import strategies as st

from mycel.node.reach.lan import own_subnets, read_service, swarm_tag

PEER = "12D3KooWD3eckifWpRn9wQpMG9R9hX3sD158z7EqHWmweQAJU5SA"
TAG = swarm_tag("a swarm")
HOME = [ip_network("192.168.1.0/24"), ip_network("fd00:1::/64")]
SAID = {b"id": PEER.encode(), b"swarm": TAG.encode()}


def test_a_peer_of_this_swarm_is_told_with_its_near_addresses():
    ips = ["11.0.0.1", "192.168.1.7", "fd00:1::7"]
    assert read_service(SAID, ips, 4001, TAG, HOME) == (
        PEER,
        [f"/ip4/192.168.1.7/tcp/4001/p2p/{PEER}", f"/ip6/fd00:1::7/tcp/4001/p2p/{PEER}"],
    )


def test_another_swarms_peer_is_passed_over():
    assert read_service({**SAID, b"swarm": b"another"}, ["192.168.1.7"], 4001, TAG, HOME) is None


def test_an_address_elsewhere_aims_this_node_at_nobody():
    assert read_service(SAID, ["11.0.0.1", "192.168.2.7", "127.0.0.1"], 4001, TAG, HOME) is None


@given(
    st.dictionaries(st.sampled_from([b"id", b"swarm", b"x"]), st.none() | st.binary(max_size=80)),
    st.lists(st.ip_addresses().map(str), max_size=4),
    st.integers(-1, 70000),
)
def test_whatever_is_heard_it_is_taken_or_passed_over(properties, ips, port):
    found = read_service({**SAID, **properties}, ips, port, TAG, HOME)
    assert found is None or all(addr.endswith(found[0]) for addr in found[1])


def test_the_tag_does_not_show_the_swarm():
    assert len(TAG) == 16
    assert swarm_tag("another swarm") != TAG
    assert "a swarm" not in TAG


def test_loopback_is_no_local_network():
    assert not any(subnet.is_loopback for subnet in own_subnets())
