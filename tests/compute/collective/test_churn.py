"""A swarm that never rests: peers come, die and fall silent every second or so, eight reduces under way."""

from __future__ import annotations

import contextlib
import random
from typing import Any

import numpy as np
import pytest
import trio

from mycel.compute.collective.outcome import Fenced, GroupClosed
from mycel.compute.collective.policy import Policy
from mycel.protocol.errors import DialError
from mycel.simnet import clock

SECONDS = 15.0
PAUSE_S_MAX = 10.0


class Watch:
    """What all reduces came to."""

    def __init__(self) -> None:
        self.results: dict[str, bytes] = {}
        self.wrong: list[str] = []
        self.pauses: list[float] = []
        self.fenced = 0

    async def reduce_on(self, peer: Any, numbers: dict[Any, int], tag: int) -> None:
        with peer.scope():
            last = trio.current_time()
            while True:
                array = peer.array(3000)
                try:
                    outcome = await peer.group.all_reduce(array, op="sum", tag=f"t{tag}")
                except (Fenced, GroupClosed):
                    self.fenced += 1
                    last = trio.current_time()
                    await trio.sleep(0.05)
                    continue
                want = float(sum(numbers[peer_id] for peer_id in outcome.contributors))
                if not (array == want).all():
                    self.wrong.append(f"{outcome.name}: {array[0]} instead of {want}")
                if self.results.setdefault(outcome.name, array.tobytes()) != array.tobytes():
                    self.wrong.append(f"{outcome.name} differs")
                now = trio.current_time()
                if not peer.silent:
                    self.pauses.append(now - last)
                last = now
                await trio.sleep(0.2)


@pytest.mark.parametrize("seed", [1])
def test_churn_gives_no_wrong_sum_no_differing_bytes_and_no_long_pause(swarm: Any, seed: int) -> None:
    watch = Watch()

    async def churn() -> None:
        draw = random.Random(seed)
        async with swarm(bytes_per_s=2e7) as world:
            numbers: dict[Any, int] = {}
            alive: list[Any] = []

            def begin() -> None:
                peer = world.start(Policy(quorum="any"))
                peer.silent = False
                numbers[peer.mesh.peer_id] = peer.number
                alive.append(peer)
                for tag in range(8):
                    world.nursery.start_soon(watch.reduce_on, peer, numbers, tag)

            async def rest(peer: Any, seconds: float) -> None:
                peer.silent = True
                world.world.silence(peer.mesh)
                await trio.sleep(seconds)
                world.world.unsilence(peer.mesh)
                await trio.sleep(0.5)
                for other in alive.copy():
                    if other is not peer and other.mesh.is_alive:
                        with contextlib.suppress(DialError):  # it may be silent itself, or die
                            await other.mesh.connect(peer.mesh.listen_addrs)
                await trio.sleep(1)
                peer.silent = False

            for _ in range(3):
                begin()
            while trio.current_time() < SECONDS:
                await trio.sleep(draw.uniform(0.5, 2))
                awake = [peer for peer in alive if not peer.silent]
                what = draw.choice(["come", "die", "rest"])
                if what == "come" and len(alive) < 6:
                    begin()
                elif what == "die" and len(awake) > 2:
                    peer = draw.choice(awake)
                    alive.remove(peer)
                    peer.kill()
                elif what == "rest" and len(awake) > 2:
                    world.nursery.start_soon(rest, draw.choice(awake), draw.uniform(0.2, 6))

    clock.run(churn, seed)
    assert not watch.wrong, watch.wrong[:5]
    assert len(watch.results) > 100
    assert max(watch.pauses) < PAUSE_S_MAX
    assert np.isfinite(sum(watch.pauses))
