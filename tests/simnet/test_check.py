"""The checkers of the simulated world: that they would notice."""

from __future__ import annotations

import pytest
import trio

from mycel.simnet.check import InvariantBroken


def broken_world(play, tamper):
    """Run a transfer, let `tamper(flow)` break the world in the middle; returns what the checkers say."""

    async def scenario(scene):
        near, _ = await scene.connect(scene.network("near"), scene.network("far"))
        near.try_send(bytes(1000))
        await trio.sleep(1)
        tamper(near._out)
        near.try_send(bytes(1000))
        await trio.sleep(1)

    with pytest.raises(ExceptionGroup) as caught:
        play(scenario)
    matching, _ = caught.value.split(InvariantBroken)
    assert matching is not None
    error = matching
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return str(error)


def test_bytes_out_of_nowhere_are_noticed(play):
    def tamper(flow):
        flow.read += 5000

    text = broken_world(play, tamper)
    assert "bytes were made up or lost" in text
    assert "the last events were" in text
    assert " data 11.0.0.1:" in text


def test_a_buffer_past_its_bound_is_noticed(play):
    def tamper(flow):
        flow.receive_bound = 1500

    assert "2000 bytes in a receive buffer of 1500" in broken_world(play, tamper)


def test_time_that_runs_backwards_is_noticed(play):
    async def scenario(scene):
        await trio.sleep(5)
        scene.net.trace.note("test", "a", "b")
        scene.net.checks._last_at = 6.0
        with pytest.raises(InvariantBroken, match="time ran backwards"):
            scene.net.trace.note("test", "a", "b")

    play(scenario)


def test_a_dark_machine_that_still_listens_is_noticed(play):
    async def scenario(scene):
        near = scene.network("near")
        near.machine.vanish()
        await scene.listen(near)

    with pytest.raises(ExceptionGroup) as caught:
        play(scenario)
    assert caught.group_contains(InvariantBroken, match="is off and still holds")


def test_the_trace_counts_and_hashes_every_event(play):
    async def scenario(scene):
        near, far = await scene.connect(scene.network("near"), scene.network("far"))
        before = scene.net.trace.hash
        near.try_send(b"one")
        assert await scene.receive(far, 3) == b"one"
        assert scene.net.trace.hash != before
        assert scene.net.trace.counts == {"syn": 1, "data": 1}
        assert scene.net.trace.recent[-1].size == 3
        return scene.net.trace.hash

    async def other(scene):
        near, far = await scene.connect(scene.network("near"), scene.network("far"))
        near.try_send(b"two")
        assert await scene.receive(far, 3) == b"two"
        return scene.net.trace.hash

    assert play(scenario) == play(scenario)
    assert play(scenario) != play(other)  # other bytes of the same size at the same time
