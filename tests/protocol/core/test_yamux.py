"""The multiplexer: frames, windows, acknowledgements, pings, ends, bounds."""

from __future__ import annotations

import pytest

from mycel.protocol import yamux
from mycel.protocol.egress import CONTROL_BYTES_MAX
from mycel.protocol.errors import LimitExceeded, RemoteProtocolError, StreamClosed, StreamReset
from mycel.protocol.limits import DEFAULT_LIMITS, Limits
from mycel.protocol.sealed import PLAINTEXT_MAX, Opener, Outlet
from mycel.protocol.session import ACK_BACKLOG, LINGER_S, UNANSWERED_MAX, Session
from mycel.protocol.yamux import HEADER, HEADER_BYTES, ReceiveWindow

KEY = b"k" * 32


class Bare:
    """A session whose frames are seen: what the peer sends is written by hand."""

    def __init__(self, *, client: bool = True, limits: Limits = DEFAULT_LIMITS) -> None:
        self.outlet = Outlet(KEY, [])
        self.session = Session(self.outlet, self, limits, client=client, now=0.0)
        self.opener = Opener(KEY)
        self.channels = []
        self.got = bytearray()
        self.ends = []
        self.slots = 0
        self.away = []

    def on_channel(self, channel):
        self.channels.append(channel)
        self.watch(channel)

    def watch(self, channel):
        channel.sink = lambda data, error: (
            self.got.extend(data) if data is not None else self.ends.append(error)
        )
        return channel

    def on_slot(self):
        self.slots += 1

    def on_go_away(self, code):
        self.away.append(code)

    def feed(self, kind, flags, number, value, data=b"", *, now=0.0):
        self.session.feed(memoryview(HEADER.pack(0, kind, flags, number, value) + data), now)

    def plaintext(self):
        """Everything that was to be sent, opened again, with the size of each message."""
        plain, sizes = bytearray(), []

        def take(view):
            plain.extend(view)
            sizes.append(len(view))

        while True:
            self.session.egress.fill()
            self.outlet.seal()
            view = self.outlet.outgoing()
            if not view:
                return bytes(plain), sizes
            self.opener.receive(memoryview(bytearray(view)), take)
            self.outlet.sent(len(view))

    def frames(self):
        """The frames that were to be sent: (type, flags, id, length, data)."""
        plain, _ = self.plaintext()
        frames, at = [], 0
        while at < len(plain):
            _, kind, flags, number, value = HEADER.unpack_from(plain, at)
            at += HEADER_BYTES
            size = value if kind == yamux.DATA else 0
            frames.append((kind, flags, number, value, plain[at : at + size]))
            at += size
        return frames


def test_a_stream_begins_with_syn_on_its_first_data_and_ends_with_fin_on_its_last():
    bare = Bare()
    channel = bare.watch(bare.session.open())
    assert bare.frames() == []
    channel.try_send(b"one")
    channel.try_send(b"two", end=True)
    assert bare.frames() == [
        (yamux.DATA, yamux.SYN, 1, 3, b"one"),
        (yamux.DATA, yamux.FIN, 1, 3, b"two"),
    ]


def test_the_dialer_uses_odd_ids_and_the_listener_even_ones():
    assert [Bare(client=True).session.open().id, Bare(client=False).session.open().id] == [1, 2]


def test_an_accepted_stream_is_acknowledged_with_its_first_answer():
    bare = Bare(client=False)
    bare.feed(yamux.DATA, yamux.SYN, 1, 5, b"hello")
    assert bare.got == b"hello"
    bare.channels[0].try_send(b"hi")
    assert bare.frames() == [(yamux.DATA, yamux.ACK, 1, 2, b"hi")]


def test_an_accepted_stream_that_stays_silent_is_acknowledged_with_the_next_tick():
    bare = Bare(client=False)
    bare.feed(yamux.DATA, yamux.SYN, 1, 5, b"hello")
    assert bare.frames() == []
    bare.session.on_tick(0.1)
    assert bare.frames() == [(yamux.WINDOW, yamux.ACK, 1, 0, b"")]


