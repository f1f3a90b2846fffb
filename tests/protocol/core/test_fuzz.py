"""Hostile bytes at every state: an error with a reason or nothing, bounded memory, and no other exception.

`RemoteProtocolError` and `Refused` are the only ways out of `Connection.receive`. What an attacker can do
after the handshake it does with good keys, so the fuzzers here also write below the cipher.
"""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mycel.protocol import multistream, yamux
from mycel.protocol.errors import Refused, RemoteProtocolError
from mycel.protocol.limits import Limits
from mycel.protocol.yamux import HEADER

SMALL = Limits(streams=8, connection_window_max=1 << 20, stream_window_max=512 << 10, output_bytes=1 << 20)
HELD_MAX = (1 << 20) + 256 * 1024 + 80_000
"""SMALL's unread bytes, owed short frames, and one incomplete message."""

fuzzing = settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def held_bytes(end):
    """What the other side makes this one hold."""
    connection = end.connection
    held = len(connection._held)
    if connection._opener is not None:
        held += len(connection._opener._held)
    if connection._session is not None:
        session = connection._session
        held += len(session.egress._control) + session.unread + session.egress._copied
    return held


def give(end, data):
    """Whether `end` still listens after `data`."""
    try:
        end.connection.receive(memoryview(bytearray(data)), 0.0)
    except (RemoteProtocolError, Refused) as error:
        return not str(error)  # a drop must have a reason
    return True


def seal_as(end, plain):
    """`plain` as `end` would seal it next."""
    outlet = end.connection._outlet
    out = bytearray()
    for start in range(0, len(plain), 60_000):
        piece = plain[start : start + 60_000]
        view, at = outlet.reserve(len(piece))
        view[at : at + len(piece)] = piece
        outlet.seal()
        out += outlet.outgoing()
        outlet.sent(len(outlet.outgoing()))
    return bytes(out)


@fuzzing
@given(pieces=st.lists(st.binary(max_size=300), max_size=8), dialer=st.booleans())
def test_random_bytes_instead_of_a_handshake(make_wire, pieces, dialer):
    wire = make_wire(limits=SMALL)
    end = wire.near if dialer else wire.far
    for piece in pieces:
        if not give(end, piece):
            break
        assert held_bytes(end) < 20_000
    assert end.opened is None


MULTISTREAM = st.one_of(
    st.sampled_from(
        [
            multistream.message(multistream.HEADER),
            multistream.message("/noise"),
            multistream.message("/yamux/1.0.0"),
            multistream.message("na"),
            multistream.message("ls"),
            multistream.message("x" * 1000),
            multistream.proposal("/noise"),
            b"\x00\x20" + b"\x09" * 32,
            b"\xff\xff",
            b"\x81\x80\x80\x80\x01",
        ]
    ),
    st.binary(max_size=40),
)


@fuzzing
@given(pieces=st.lists(MULTISTREAM, max_size=30), dialer=st.booleans())
def test_almost_right_negotiations(make_wire, pieces, dialer):
    wire = make_wire(limits=SMALL)
    end = wire.near if dialer else wire.far
    for piece in pieces:
        if not give(end, piece):
            break
        assert held_bytes(end) < 20_000
        assert len(end.take_output()) < 10_000
    assert end.opened is None


@pytest.mark.parametrize("muxers", [True, False])
def test_every_flipped_bit_of_every_handshake_packet(make_wire, muxers):
    """No flip may open the connection for the side that saw it, save where nothing protects the byte."""
    packets = []
    wire = make_wire(muxers=muxers)
    for _ in range(3):
        for source, target in ((wire.near, wire.far), (wire.far, wire.near)):
            data = source.take_output()
            packets.append(data)
            target.connection.receive(memoryview(bytearray(data)), 0.0)
    rng = random.Random(5)
    for number, data in enumerate(packets):
        for position in range(len(data)):
            again = make_wire(muxers=muxers)
            ends = (again.near, again.far)
            alive = True
            for step in range(number):
                alive = alive and give(ends[1 - step % 2], ends[step % 2].take_output())
            assert alive
            packet = bytearray(ends[number % 2].take_output())
            assert packet == data
            packet[position] ^= 1 << rng.randrange(8)
            target = ends[1 - number % 2]
            was_open = target.opened
            if give(target, packet):
                assert target.opened is was_open or (was_open is None and target.opened is not None)
                if was_open is None and target.opened is not None:
                    # only the muxer's own negotiation is left, and that is sealed: nothing could be flipped
                    pytest.fail(f"packet {number} byte {position} was flipped unseen")


@fuzzing
@given(cut=st.integers(0, 10_000), seed=st.integers(0, 1 << 32))
def test_a_handshake_cut_short_opens_nothing(make_wire, cut, seed):
    wire = make_wire(seed=seed % 5)
    first = wire.near.take_output()
    assert give(wire.far, first[: cut % len(first)])
    assert wire.far.opened is None
    assert wire.far.take_output() in (
        b"",
        multistream.message(multistream.HEADER),
        multistream.proposal("/noise"),
    )


def test_flipped_bits_below_the_session_end_the_connection_and_touch_no_stream(open_wire):
    rng = random.Random(11)
    for _ in range(300):
        wire = open_wire(limits=SMALL)
        channel = wire.near.open()
        channel.try_send(b"good")
        wire.settle()
        channel.try_send(b"data" * rng.randrange(1, 5000))
        packet = bytearray(wire.near.take_output())
        packet[rng.randrange(2, len(packet))] ^= 1 << rng.randrange(8)
        assert not give(wire.far, packet)
        assert wire.far.got[1] == b"good"


