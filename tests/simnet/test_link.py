"""Lines and flows against arithmetic: latency, bandwidth, windows, sharing."""

from __future__ import annotations

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mycel.simnet.internet import BufferOptions
from mycel.simnet.link import GIGABIT, LinkOptions

MIB = 1 << 20


def line(latency_s=0.01, up=float("inf"), down=float("inf"), **more):
    return LinkOptions(latency_s=latency_s, up_bytes_per_s=up, down_bytes_per_s=down, **more)


async def pair(scene, near, far):
    return await scene.connect(scene.network("near", link=near), scene.network("far", link=far))


def test_a_dial_takes_a_round_trip_and_the_acceptor_half_a_one_more(play):
    async def scenario(scene):
        near, far = scene.network("near", link=line(0.02)), scene.network("far", link=line(0.03))
        listener = await scene.listen(far)
        began = trio.current_time()
        await near.dial(listener.addr)
        assert trio.current_time() - began == pytest.approx(0.1, abs=1e-12)
        await listener.accept()
        assert trio.current_time() - began == pytest.approx(0.15, abs=1e-12)

    play(scenario)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    size=st.integers(1, 4 * MIB),
    latency_s=st.floats(0.0001, 0.3),
    up=st.floats(1e5, 1e10),
    down=st.floats(1e5, 1e10),
)
def test_a_transfer_takes_latency_plus_bytes_over_bandwidth(play, size, latency_s, up, down):
    """One flow, windows wide open: the slower line decides, and nothing is stored and forwarded."""
    wide = BufferOptions(send_min=64 * MIB, receive_min=64 * MIB)

    async def scenario(scene):
        pipes = await pair(scene, line(latency_s, up=up), line(latency_s, down=down))
        return await scene.transfer(*pipes, size)

    took = play(scenario, buffers=wide)
    # A chunk enters the second line when it begins to leave the first; the last one is through both.
    chunk = max(4096, up * 0.001) / up if up < down else 0.0
    expected = 2 * latency_s + size / min(up, down)
    assert expected - 1e-9 <= took <= expected + chunk + 1e-9


def test_a_gigabit_over_100_ms_is_filled_by_the_buffers_it_gets(play):
    async def scenario(scene):
        wide = line(0.025, up=GIGABIT, down=GIGABIT)
        return await scene.transfer(*await pair(scene, wide, wide), 64 * MIB)

    assert play(scenario) == pytest.approx(0.05 + 64 * MIB / GIGABIT, rel=1e-6)


def test_a_small_window_limits_a_long_path(play):
    """1 MiB per round trip, whatever the line could carry."""
    small = BufferOptions(send_min=MIB, send_max=MIB, receive_min=MIB, receive_max=MIB)

    async def scenario(scene):
        wide = line(0.05, up=GIGABIT, down=GIGABIT)
        return await scene.transfer(*await pair(scene, wide, wide), 32 * MIB)

    round_trips = play(scenario, buffers=small) / 0.2
    assert 30 <= round_trips <= 34


def test_two_flows_share_a_line_fairly(play):
    async def scenario(scene):
        near = scene.network("near", link=line(up=1e6))
        ends = [await scene.connect(near, scene.network(name)) for name in ("one", "two", "three")]
        took = {}

        async def go(name, pipes, size):
            took[name] = await scene.transfer(*pipes, size)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(go, "small", ends[0], 100_000)
            nursery.start_soon(go, "big", ends[1], 1_000_000)
            nursery.start_soon(go, "other", ends[2], 1_000_000)
        return took

    took = play(scenario)
    assert took["small"] == pytest.approx(0.3, abs=0.05)
    assert took["big"] == pytest.approx(2.1, abs=0.05)
    assert took["other"] == pytest.approx(2.1, abs=0.05)


def test_a_small_message_is_not_stuck_behind_a_large_transfer_of_another_flow(play):
    async def scenario(scene):
        near = scene.network("near", link=line(0.01, up=1e7))
        big = await scene.connect(near, scene.network("one"))
        small = await scene.connect(near, scene.network("two"))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(scene.transfer, *big, 20 * MIB)
            await trio.sleep(0.5)
            return await scene.transfer(*small, 100)

    assert play(scenario) < 0.02 + 3 * 0.001


def test_senders_queue_for_a_receivers_line(play):
    async def scenario(scene):
        far = scene.network("far", link=line(down=1e6))
        ends = [await scene.connect(scene.network(name), far) for name in ("one", "two")]
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            for pipes in ends:
                nursery.start_soon(scene.transfer, *pipes, 500_000)
        return trio.current_time() - began

    assert play(scenario) == pytest.approx(1.02, abs=0.01)


def test_a_stalled_line_is_late_and_loses_nothing(play):
    async def scenario(scene):
        near, far = scene.network("near", link=line(up=1e6)), scene.network("far")
        pipes = await scene.connect(near, far)
        near.machine.uplink.stall(5.0)
        return await scene.transfer(*pipes, 100_000)

    assert play(scenario) == pytest.approx(5.0 + 0.02 + 0.1, abs=1e-6)


@pytest.mark.parametrize(("jitter_s", "loss"), [(0.05, 0.0), (0.0, 0.2), (0.02, 0.05)])
def test_jitter_and_loss_delay_but_keep_order(play, jitter_s, loss):
    async def scenario(scene):
        rough = line(0.01, up=1e7, jitter_s=jitter_s, loss=loss)
        near, far = await pair(scene, rough, line())
        data = bytes(number % 251 for number in range(MIB))
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(scene.send, near, data)
            assert await scene.receive(far, MIB) == data
        return trio.current_time() - began

    took = play(scenario)
    assert took > 0.02 + MIB / 1e7 + min(jitter_s, 0.001)
    assert took < 30


def test_loopback_is_fast_and_needs_no_line(play):
    async def scenario(scene):
        here = scene.network("here", link=line(1.0, up=1.0, down=1.0))
        return await scene.transfer(*await scene.connect(here, here), MIB)

    assert play(scenario) < 0.01


def test_a_large_transfer_costs_few_events(play):
    async def scenario(scene):
        wide = line(0.025, up=GIGABIT, down=GIGABIT)
        await scene.transfer(*await pair(scene, wide, wide), 64 * MIB)
        return scene.net.timeline.played

    assert play(scenario) < 64 * MIB / 16_384
