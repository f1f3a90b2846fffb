"""DCUtR: the messages as other libp2p implementations write them, and both sides of the exchange."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from libp2p.relay.circuit_v2.pb import dcutr_pb2 as theirs
from multiaddr import Multiaddr

from mycel.protocol import dcutr, varint
from mycel.protocol.dcutr import ATTEMPTS, Dial, Kind, Message, Say, Stop, Upgrade
from mycel.protocol.errors import RemoteProtocolError
from mycel.protocol.limits_reach import PunchLimits

LIMITS = PunchLimits()
A = (Multiaddr("/ip4/11.0.0.1/tcp/1"),)
B = (Multiaddr("/ip4/11.0.0.2/tcp/2"),)


def two():
    return (
        Upgrade(called=called, addrs=addrs, now=0.0, limits=LIMITS)
        for called, addrs in ((True, B), (False, A))
    )


def test_the_messages_are_what_py_libp2p_reads_and_writes():
    message = Message(Kind.CONNECT, (*A, *B))
    size, at = varint.decode(dcutr.write(message))
    raw = dcutr.write(message)[at:]
    assert size == len(raw)
    read = theirs.HolePunch.FromString(raw)
    assert read.type == theirs.HolePunch.CONNECT
    assert list(read.ObsAddrs) == [addr.to_bytes() for addr in (*A, *B)]
    written = theirs.HolePunch(type=theirs.HolePunch.SYNC)
    assert dcutr.read(written.SerializeToString()) == Message(Kind.SYNC)


def test_both_dial_at_the_same_moment():
    called, caller = two()
    (said,) = called.begin(0.0)
    assert said == Say(Message(Kind.CONNECT, B))
    (answer,) = caller.on_message(said.message, 0.1)
    assert answer == Say(Message(Kind.CONNECT, A))
    sync, mine = called.on_message(answer.message, 0.2)
    assert sync == Say(Message(Kind.SYNC))
    assert mine == Dial(pytest.approx(0.3), A)
    assert caller.on_message(sync.message, 0.3) == [Dial(0.3, B)]


def test_an_attempt_that_fails_is_repeated_twice_and_then_given_up():
    called, caller = two()
    words, now = called.begin(0.0), 0.0
    for attempt in range(1, ATTEMPTS + 1):
        (answer,) = caller.on_message(words[0].message, now)
        sync, _ = called.on_message(answer.message, now)
        assert caller.on_message(sync.message, now)
        now += 3
        assert called.attempt == attempt
        assert caller.on_failed("nobody", now) == []
        words = called.on_failed("nobody", now)
    assert isinstance(words[0], Stop)
    assert words[0].reason == "failed"
    assert isinstance(caller.on_message(Message(Kind.CONNECT, B), now)[0], Stop)


def test_the_side_that_leads_may_begin_again_while_the_other_still_dials():
    called, caller = two()
    connect = called.begin(0.0)[0].message
    caller.on_message(connect, 0.0)
    caller.on_message(Message(Kind.SYNC), 0.1)
    assert caller.on_message(connect, 0.2) == [Say(Message(Kind.CONNECT, A))]
    assert caller.on_message(Message(Kind.SYNC), 0.3)[0].addrs == B


@pytest.mark.parametrize("called", [True, False])
def test_silence_ends_by_the_deadline(called):
    side = Upgrade(called=called, addrs=A, now=0.0, limits=LIMITS)
    side.begin(0.0)
    assert side.on_time(LIMITS.step_s - 0.1) == []
    assert side.on_time(LIMITS.step_s)[0].reason == "deadline"


def test_messages_that_are_not_due_are_refused():
    called, caller = two()
    called.begin(0.0)
    with pytest.raises(RemoteProtocolError, match="sync came where connect is due"):
        called.on_message(Message(Kind.SYNC), 0.0)
    caller.on_message(Message(Kind.CONNECT, B), 0.0)
    with pytest.raises(RemoteProtocolError, match="connect came where sync is due"):
        caller.on_message(Message(Kind.CONNECT, B), 0.0)


@given(st.binary(max_size=100))
def test_any_bytes_are_a_message_or_a_protocol_error(raw):
    try:
        message = dcutr.read(raw)
    except RemoteProtocolError:
        return
    assert isinstance(message.kind, Kind)


def test_a_kind_that_is_none_is_refused_and_addresses_that_are_none_left_out():
    with pytest.raises(RemoteProtocolError, match="neither CONNECT nor SYNC"):
        dcutr.read(b"")
    raw = theirs.HolePunch(type=theirs.HolePunch.CONNECT, ObsAddrs=[b"\xff\xff", A[0].to_bytes()])
    assert dcutr.read(raw.SerializeToString()).addrs == A


_event = st.one_of(
    st.sampled_from([Message(Kind.CONNECT, A), Message(Kind.SYNC)]), st.just("failed"), st.floats(0, 10)
)


@given(st.booleans(), st.lists(_event, max_size=30))
def test_any_order_of_events_dials_a_bounded_number_of_times(called, events):
    side, now, dials = Upgrade(called=called, addrs=A, now=0.0, limits=LIMITS), 0.0, 0
    side.begin(now)
    try:
        for event in events:
            if isinstance(event, float):
                now = min(now + event, side.deadline)
                actions = side.on_time(now)
            elif event == "failed":
                actions = side.on_failed("nobody", now)
            else:
                actions = side.on_message(event, now)
            dials += sum(isinstance(action, Dial) for action in actions)
    except RemoteProtocolError:
        pass
    assert dials <= ATTEMPTS
    for _ in range(2 * ATTEMPTS + 1):
        now = max(now, side.deadline)
        side.on_time(now)
    assert side.is_over
