"""The exchange about a punch: both sides against each other, and against peers that do not keep to it."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mycel.protocol import punch
from mycel.protocol.errors import RemoteProtocolError
from mycel.protocol.limits_reach import PunchLimits
from mycel.protocol.punch import (
    Ask,
    End,
    Exchange,
    Failed,
    Go,
    Learn,
    Offer,
    Over,
    Send,
    Step,
    Try,
    Wait,
    Way,
)

LIMITS = PunchLimits()
SHARES = bytes(32), bytes([1] * 32)
NATED = Offer(SHARES[0], ("/ip4/11.0.0.1/tcp/4001",), near=("/ip4/192.168.1.2/tcp/4001",))
OTHER = Offer(SHARES[1], ("/ip4/11.0.0.2/tcp/4002",), near=("/ip4/192.168.2.2/tcp/4002",))


def two(now=0.0):
    """An asking and an answering side."""
    return [Exchange(asks=asks, own_ips=("192.168.1.2",), now=now, limits=LIMITS) for asks in (True, False)]


def sent(actions):
    return [message for action in actions if isinstance(action, Send) for message in action.messages]


def of(kind, actions):
    return [action for action in actions if isinstance(action, kind)]


def agree(own=NATED, theirs=OTHER, delay=0.05):
    """Up to the first `Go`: (asks, answers, asks' actions, answers' actions, when Go arrived)."""
    asks, answers = two()
    first, learn = asks.begin()
    assert first == Send((Ask(),))
    assert isinstance(learn, Learn)
    assert answers.on_message(Ask(), delay) == [Learn()]
    (offer,) = sent(asks.on_learned(own, 2 * delay))
    assert answers.on_message(offer, 3 * delay, 2 * delay) == []
    leads = answers.on_learned(theirs, 3 * delay, 2 * delay)
    results = [asks.on_message(message, 4 * delay) for message in sent(leads)]
    return asks, answers, [action for actions in results for action in actions], leads, 4 * delay


def test_both_dial_at_the_same_moment_wherever_the_round_trip_goes():
    _, _, asks, leads, arrival = agree(delay=0.04)
    (first,), (second,) = of(Try, asks), of(Try, leads)
    assert first.way is second.way is Way.PUNCH
    assert first.at_s == arrival
    assert second.at_s == pytest.approx(arrival)
    assert first.targets == OTHER.mapped
    assert second.targets == NATED.mapped
    assert first.shares == second.shares == SHARES


def test_the_offers_may_be_ready_in_any_order():
    _, answers = two()
    answers.on_message(Ask(), 0.0)
    assert answers.on_learned(OTHER, 0.1) == []
    leads = answers.on_message(NATED, 0.2)
    assert sent(leads) == [OTHER, Go(Way.PUNCH)]


def test_a_side_that_everybody_reaches_is_dialled_and_nobody_punches():
    public = msgspec.structs.replace(NATED, public=("/ip4/11.0.0.1/tcp/9",))
    _, _, asks, leads, _ = agree(own=public)
    assert [(one.way, one.targets) for one in of(Try, leads)] == [(Way.DIAL, public.public)]
    assert asks == [Wait(Way.DIAL)]
    public = msgspec.structs.replace(OTHER, public=("/ip4/11.0.0.2/tcp/9",))
    _, _, asks, leads, _ = agree(theirs=public)
    assert of(Wait, leads) == [Wait(Way.REVERSE)]
    assert [(one.way, one.targets) for one in of(Try, asks)] == [(Way.REVERSE, public.public)]


def test_a_way_that_fails_is_followed_by_the_next_and_the_last_by_a_reason():
    own = msgspec.structs.replace(NATED, public=("/ip4/11.0.0.1/tcp/9",))
    theirs = msgspec.structs.replace(OTHER, public=("/ip4/11.0.0.2/tcp/9",))
    asks, answers, _, _, now = agree(own, theirs)
    (go,) = sent(answers.on_failed("refused", now))
    assert go == Go(Way.REVERSE)
    (reverse,) = asks.on_message(go, now)
    assert reverse.targets == theirs.public
    (failed,) = sent(asks.on_failed("no answer", now + 2))
    assert isinstance(failed, Failed)
    (go,) = sent(answers.on_message(failed, now + 2))
    assert go == Go(Way.PUNCH)
    assert of(Try, asks.on_message(go, now + 2))
    actions = answers.on_failed("nobody met", now + 5)
    (over,) = sent(actions)
    assert over.reason == of(End, actions)[0].reason == "failed"
    assert "refused" in over.text
    assert asks.on_message(over, now + 5)[0].reason == "failed"
    assert asks.step is answers.step is Step.ENDED


def test_two_symmetric_nats_are_told_apart_at_once():
    own, theirs = (msgspec.structs.replace(offer, symmetric=True) for offer in (NATED, OTHER))
    asks, answers, mine, leads, _ = agree(own, theirs)
    assert of(End, mine)[0].reason == of(End, leads)[0].reason == "impossible"
    assert "choose another port" in of(End, mine)[0].text
    assert asks.step is answers.step is Step.ENDED
    _, _, mine, _, _ = agree(own, OTHER)
    assert of(Try, mine), "one symmetric side may still meet one that lets everybody in"


def test_a_way_under_way_survives_the_loss_of_the_relay():
    asks, answers, _, _, now = agree()
    for side in (asks, answers):
        assert side.on_lost("reset") == []
        assert side.step is Step.ACT
        assert of(End, side.on_failed("nobody met", now + 3))[0].reason == "lost"
    waiting, _ = two()
    assert waiting.on_lost("reset")[0].reason == "lost"


def test_messages_that_are_not_due_are_refused():
    asks, answers = two()
    for message in (Ask(), Go(Way.PUNCH), Failed("")):
        with pytest.raises(RemoteProtocolError, match="came while waiting for"):
            asks.on_message(message, 0.0)
    for message in (NATED, Go(Way.PUNCH), Failed("")):
        with pytest.raises(RemoteProtocolError, match="came while waiting for"):
            answers.on_message(message, 0.0)
    asks, _, _, _, now = agree()
    with pytest.raises(RemoteProtocolError, match="Go came"):
        asks.on_message(Go(Way.PUNCH), now)  # a second time
    with pytest.raises(RemoteProtocolError, match="Offer came"):
        asks.on_message(OTHER, now)


def test_silence_at_any_step_ends_by_its_deadline():
    asks, answers = two()
    for side in (asks, answers):
        assert side.on_time(side.deadline - 0.01) == []
        assert of(End, side.on_time(side.deadline))[0].reason == "deadline"
        assert side.deadline <= LIMITS.step_s + LIMITS.learn_s
    asks, answers, _, _, now = agree()
    ends = [of(End, side.on_time(side.deadline))[0].reason for side in (asks, answers)]
    assert ends == ["deadline", "failed"]
    assert max(asks.deadline, answers.deadline) - now < 20


_addr = st.sampled_from(
    [
        "/ip4/11.0.0.1/tcp/1",
        "/ip4/127.0.0.1/tcp/1",
        "/ip4/192.168.1.7/tcp/1",
        "/ip6/2a0a:ffff::1/tcp/1",
        "/dns4/evil.example/tcp/1",
        "nonsense",
        "",
    ]
)
_addrs = st.lists(_addr, max_size=4).map(tuple)
_offer = st.builds(
    Offer,
    share=st.binary(min_size=32, max_size=32),
    mapped=_addrs,
    symmetric=st.booleans(),
    near=_addrs,
    public=_addrs,
)
_message = st.one_of(
    st.just(Ask()),
    _offer,
    st.builds(Go, st.sampled_from(Way)),
    st.builds(Failed, st.text(max_size=20)),
    st.builds(Over, st.text(max_size=20), st.text(max_size=20)),
)
_event = st.one_of(
    _message,
    st.tuples(st.just("learned"), _offer),
    st.tuples(st.sampled_from(["failed", "lost", "unmapped"]), st.just("why")),
    st.floats(0, 10),
)


@given(st.booleans(), st.lists(_event, max_size=20))
def test_any_order_of_events_ends_in_time_or_in_a_protocol_error(asks, events):
    now, exchange = 0.0, Exchange(asks=asks, own_ips=(), now=0.0, limits=LIMITS)
    exchange.begin()
    began, tries = now, 0
    try:
        for event in events:
            actions = []
            if isinstance(event, float):
                now = min(now + event, exchange.deadline)
                actions = exchange.on_time(now)
            elif isinstance(event, tuple):
                kind, value = event
                if kind == "learned":
                    actions = exchange.on_learned(value, now, 0.1)
                elif kind == "failed":
                    actions = exchange.on_failed(value, now)
                elif kind == "lost":
                    actions = exchange.on_lost(value)
                else:
                    actions = exchange.on_unmapped(value)
            else:
                actions = exchange.on_message(event, now, 0.1)
            tries += len(of(Try, actions))
            assert sum(len(one.targets) for one in of(Try, actions)) <= LIMITS.targets
            for message in sent(actions):
                assert punch.decode(punch.encode(message)[4:]) == message
    except RemoteProtocolError:
        return
    while exchange.step is not Step.ENDED:
        now = exchange.deadline
        tries += len(of(Try, exchange.on_time(now)))
    assert tries <= len(Way)
    assert now - began <= 2 * (LIMITS.step_s + LIMITS.learn_s) + 10 * len(events) + len(Way) * 20


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_a_protocol_error(raw):
    try:
        message = punch.decode(raw)
    except RemoteProtocolError:
        return
    assert punch.decode(punch.encode(message)[4:]) == message


def test_a_message_with_too_much_in_it_is_refused():
    many = msgspec.structs.replace(NATED, mapped=("/ip4/11.0.0.1/tcp/1",) * 9)
    long = msgspec.structs.replace(NATED, public=("x" * 129,))
    short = msgspec.structs.replace(NATED, share=b"x")
    for offer in (many, long, short):
        with pytest.raises(RemoteProtocolError, match="cannot be read"):
            punch.decode(punch.encode(offer)[4:])
