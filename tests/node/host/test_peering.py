"""Which of several links to one peer stays: the same one for both ends, and a direct one before a relayed."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from mycel.node.peering import SIMULTANEOUS_S, choose, is_theirs_to_choose
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


@given(links, st.randoms())
def test_of_dials_at_once_the_dialer_alone_gives_up_all_but_one(found, rng):
    dialed = [Made(True, link.since, link.is_relayed) for link in found]
    kept = dialed[choose(dialed, A, B)]
    alike = [link for link in dialed if link.is_relayed == kept.is_relayed]
    assert kept is alike[0]  # the first to open: the one that the dial returned
    # The other end, which may have seen them open in any other order, gives up none of its kind.
    seen = [Made(False, link.since, link.is_relayed) for link in dialed]
    rng.shuffle(seen)
    theirs = seen[choose(seen, B, A)]
    assert all(is_theirs_to_choose(theirs, link) for link in seen if link.is_relayed == theirs.is_relayed)
    assert not any(is_theirs_to_choose(one, other) for one in dialed for other in dialed)


def test_a_peer_that_dials_again_later_has_lost_the_old_link():
    old, new = Made(False, 0.0, True), Made(False, SIMULTANEOUS_S + 1.0, True)
    assert choose([old, new], A, B) == 1
    assert not is_theirs_to_choose(new, old)