def test_replayed_and_reordered_messages_end_the_connection(open_wire):
    wire = open_wire()
    channel = wire.near.open()
    channel.try_send(b"one")
    one = wire.near.take_output()
    channel.try_send(b"two")
    two = wire.near.take_output()
    assert give(wire.far, one)
    assert not give(wire.far, one)
    wire = open_wire()
    channel = wire.near.open()
    channel.try_send(b"one")
    wire.near.take_output()
    channel.try_send(b"two")
    two = wire.near.take_output()
    assert not give(wire.far, two)


FRAMES = st.builds(
    lambda version, kind, flags, number, value, data: HEADER.pack(version, kind, flags, number, value) + data,
    st.sampled_from([0] * 20 + [1, 255]),
    st.sampled_from([0, 0, 0, 1, 1, 2, 3, 4, 255]),
    st.integers(0, 17),
    st.sampled_from([0, 1, 1, 1, 2, 3, 3, 5, 7, 0xFFFFFFFE, 0xFFFFFFFF]),
    st.one_of(st.integers(0, 600), st.sampled_from([1 << 16, 262_144, 262_145, 1 << 31, 0xFFFFFFFF])),
    st.one_of(st.binary(max_size=64), st.just(bytes(600))),
)


@fuzzing
@given(frames=st.lists(FRAMES, max_size=40), credits=st.booleans())
def test_hostile_frames_behind_the_cipher(open_wire, frames, credits):
    wire = open_wire(limits=SMALL)
    end = wire.far
    end.credits = credits
    for frame in frames:
        if not give(end, seal_as(wire.near, frame)):
            break
        assert held_bytes(end) <= HELD_MAX
        assert end.connection.session.channels <= SMALL.streams
        for channel in end.inbound[:3]:
            if channel.error is None and not channel.fin_wanted:
                channel.try_send(b"answer")
    end.take_output()


VALID = st.lists(
    st.tuples(
        st.sampled_from(["data", "data", "data", "fin", "reset", "update", "ping", "flood"]),
        st.integers(0, 9),
        st.integers(0, 70_000),
    ),
    max_size=60,
)


@fuzzing
@given(steps=VALID, seed=st.integers(0, 1 << 30))
def test_a_peer_that_keeps_the_letter_of_the_protocol_cannot_fill_memory(open_wire, steps, seed):
    """Frames that are each allowed, in any order, to a side whose users read nothing."""
    wire = open_wire(limits=SMALL)
    end = wire.far
    end.credits = False
    syn: set[int] = set()
    for action, stream, size in steps:
        number = 2 * stream + 1
        first = 0 if number in syn else yamux.SYN
        syn.add(number)
        if action in ("data", "flood"):
            count = 20 if action == "flood" else 1
            frame = HEADER.pack(0, yamux.DATA, first, number, size) + bytes(size)
            frame += (HEADER.pack(0, yamux.DATA, 0, number, size) + bytes(size)) * (count - 1)
        elif action == "ping":
            frame = HEADER.pack(0, yamux.PING, yamux.SYN, 0, size) * 100
        else:
            flags = {"fin": yamux.FIN, "reset": yamux.RST, "update": 0}[action]
            frame = HEADER.pack(0, yamux.WINDOW, first | flags, number, size if action == "update" else 0)
        if not give(end, seal_as(wire.near, frame)):
            return
        assert held_bytes(end) <= HELD_MAX
        assert end.connection.session.inbound <= SMALL.streams


def test_a_long_seeded_siege(open_wire, make_wire):
    """6 000 hostile packets in every state; the side under siege never fails otherwise than by its errors."""
    rng = random.Random(2026)
    dropped = 0
    wire = make_wire(limits=SMALL)
    stage = 0
    for _ in range(6_000):
        roll = rng.random()
        if roll < 0.02 or wire is None:
            stage = rng.randrange(4)
            wire = open_wire(limits=SMALL) if stage == 3 else make_wire(limits=SMALL)
            if stage in (1, 2):
                wire.carry(wire.near, wire.far)
            if stage == 2:
                wire.carry(wire.far, wire.near)
        if stage == 3:
            value = rng.choice([0, 5, 1000, 262_144, 0xFFFFFFFF])
            flags = rng.choice([0, 0, 1, 1, 2, 4, 8, 3, 15])
            body = rng.randbytes(min(value, rng.choice([0, 5, 1000])))
            plain = HEADER.pack(0, rng.randrange(4), flags, rng.randrange(12), value) + body
            if rng.random() < 0.2:
                plain = rng.randbytes(rng.randrange(1, 200))
            packet = seal_as(wire.near, plain)
            if rng.random() < 0.05:
                packet = packet[: rng.randrange(1, len(packet) + 1)]
        else:
            packet = bytearray(wire.near.take_output() or rng.randbytes(rng.randrange(1, 400)))
            for _ in range(rng.randrange(4)):
                packet[rng.randrange(len(packet))] = rng.randrange(256)
        if not give(wire.far, packet):
            dropped += 1
            wire = None
        else:
            assert held_bytes(wire.far) <= HELD_MAX
    assert dropped > 300