def test_many_accepted_streams_are_acknowledged_at_once():
    bare = Bare(client=False)
    for number in range(1, 201, 2):
        bare.feed(yamux.WINDOW, yamux.SYN, number, 0)
    at_once = len(bare.frames())
    assert 100 - UNANSWERED_MAX <= at_once < 100
    bare.session.on_tick(1.0)
    assert at_once + len(bare.frames()) == 100


def test_no_more_streams_than_the_ack_backlog_are_opened_ahead():
    bare = Bare()
    for _ in range(ACK_BACKLOG):
        bare.session.open()
    assert not bare.session.can_open
    with pytest.raises(LimitExceeded):
        bare.session.open()
    bare.feed(yamux.WINDOW, yamux.ACK, 1, 0)
    assert bare.slots == 1
    assert bare.session.open().id == 2 * ACK_BACKLOG + 1


def test_a_peers_streams_beyond_the_bound_are_reset_and_the_session_goes_on():
    bare = Bare(client=False, limits=Limits(streams=2))
    for number in (1, 3, 5):
        bare.feed(yamux.DATA, yamux.SYN, number, 4, b"data")
    assert bare.got == b"datadata"
    assert (yamux.WINDOW, yamux.RST, 5, 0, b"") in bare.frames()
    bare.channels[0].reset(StreamReset("done"))
    bare.feed(yamux.DATA, yamux.SYN, 7, 4, b"more")
    assert bare.got == b"datadatamore"


def test_a_sender_stops_at_the_peers_window_and_goes_on_with_its_update():
    bare = Bare()
    channel = bare.watch(bare.session.open())
    drained = []
    channel.on_drained = lambda: drained.append(True)
    channel.enqueue(memoryview(bytes(300_000)))
    assert sum(frame[3] for frame in bare.frames()) == yamux.INITIAL_WINDOW
    assert not drained
    assert not channel.try_send(b"x")
    bare.feed(yamux.WINDOW, yamux.ACK, 1, 10_000)
    assert sum(frame[3] for frame in bare.frames()) == 10_000
    bare.feed(yamux.WINDOW, 0, 1, 1_000_000)
    assert sum(frame[3] for frame in bare.frames()) == 300_000 - yamux.INITIAL_WINDOW - 10_000
    assert drained


def test_bulk_data_travels_in_full_noise_messages():
    bare = Bare()
    channel = bare.watch(bare.session.open())
    bare.feed(yamux.WINDOW, yamux.ACK, 1, 1 << 20)
    channel.enqueue(memoryview(bytes(1_000_000)))
    plain, sizes = bare.plaintext()
    assert set(sizes[:-1]) == {PLAINTEXT_MAX}
    assert len(plain) == 1_000_000 + len(sizes) * HEADER_BYTES


def test_streams_with_much_to_send_take_turns():
    bare = Bare()
    channels = [bare.watch(bare.session.open()) for _ in range(3)]
    for channel in channels:
        channel.enqueue(memoryview(bytes(200_000)))
    order = [frame[2] for frame in bare.frames()]
    assert order[:6] == [1, 3, 5, 1, 3, 5]


def test_a_small_message_does_not_wait_behind_a_bulk_transfer():
    bare = Bare()
    bulk, small = (bare.watch(bare.session.open()) for _ in range(2))
    bulk.enqueue(memoryview(bytes(200_000)))
    assert small.try_send(b"quick")
    assert bare.frames()[0][2] == small.id


def test_copies_for_senders_that_do_not_wait_are_bounded():
    bare = Bare(limits=Limits(output_bytes=200_000))
    channel = bare.watch(bare.session.open())
    bare.feed(yamux.WINDOW, yamux.ACK, 1, 10 << 20)
    taken = 0
    while channel.try_send(bytes(60_000)):
        taken += 60_000
    assert taken <= 4 * PLAINTEXT_MAX + 200_000
    bare.plaintext()
    assert channel.try_send(bytes(60_000))


