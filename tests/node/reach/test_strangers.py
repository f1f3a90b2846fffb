"""Somebody else than expected at an address: homes have the same ones inside."""

from __future__ import annotations

import trio

from mycel.protocol.keys import OwnKey


def test_somebody_else_at_an_address_is_not_taken_for_the_peers_refusal(town):
    async def scenario(t):
        founder = await t.found()
        node = await t.join("node")
        absent = OwnKey(b"\x77" * 32).peer_id
        node.gather.learn(absent, [f"{founder.host.bound_addrs[0]}/p2p/{absent}"])
        await t.until(lambda: any(one.peer == absent for one in node.contacts.troubled()), 10)
        assert node.gather.refused is None
        assert node.contacts.next_s() - trio.current_time() < 5  # a refusal would be left alone for 30 s

    town(scenario)
