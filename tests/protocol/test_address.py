"""Relayed addresses: their parts, and what is none."""

from __future__ import annotations

import pytest

from mycel.protocol.address import circuit_of, is_circuit, peer_of
from mycel.protocol.errors import AddressError

RELAY = "12D3KooWD3eckifWpRn9wQpMG9R9hX3sD158z7EqHWmweQAJU5SA"
PEER = "12D3KooWGC6TvWhfapngX6wvJHMYvKpDMXPb3ZnCZ6dMoaMtimQ5"
AT = f"/ip4/11.0.0.1/tcp/4001/p2p/{RELAY}"


def test_a_relayed_address_names_the_relay_and_the_peer():
    circuit = circuit_of(f"{AT}/p2p-circuit/p2p/{PEER}")
    assert (str(circuit.relay), circuit.relay_peer, circuit.peer) == (AT, RELAY, PEER)


def test_a_relays_own_listener_address_names_no_peer():
    assert circuit_of(f"{AT}/p2p-circuit").peer is None


@pytest.mark.parametrize(
    "addr",
    [AT, "/p2p-circuit", f"/ip4/11.0.0.1/tcp/4001/p2p-circuit/p2p/{PEER}",
     f"{AT}/p2p-circuit/p2p/{RELAY}/p2p-circuit/p2p/{PEER}", f"{AT}/p2p-circuit/tcp/1"],
)  # fmt: skip
def test_other_addresses_are_no_relayed_ones(addr):
    with pytest.raises(AddressError, match=r"not a relayed address|not a multiaddr|not a TCP address"):
        circuit_of(addr)


def test_the_peer_of_an_address_is_the_one_at_its_far_end():
    assert peer_of(AT) == RELAY
    assert peer_of(f"{AT}/p2p-circuit/p2p/{PEER}") == PEER
    assert peer_of("/ip4/11.0.0.1/tcp/4001") is None
    assert is_circuit(f"{AT}/p2p-circuit")
    assert not is_circuit(AT)
