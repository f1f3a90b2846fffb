"""Nodes behind boxes that lose their memory: calls go on."""

from __future__ import annotations

import pytest
import trio

from mycel.protocol.errors import MycelError
from mycel.protocol.mesh import PathKind
from mycel.simnet.caller import Caller
from mycel.simnet.link import LinkOptions

LINE = LinkOptions(latency_s=0.01)
WITHIN_S = 30.0


async def until(holds):
    with trio.fail_after(WITHIN_S):
        while not holds():  # noqa: ASYNC110
            await trio.sleep(0.1)


async def direct_pair(scene, nursery, *kinds):
    """Two nodes behind boxes of those kinds, connected directly, in a swarm with two public nodes."""
    public = [Caller(scene.net.add(name), nursery) for name in ("hub", "second")]
    homes = [Caller(scene.net.add_site(f"home {n}", kind)[0], nursery) for n, kind in enumerate(kinds)]
    ticket = await public[0].found()
    await public[1].join(ticket)
    for home in homes:
        await home.join(ticket)
        await home.host.connect(public[1].told)
    await until(lambda: all(home.is_callable for home in homes))
    await homes[0].host.connect(homes[1].told)
    await until(lambda: homes[0].path(homes[1].peer_id) is PathKind.DIRECT)
    return homes


async def call_until_it_works(caller, callee):
    with trio.fail_after(WITHIN_S):
        while True:
            try:
                if await caller.call(callee.peer_id):
                    return
            except MycelError:
                await trio.sleep(0.2)


@pytest.mark.parametrize(
    ("kinds", "stays"),
    [(("port", "carrier"), True), (("address", "symmetric"), False), (("rejecting", "firewall"), False)],
)
def test_a_node_whose_box_reboots_is_called_again(play, kinds, stays):
    """Where the port outside stays the same the connection goes on, elsewhere another takes its place."""

    async def scenario(scene):
        async with trio.open_nursery() as nursery:
            one, two = await direct_pair(scene, nursery, *kinds)
            since = one.host.peers[two.peer_id].since
            for name, box in scene.net.boxes.items():
                if name.startswith("home 0") or not stays:
                    box.reboot()
            await call_until_it_works(one, two)
            await call_until_it_works(two, one)
            await until(lambda: one.path(two.peer_id) is PathKind.DIRECT)
            assert (one.host.peers[two.peer_id].since == since) == stays
            nursery.cancel_scope.cancel()

    play(scenario, link=LINE)
