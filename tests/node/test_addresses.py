"""Which private addresses are near."""

from __future__ import annotations

import pytest

from mycel.node.addresses import shares_network


@pytest.mark.parametrize(
    ("ip", "own", "near"),
    [
        ("192.168.1.9", ["192.168.1.2"], True),
        ("192.168.2.9", ["192.168.1.2"], False),
        ("10.1.200.9", ["10.1.0.2"], True),
        ("10.2.0.9", ["10.1.0.2"], False),
        ("172.16.9.9", ["10.0.0.1", "172.16.0.1"], True),
        ("100.127.0.1", ["100.64.0.1"], True),
        ("10.1.0.9", ["fd00::1"], False),
        ("fd00::9", ["fd00::1"], True),
        ("fd00:0:0:1::9", ["fd00::1"], False),
        ("127.0.0.1", ["192.168.1.2"], False),
        ("127.0.0.2", ["127.0.0.1"], True),
        ("10.0.0.1", [], False),
    ],
)
def test_what_is_near_goes_by_the_usual_sizes_of_networks(ip, own, near):
    assert shares_network(ip, own) is near
