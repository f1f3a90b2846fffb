"""Rounds close with what they need and never with less, whatever fails, is late, or is sent twice."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mycel.compute.train.rounds import Ask, Close, Fail, RoundRules, Rounds, Short
from mycel.protocol.errors import Refused, UsageProblem
from mycel.protocol.mesh import PeerId

CLIENTS = [PeerId(f"client-{letter}") for letter in "abcdefghij"]


def opened(rules: RoundRules, clients: list[PeerId] = CLIENTS) -> tuple[Rounds, list[PeerId]]:
    """Rounds with one begun at time 0, and who was asked."""
    rounds = Rounds("job", 1, rules)
    rounds.on_pool(clients, 0.0)
    return rounds, [act.client for act in rounds.begin(0.0) if isinstance(act, Ask)]


def test_closes_at_once_when_wanted_updates_are_in() -> None:
    rounds, asked = opened(RoundRules(wanted=5, quorum=3, oversample=0.4))
    assert len(asked) == 7
    for client in asked[:4]:
        assert rounds.on_update(client, 1, 1, 1.0) == (1.0, [])
    _, acts = rounds.on_update(asked[4], 1, 1, 1.0)
    assert acts == [Close(1, tuple(sorted(asked[:5])), ())]
    assert rounds.number == 1


def test_asks_others_for_those_who_fail() -> None:
    rounds, asked = opened(RoundRules(wanted=4, quorum=4))
    idle = [client for client in CLIENTS if client not in asked]
    acts = rounds.on_failed(asked[0], 1, "died", 0.1)
    assert len(acts) == 1
    assert isinstance(acts[0], Ask)
    assert acts[0].client in idle


def test_closes_with_a_quorum_when_nobody_is_left_to_wait_for() -> None:
    rounds, asked = opened(RoundRules(quorum=3), CLIENTS[:4])
    for client in asked[:3]:
        rounds.on_update(client, 1, 1, 1.0)
    assert rounds.on_failed(asked[3], 1, "died", 1.1) == [Close(1, tuple(sorted(asked[:3])), ())]


def test_is_short_at_once_and_fails_aloud_after_its_patience() -> None:
    rounds, asked = opened(RoundRules(quorum=3, patience_s=5.0), CLIENTS[:3])
    rounds.on_pool(CLIENTS[:2], 0.5)
    (short,) = rounds.on_failed(CLIENTS[2], 1, "its process was killed", 0.5)
    assert isinstance(short, Short)
    assert "killed" in short.text
    assert rounds.next_at == 5.5
    assert rounds.on_time(5.4) == []
    (failed,) = rounds.on_time(5.5)
    assert isinstance(failed, Fail)
    assert "0 of 3" in failed.text
    assert len(asked) == 3


def test_a_short_round_goes_on_with_who_comes_back() -> None:
    rounds, _ = opened(RoundRules(quorum=3, patience_s=5.0), CLIENTS[:3])
    rounds.on_pool(CLIENTS[:2], 0.5)
    rounds.on_failed(CLIENTS[2], 1, "died", 0.5)
    assert rounds.on_pool(CLIENTS[:3], 1.0) == [Ask(CLIENTS[2], 1)]
    for client in CLIENTS[:2]:
        rounds.on_update(client, 1, 1, 2.0)
    assert isinstance(rounds.on_update(CLIENTS[2], 1, 1, 2.0)[1][0], Close)


def test_the_time_is_up_by_measured_pace() -> None:
    rounds, asked = opened(RoundRules(quorum=2, round_s_min=0.5, slack=3.0), CLIENTS[:3])
    assert rounds.next_at == 600.0
    rounds.on_update(asked[0], 1, 1, 1.0)
    rounds.on_update(asked[1], 1, 1, 2.0)
    assert rounds.next_at == 6.0  # three times what the quorum took
    assert rounds.on_time(5.9) == []
    assert rounds.on_time(6.0) == [Close(1, tuple(sorted(asked[:2])), ())]


def test_a_late_update_counts_discounted_in_the_round_that_is_open() -> None:
    rounds, asked = opened(RoundRules(quorum=1, late_rounds_max=2), CLIENTS[:2])
    rounds.on_update(asked[0], 1, 1, 1.0)
    rounds.on_time(3.0)
    assert rounds.begin(4.0) == [Ask(asked[0], 2)]  # the late one is still at the first
    discount, acts = rounds.on_update(asked[1], 1, 1, 5.0)
    assert discount == pytest.approx(2**-0.5)
    assert acts == []  # it does not count towards the quorum; it may work again
    assert rounds.on_update(asked[0], 2, 1, 6.0)[1] == [Close(2, (asked[0],), (asked[1],))]


def test_too_late_replayed_unasked_and_fenced_updates_are_refused_by_name() -> None:
    rounds, asked = opened(RoundRules(quorum=1, wanted=1, oversample=1.0, late_rounds_max=1), CLIENTS[:2])
    rounds.on_update(asked[0], 1, 1, 1.0)
    for number in (2, 3):
        rounds.begin(1.0)
        rounds.on_update(asked[0], number, 1, 1.0)
    rounds.begin(1.0)
    for client, number, epoch, reason in [
        (asked[0], 3, 1, "replayed"),
        (asked[0], 9, 1, "unasked"),
        (PeerId("stranger"), 4, 1, "unasked"),
        (asked[0], 4, 2, "stale-epoch"),
        (asked[1], 1, 1, "stale"),
    ]:
        with pytest.raises(Refused) as refused:
            rounds.on_update(client, number, epoch, 2.0)
        assert refused.value.reason == reason


def test_the_same_job_round_and_clients_ask_the_same() -> None:
    rules = RoundRules(wanted=4)
    assert opened(rules)[1] == opened(rules, CLIENTS[::-1])[1]
    assert opened(rules)[1] != CLIENTS[:4]


def test_rules_that_cannot_be_kept_are_named() -> None:
    with pytest.raises(UsageProblem, match="wanted = 2"):
        RoundRules(wanted=2, quorum=3).check()


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_no_order_of_events_closes_below_quorum_counts_twice_or_hangs(data: st.DataObject) -> None:
    quorum = data.draw(st.integers(1, 5))
    wanted = data.draw(st.sampled_from([0, quorum, quorum + 2]))
    oversample = data.draw(st.sampled_from([0.0, 0.5]))
    rules = RoundRules(wanted=wanted, quorum=quorum, oversample=oversample, round_s_max=50, patience_s=3.0)
    rounds = Rounds("job", 1, rules)
    now, pool = 0.0, list(CLIENTS[: data.draw(st.integers(1, 8))])
    under_way: list[Ask] = []
    counted: list[tuple[PeerId, int]] = []
    is_open = False
    todo = rounds.on_pool(pool, now)
    for _ in range(40):
        if not is_open:
            is_open, todo = True, rounds.begin(now)
        for act in todo:
            match act:
                case Ask():
                    assert act.client in pool
                    assert act not in under_way
                    under_way.append(act)
                case Close(number=number, counted=closed):
                    assert len(closed) >= quorum
                    assert sorted(closed) == sorted(c for c, n in counted if n == number)
                    is_open = False
                case Fail():
                    return
        if not is_open:
            continue
        now += data.draw(st.floats(0.0, 2.0))
        what = data.draw(st.sampled_from(["update", "fail", "time", "pool"]))
        if what in ("update", "fail") and under_way:
            ask = under_way.pop(data.draw(st.integers(0, len(under_way) - 1)))
            if what == "fail":
                todo = rounds.on_failed(ask.client, ask.number, "died", now)
                continue
            try:
                _, todo = rounds.on_update(ask.client, ask.number, 1, now)
                assert (ask.client, ask.number) not in counted
                counted.append((ask.client, ask.number))
            except Refused:
                todo = []
        elif what == "pool":
            pool = [client for client in CLIENTS if data.draw(st.booleans())]
            todo = rounds.on_pool(pool, now)
        else:
            assert rounds.next_at < float("inf")
            now = max(now, rounds.next_at)
            todo = rounds.on_time(now)