def test_a_peer_that_ignores_the_window_is_dropped():
    bare = Bare(client=False)
    bare.feed(yamux.DATA, yamux.SYN, 1, yamux.INITIAL_WINDOW, bytes(yamux.INITIAL_WINDOW))
    with pytest.raises(RemoteProtocolError, match="window"):
        bare.feed(yamux.DATA, 0, 1, 1, b"x")


def test_unread_data_of_all_streams_together_is_bounded():
    bare = Bare(client=False, limits=Limits(connection_window_max=1 << 20))
    for number in range(1, 15, 2):
        bare.feed(yamux.DATA, yamux.SYN, number, 200_000, bytes(200_000))
    assert bare.session.unread <= 1 << 20
    assert bare.session.overflowed == 2
    assert [frame[1:3] for frame in bare.frames() if frame[1] == yamux.RST] == [
        (yamux.RST, 11),
        (yamux.RST, 13),
    ]


def test_credit_is_given_back_in_halves_of_the_window():
    bare = Bare(client=False)
    bare.feed(yamux.DATA, yamux.SYN, 1, 200_000, bytes(200_000), now=10.0)
    channel = bare.channels[0]
    bare.session.on_tick(20.0)
    assert bare.frames() == [(yamux.WINDOW, yamux.ACK, 1, 0, b"")]
    assert not channel.credit(100_000)
    assert bare.frames() == []
    assert channel.credit(100_000)
    (frame,) = bare.frames()
    assert frame[:4] == (yamux.WINDOW, 0, 1, 200_000)


def test_a_window_grows_while_it_drains_within_few_round_trips_and_not_otherwise():
    window = ReceiveWindow(0.0)
    window.consumed(200_000)
    assert window.grant(0.1, 0.1, 0, 1 << 30) == 200_000 + 3 * 262_144
    assert window.size == 4 * 262_144
    window.consumed(600_000)
    assert window.grant(10.0, 0.1, 0, 1 << 30) == 600_000
    assert window.size == 4 * 262_144


def test_a_window_filled_in_one_burst_grows_faster():
    window = ReceiveWindow(0.0)
    window.arrived(200_000, 0.05)
    window.consumed(200_000)
    window.grant(0.051, 0.1, 0, 1 << 30)
    assert window.size == 16 * 262_144
    window.arrived(3 << 20, 0.1)
    window.consumed(3 << 20)
    window.grant(0.2, 0.1, 0, 1 << 30)
    assert window.size == 64 * 262_144


def test_a_window_jumps_to_what_the_peer_filled_before_and_stops_at_what_is_spare():
    window = ReceiveWindow(0.0)
    window.consumed(200_000)
    window.grant(0.1, 0.1, 8 << 20, 1 << 30)
    assert window.size == 8 << 20
    window.consumed(5 << 20)
    window.grant(0.2, 0.1, 8 << 20, 1000)
    assert window.size == (8 << 20) + 1000


def test_windows_of_one_peer_together_stay_within_the_connections_bound():
    limits = Limits(connection_window_max=4 << 20, stream_window_max=64 << 20)
    bare = Bare(client=False, limits=limits)
    for number in range(1, 21, 2):
        bare.feed(yamux.WINDOW, yamux.SYN, number, 0)
    for _ in range(6):
        for channel in bare.channels:
            size = min(channel.window.left, 1 << 20)
            bare.feed(yamux.DATA, 0, channel.id, size, bytes(size))
            channel.credit(size)
    sizes = [channel.window.size for channel in bare.channels]
    assert max(sizes) > yamux.INITIAL_WINDOW
    assert sum(size - yamux.INITIAL_WINDOW for size in sizes) <= 4 << 20


