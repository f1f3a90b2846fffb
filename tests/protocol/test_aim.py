"""Which of a peer's addresses are dialled: never this machine, nor the LAN unless the peer is in it."""

from __future__ import annotations

from ipaddress import ip_address

from hypothesis import given
from hypothesis import strategies as st

from mycel.protocol.address import endpoint_of
from mycel.protocol.aim import SYMMETRIC, take_aim
from mycel.protocol.punch import Offer

HOME = ("192.168.1.2", "127.0.0.1")


def offer(mapped=(), near=(), public=(), symmetric=False):
    """Addresses as `IP:PORT`."""

    def addrs(texts):
        return tuple(_addr(text) for text in texts)

    return Offer(bytes(32), addrs(mapped), symmetric, addrs(near), addrs(public))


def _addr(text):
    host, _, port = text.rpartition(":")
    return f"/ip{6 if ':' in host else 4}/{host}/tcp/{port}"


def aim(own, theirs, own_ips=HOME, most=8):
    return take_aim(own, theirs, own_ips, most)


def test_strangers_homes_meet_at_their_public_addresses_only():
    own = offer(["11.0.0.1:1"], ["192.168.1.2:1"])
    theirs = offer(["11.0.0.2:2"], ["192.168.7.9:2", "10.0.0.3:2"])
    assert aim(own, theirs).punch == ("/ip4/11.0.0.2/tcp/2",)


def test_behind_one_nat_the_lan_comes_first_and_the_hairpin_too():
    own = offer(["11.0.0.1:1"], ["192.168.1.2:1"])
    theirs = offer(["11.0.0.1:2"], ["192.168.7.9:2"])
    assert aim(own, theirs).punch == ("/ip4/192.168.7.9/tcp/2", "/ip4/11.0.0.1/tcp/2")


def test_an_address_of_ones_own_subnet_is_in_the_lan_whatever_the_nat():
    own = offer(["11.0.0.1:1"])
    assert aim(own, offer([], ["192.168.1.77:2"])).punch == ("/ip4/192.168.1.77/tcp/2",)
    assert aim(own, offer([], ["192.168.1.2:2"])).punch == (), "this machine's own address"


def test_a_peer_that_lies_cannot_make_this_node_dial_itself_or_its_lan():
    own = offer(["11.0.0.1:1"], ["192.168.1.2:1"])
    lies = ["127.0.0.1:22", "192.168.0.1:80", "10.0.0.1:80", "169.254.169.254:80", "0.0.0.0:1", "224.0.0.1:1"]
    lies += ["100.64.0.1:1", "::1:22", "fe80::1:22", "::ffff:127.0.0.1:22", "fd00::1:22"]
    found = aim(own, offer(lies, lies, lies))
    assert found.punch == found.public == ()
    assert "no address that this node may dial" in found.obstacle


def test_a_mesh_inside_a_private_network_meets_at_private_addresses():
    inside = aim(offer(["10.1.0.5:1"]), offer(["10.2.0.9:2"]))
    assert inside.punch == ("/ip4/10.2.0.9/tcp/2",)
    assert aim(offer(["10.1.0.5:1"]), offer(["127.0.0.1:2"])).punch == ()
    assert aim(offer(["127.0.0.1:1"]), offer(["127.0.0.1:2"])).punch == ("/ip4/127.0.0.1/tcp/2",)


def test_two_symmetric_nats_have_nothing_to_aim_at_but_the_lan_and_ipv6():
    own, theirs = offer(["11.0.0.1:1"], symmetric=True), offer(["11.0.0.2:2"], symmetric=True)
    assert aim(own, theirs).obstacle == SYMMETRIC
    lan = offer(["11.0.0.1:2"], ["192.168.1.9:2"], symmetric=True)
    assert aim(own, lan).punch == ("/ip4/192.168.1.9/tcp/2",)
    both = [offer(["11.0.0.1:1", f"2a0a:ffff::{n}:{n}"], symmetric=True) for n in (1, 2)]
    assert aim(*both).punch == ("/ip6/2a0a:ffff::2/tcp/2",)
    assert aim(own, both[1]).obstacle == SYMMETRIC, "IPv6 needs both"


def test_names_ports_of_nought_and_nonsense_are_left_out():
    theirs = Offer(
        bytes(32),
        ("/dns4/a.example/tcp/1", "/ip4/11.0.0.2/tcp/0", "/ip4/11.0.0.2/udp/1", "x", "/ip4/11.0.0.2/tcp/3"),
    )
    assert aim(offer(["11.0.0.1:1"]), theirs).punch == ("/ip4/11.0.0.2/tcp/3",)


_ip = st.one_of(st.ip_addresses(), st.sampled_from([ip_address("192.168.1.9"), ip_address("127.0.0.1")]))
_texts = st.lists(st.tuples(_ip, st.integers(0, 65535)).map(lambda at: f"{at[0]}:{at[1]}"), max_size=8)
_offers = st.builds(offer, _texts, _texts, _texts, st.booleans())


@given(_offers, _offers, st.integers(1, 8))
def test_what_is_aimed_at_was_offered_and_is_never_this_machine(own, theirs, most):
    own_inside = any(not ip_address(endpoint_of(addr).host).is_global for addr in own.mapped)
    found = aim(own, theirs, most=most)
    for chosen, offered in ((found.public, theirs.public), (found.punch, theirs.near + theirs.mapped)):
        assert len(chosen) <= most
        for addr in chosen:
            ip = ip_address(endpoint_of(addr).host)
            assert addr in offered
            assert not any((ip.is_multicast, ip.is_unspecified, ip.is_link_local))
            assert own_inside or not ip.is_loopback
    assert bool(found.obstacle) == (not found.punch)
