"""Kademlia among nodes that come and go."""

from __future__ import annotations

from functools import partial

from mycel.protocol.limits import KadLimits
from mycel.simnet import clock
from mycel.simnet.lookups import LookupsOptions, Reads, restless


def test_records_stay_readable_while_nodes_come_and_go():
    options = LookupsOptions(
        seed=2,
        records=6,
        reads=60,
        churn_s=600,
        churn_nodes=14,
        session_s=240,
        limits=KadLimits(bucket=8, quorum=5, republish_s=120, check_s=60),
    )
    reads, deaths = clock.run(partial(restless, options), 2)
    assert deaths > 10
    assert reads.tried > 50
    assert reads.success >= 0.99


def test_success_is_a_share_of_what_was_tried():
    assert Reads(tried=4, found=3).success == 0.75
    assert Reads().success != Reads().success, "of nothing there is no share"
