"""Which of several links to one peer stays: the same one for both ends, and a direct one before a relayed."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from mycel.node.peering import choose
from mycel.protocol.mesh import PeerId

A, B = PeerId("12D3KooWA"), PeerId("12D3KooWB")


@dataclass(frozen=True)
class Made:
    dialer: bool
    since: float
    is_relayed: bool


links = st.lists(st.builds(Made, st.booleans(), st.floats(0, 9), st.booleans()), min_size=1, max_size=5).map(
    lambda found: sorted(found, key=lambda link: link.since)
)


@given(links)
def test_both_ends_keep_the_same_link(found):
    mirrored = [Made(not link.dialer, link.since, link.is_relayed) for link in found]
    assert choose(found, A, B) == choose(mirrored, B, A)


@given(links)
def test_a_direct_link_stays_before_any_relayed_one(found):
    kept = found[choose(found, A, B)]
    assert kept.is_relayed == all(link.is_relayed for link in found)
