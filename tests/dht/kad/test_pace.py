"""How long a question may take follows what was measured."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mycel.dht.kad.pace import Pace
from mycel.protocol.limits import KadLimits
from mycel.protocol.mesh import PeerId

LIMITS = KadLimits(known_paces=4)
PEER = PeerId("peer")


def test_a_steady_peer_is_late_soon_after_its_own_time():
    pace = Pace(LIMITS)
    for _ in range(50):
        pace.answered(PEER, 0.1, dialled=False)
    assert pace.late_s(PEER, rtt=None, dial=False) == pytest.approx(0.1, rel=0.05)


def test_a_peer_not_asked_before_is_judged_by_its_connection_or_by_the_others():
    pace = Pace(LIMITS)
    assert pace.late_s(PEER, rtt=0.2, dial=False) == pytest.approx(0.3)
    for _ in range(50):
        pace.answered(PeerId("other"), 0.1, dialled=False)
    assert pace.late_s(PEER, rtt=None, dial=False) == pytest.approx(0.1, rel=0.05)


def test_dials_are_a_series_of_their_own():
    pace = Pace(LIMITS)
    for _ in range(50):
        pace.answered(PEER, 0.1, dialled=False)
        pace.answered(PEER, 0.5, dialled=True)
    assert pace.late_s(PEER, rtt=None, dial=True) == pytest.approx(0.5, rel=0.05)
    assert pace.late_s(PEER, rtt=None, dial=False) == pytest.approx(0.1, rel=0.05)


@given(st.lists(st.floats(0, 1e6), max_size=30), st.booleans(), st.none() | st.floats(0, 1e6))
def test_every_time_is_within_its_bounds(seconds, dial, rtt):
    pace = Pace(LIMITS)
    for one in seconds:
        pace.answered(PEER, one, dialled=dial)
    late, answer = (ask(PEER, rtt=rtt, dial=dial) for ask in (pace.late_s, pace.answer_s))
    assert LIMITS.late_s_min <= late <= LIMITS.late_s_max
    assert LIMITS.answer_s_min <= answer <= LIMITS.answer_s_max
    assert answer >= late


def test_the_peer_that_was_not_asked_the_longest_is_forgotten():
    pace = Pace(LIMITS)
    for number in range(5):
        pace.answered(PeerId(f"p{number}"), 0.001, dialled=False)
    assert pace.late_s(PeerId("p0"), rtt=1.0, dial=False) == 1.5
    assert pace.late_s(PeerId("p1"), rtt=1.0, dial=False) == LIMITS.late_s_min
