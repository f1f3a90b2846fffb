"""What a machine can do: its line, timed with neighbours; what is told of it, and to whom."""

from __future__ import annotations

import pytest
import trio
from msgspec.structs import replace

from mycel.compute.capacity import Measured, Speed
from mycel.compute.engine import EngineLost
from mycel.node import capacity, throughput
from mycel.node.capacity import DEVICES_EVERY_S, LINE_KEY, Line, is_news
from mycel.node.throughput import ALLOWED_BYTES, BYTES_MAX, PROTOCOL, Clocked, Throughput
from mycel.protocol.errors import LimitExceeded, RemoteProtocolError, StreamReset
from mycel.simnet.link import LinkOptions

MBIT = 1e6 / 8


@pytest.mark.parametrize(("up", "down", "error"), [(2, 16, 0.2), (50, 400, 0.2), (0.3, 1, 0.4)])
def test_a_line_is_known_by_what_it_carries(play, up, down, error):
    async def scenario(world):
        fast = LinkOptions(latency_s=0.02, up_bytes_per_s=1000 * MBIT, down_bytes_per_s=1000 * MBIT)
        home = LinkOptions(latency_s=0.02, up_bytes_per_s=up * MBIT, down_bytes_per_s=down * MBIT)
        a = await world.host("a", add={"link": home})
        b = await world.host("b", add={"link": fast})
        own, _ = Throughput(a), Throughput(b)
        await world.connect(a, b)
        told = await own.measure(b.peer_id)
        assert told == (pytest.approx(up * MBIT, rel=error), pytest.approx(down * MBIT, rel=error))

    play(scenario)


def test_a_silent_line_and_a_dead_one_are_said(play):
    async def scenario(world):
        a, b = await world.host("a"), await world.host("b")
        own, other = Throughput(a), Throughput(b)
        await world.connect(a, b)
        other._serving = throughput.AT_ONCE
        with pytest.raises(StreamReset):
            await own.measure(b.peer_id)
        assert other.refused == 1
        b.stop_serving(PROTOCOL)

        async def mute(stream):
            await trio.sleep_forever()

        b.serve_stream(PROTOCOL, mute)
        with pytest.raises(LimitExceeded, match="took more than"):
            await own.measure(b.peer_id)

    play(scenario)


def test_a_peer_may_not_fill_the_line_with_it(play):
    async def scenario(world):
        a, b = await world.host("a"), await world.host("b")
        own, other = Throughput(a), Throughput(b)
        await world.connect(a, b)
        for _ in range(ALLOWED_BYTES // BYTES_MAX):
            assert await own._have_sent(b.peer_id, BYTES_MAX) > 0
        with pytest.raises(StreamReset):
            await own._have_sent(b.peer_id, BYTES_MAX)
        assert other.refused == 1
        for asked in (b"x\x00\x00\x00\x01", b"d\xff\xff\xff\xff", b"u\x00\x00\x00\x00"):
            stream = await a.open_stream(b.peer_id, PROTOCOL)
            await stream.send(asked)
            with pytest.raises(StreamReset):
                await stream.receive_some()
        await trio.sleep(throughput.ALLOWED_S + 1)
        assert await own._have_sent(b.peer_id, BYTES_MAX) > 0

    play(scenario)


def test_only_the_bytes_after_the_first_quarter_are_timed():
    clocked = Clocked(1000)
    assert not clocked.came(250, 5.0)
    assert not clocked.came(350, 6.0)
    assert clocked.came(400, 6.5)
    assert clocked.rate == pytest.approx(500)
    with pytest.raises(RemoteProtocolError):
        clocked.came(1, 7.0)


def test_a_line_is_news_when_it_is_another_one():
    line = Line(1e6, 1e7, (), 5.0)
    assert is_news(None, line)
    assert not is_news(line, Line(1.2e6, 0.8e7, (("x", 1.0),), 3605.0))
    assert is_news(line, Line(1.4e6, 1e7, (), 6.0))
    assert is_news(line, Line(1e6, 1e6, (), 6.0))


def test_a_node_measures_when_nobody_generates_and_tells_everybody(town):
    """The child is another test's; here it takes 4 s and finds what it finds."""
    asked = []

    async def measure(threads):
        asked.append(trio.current_time())
        await trio.sleep(4)
        cpu = Speed("cpu", "processor", 1 << 40, 1, 50.0, 100.0, 10.0)
        gpu = Speed("cuda:0", "card", 80 << 30, 70 << 30, 5e4, 8e5, 3000.0)
        return Measured("2", 2, (gpu, cpu))

    async def scenario(t):
        founder = await t.found(memory_bytes=1 << 30)
        second, third = await t.join("second"), await t.join("third", probe="off")
        busy = True
        second.capacity.is_busy = lambda: busy
        for node in (founder, second, third):
            t.nursery.start_soon(node.capacity.run, measure)
        await trio.sleep(40)
        assert len(asked) == 1, "one is busy, another one may not"
        told = next(one for one in third.peers() if one.label == "founder").capacity
        assert [one.name for one in told.devices] == ["card", "processor"]
        assert told.devices[1].memory_bytes < 1 << 40, "what a container allows"
        assert told.devices[0].memory_free_bytes is None
        assert (told.lends_bytes, told.measured > 0) == (1 << 30, True)
        assert told.up_bytes_per_s > 0 < told.down_bytes_per_s
        assert founder.status().capacity.devices[1].memory_free_bytes > 0
        assert third.status().capacity is second.status().capacity is None

        busy = False
        await t.until(lambda: len(asked) == 2)
        await trio.sleep(2)
        busy = True
        await trio.sleep(60)
        assert second.status().capacity is None, "it was given up for a generation"
        busy = False
        await t.until(lambda: third.capacity.view_of(second.host.peer_id) is not None)
        assert len(asked) == 3
        rtts = dict(second.capacity.line.rtts_ms)
        assert rtts.keys() == {founder.host.peer_id, third.host.peer_id}

        before = founder.capacity.devices
        founder.capacity.devices = replace(before, at=before.at - DEVICES_EVERY_S)
        await t.until(lambda: founder.capacity.devices.at > before.at)
        third.documents.write({LINE_KEY: b"\xc1"})
        await trio.sleep(5)
        assert founder.capacity.view_of(third.host.peer_id) is None, "nonsense is nothing"

    town(scenario)


def test_a_measurement_that_fails_is_made_again_later(town, monkeypatch):
    monkeypatch.setattr(capacity, "RETRY_S", 60.0)

    async def scenario(t):
        founder, tries = await t.found(), []

        async def measure(threads):
            tries.append(trio.current_time())
            raise EngineLost("out of luck")

        t.nursery.start_soon(founder.capacity.run, measure)
        await trio.sleep(capacity.FIRST_S + 100)
        assert len(tries) == 2
        assert tries[1] - tries[0] >= 60
        assert founder.status().capacity is None

    town(scenario)
