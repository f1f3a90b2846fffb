"""All kinds of NAT with all others in virtual time: everybody is callable, directly where that can be."""

from __future__ import annotations

import pytest


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_every_pair_of_eleven_kinds_gets_through_as_well_as_can_be_for_three_seeds(sim):
    first, second = sim("nat", (1, "--seeds", "2"), (2, "--seed", "1", "--seeds", "2"))
    assert first[1] == second[0]
    for report in [*first, second[1]]:
        assert (report["pairs"], report["call_ok"]) == (66, 66)
        assert (report["direct_ok"], report["direct_possible"]) == (51, 51)
        assert report["direct_impossible"] == 0
        assert report["upgrade_median_s"] <= 0.5
        assert (report["shared_call_ok"], report["shared_direct_ok"]) == (4, 3)
    assert len({report["trace_hash"] for report in [*first, second[1]]}) == 3