def test_pings_are_answered_and_measure_the_round_trip():
    bare = Bare()
    bare.feed(yamux.PING, yamux.SYN, 0, 77)
    assert bare.frames() == [(yamux.PING, yamux.ACK, 0, 77, b"")]
    bare.session.ping(5.0)
    ((_, flags, _, value, _),) = bare.frames()
    assert flags == yamux.SYN
    bare.feed(yamux.PING, yamux.ACK, 0, value, now=5.25)
    assert bare.session.rtt == 0.25
    bare.feed(yamux.PING, yamux.ACK, 0, value, now=9.0)  # a second answer measures nothing
    assert bare.session.rtt == 0.25


def test_a_peer_that_asks_faster_than_it_reads_is_dropped():
    bare = Bare()
    ping = HEADER.pack(0, yamux.PING, yamux.SYN, 0, 1)
    with pytest.raises(RemoteProtocolError, match="faster than it reads"):
        for _ in range(CONTROL_BYTES_MAX // HEADER_BYTES + 2):
            bare.session.feed(memoryview(ping), 0.0)


def test_a_reset_throws_away_what_was_queued_and_ends_both_directions():
    bare = Bare()
    channel = bare.watch(bare.session.open())
    channel.try_send(b"x")
    bare.frames()
    channel.enqueue(memoryview(bytes(1 << 20)))
    bare.feed(yamux.WINDOW, yamux.RST, 1, 0)
    assert isinstance(bare.ends[0], StreamReset)
    assert channel.queued == 0
    with pytest.raises(StreamReset):
        channel.try_send(b"y")
    assert bare.session.channels == 0


def test_this_sides_reset_tells_the_peer_once_and_only_if_it_knows_the_stream():
    bare = Bare()
    unknown, known = (bare.watch(bare.session.open()) for _ in range(2))
    known.try_send(b"x")
    bare.frames()
    for channel in (unknown, known, known):
        channel.reset(StreamReset("enough"))
    assert bare.frames() == [(yamux.WINDOW, yamux.RST, 3, 0, b"")]
    assert bare.session.channels == 0


def test_data_after_a_reset_is_skipped():
    bare = Bare(client=False)
    bare.feed(yamux.DATA, yamux.SYN, 1, 2, b"ab")
    bare.channels[0].reset(StreamReset("enough"))
    bare.feed(yamux.DATA, 0, 1, 5, b"later")
    bare.feed(yamux.DATA, yamux.SYN, 3, 2, b"ok")
    assert bare.got == b"abok"


def test_a_stream_leaves_the_table_when_both_sides_finished():
    bare = Bare(client=False)
    bare.feed(yamux.DATA, yamux.SYN | yamux.FIN, 1, 2, b"ab")
    assert bare.ends == [None]
    assert bare.session.channels == 1
    bare.channels[0].try_send(b"answer", end=True)
    assert bare.session.channels == 0
    assert bare.frames() == [(yamux.DATA, yamux.ACK | yamux.FIN, 1, 6, b"answer")]


def test_fin_waits_for_the_window_behind_the_data():
    bare = Bare()
    channel = bare.watch(bare.session.open())
    channel.enqueue(memoryview(bytes(yamux.INITIAL_WINDOW + 10)), end=True)
    assert not any(frame[1] & yamux.FIN for frame in bare.frames())
    with pytest.raises(StreamClosed):
        channel.try_send(b"more")
    bare.feed(yamux.WINDOW, yamux.ACK, 1, 100)
    assert bare.frames() == [(yamux.DATA, yamux.FIN, 1, 10, bytes(10))]


def test_a_forgotten_stream_that_the_peer_leaves_open_is_reset_after_a_while():
    bare = Bare(client=False)
    bare.feed(yamux.DATA, yamux.SYN, 1, 2, b"ab", now=50.0)
    bare.channels[0].forget()
    assert bare.frames()[-1][1] & yamux.FIN
    bare.session.on_tick(50.0 + LINGER_S - 0.1)
    assert bare.session.channels == 1
    bare.session.on_tick(50.0 + LINGER_S + 0.1)
    assert bare.session.channels == 0
    assert bare.frames() == [(yamux.WINDOW, yamux.RST, 1, 0, b"")]


def test_data_for_a_forgotten_stream_is_answered_with_a_reset():
    bare = Bare(client=False)
    bare.feed(yamux.DATA, yamux.SYN, 1, 2, b"ab")
    bare.channels[0].forget()
    bare.frames()
    bare.feed(yamux.DATA, 0, 1, 2, b"cd")
    assert bare.frames() == [(yamux.WINDOW, yamux.RST, 1, 0, b"")]
    assert bare.session.unread == 0


def test_after_go_away_this_side_opens_nothing():
    bare = Bare()
    bare.feed(yamux.GO_AWAY, 0, 0, yamux.NORMAL)
    assert bare.away == [yamux.NORMAL]
    assert not bare.session.can_open
    bare.session.go_away(yamux.NORMAL)
    bare.session.go_away(yamux.NORMAL)
    assert bare.frames() == [(yamux.GO_AWAY, 0, 0, 0, b"")]


def test_withdrawing_leaves_whole_frames_and_the_session_in_order():
    bare = Bare()
    channel, other = (bare.watch(bare.session.open()) for _ in range(2))
    channel.enqueue(memoryview(bytes(1 << 20)), end=True)
    bare.session.egress.fill()
    channel.withdraw()
    other.try_send(b"goes on")
    frames = bare.frames()
    assert frames[-1] == (yamux.DATA, yamux.SYN, 3, 7, b"goes on")
    assert not any(frame[1] & yamux.FIN for frame in frames)
    channel.reset(StreamReset("cancelled"))
    assert bare.frames() == [(yamux.WINDOW, yamux.RST, 1, 0, b"")]


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        ((1, 0, 0, 1, 0), "version 1"),
        ((0, 4, 0, 1, 0), "type 4"),
        ((0, 0, 16, 1, 0), "flags 16"),
        ((0, 0, 0, 0, 5), "stream 0"),
        ((0, 1, 0, 0, 5), "stream 0"),
        ((0, 0, 1, 2, 0), "opened stream 2"),
        ((0, 2, 1, 3, 0), "names a stream"),
        ((0, 3, 0, 3, 0), "names a stream"),
        ((0, 2, 0, 0, 0), "flags 0"),
        ((0, 2, 3, 0, 0), "flags 3"),
        ((0, 0, 1, 1, 0xFFFFFFFF), "more than any window"),
        ((0, 0, 1, 1, 300_000), "window allows"),
        ((0, 1, 1, 1, 0xFFFFFFFF), "32 bits"),
    ],
)
def test_frames_that_the_spec_forbids_drop_the_peer_with_a_reason(frame, reason):
    bare = Bare(client=False)
    with pytest.raises(RemoteProtocolError, match=reason):
        bare.session.feed(memoryview(HEADER.pack(*frame)), 0.0)


def test_opening_a_stream_twice_or_sending_after_its_end_drops_the_peer():
    bare = Bare(client=False)
    bare.feed(yamux.DATA, yamux.SYN, 1, 0)
    with pytest.raises(RemoteProtocolError, match="opened stream 1"):
        bare.feed(yamux.DATA, yamux.SYN, 1, 0)
    bare = Bare(client=False)
    bare.feed(yamux.DATA, yamux.SYN | yamux.FIN, 1, 0)
    with pytest.raises(RemoteProtocolError, match="after the end"):
        bare.feed(yamux.DATA, 0, 1, 1, b"x")


def test_output_buffers_exist_only_while_they_hold_something_and_are_reused():
    spare: list[bytearray] = []
    outlet = Outlet(KEY, spare)
    assert not outlet.outgoing()
    view, at = outlet.reserve(5)
    view[at : at + 5] = b"hello"
    outlet.seal()
    sealed = outlet.outgoing()
    assert sealed
    assert not spare
    outlet.sent(len(sealed))
    assert not outlet.outgoing()
    assert len(spare) == 1
    Outlet(KEY, spare).reserve(1)
    assert not spare
