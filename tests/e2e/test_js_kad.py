"""Kademlia with js-libp2p on loopback: each puts a record that the other gets, over libp2p's own protocol."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from mycel.dht.kad.key import bytes_of_peer
from mycel.dht.kad.message import FOREIGN_PROTOCOL, KAD_PROTOCOL
from mycel.dht.kad.service import Kademlia
from mycel.node.host import Host
from mycel.node.tcp import TcpNetwork
from mycel.node.transports import Transports
from mycel.protocol.keys import OwnKey
from mycel.protocol.mesh import Access

DEADLINE_S = 60.0
PROVIDED = bytes([1, 0x55, 0x12, 32]) + bytes(32)
"""A CID, version 1, of raw bytes by their SHA-256: what js-libp2p takes providers for."""


@asynccontextmanager
async def both(js_node) -> AsyncIterator[tuple[Host, Kademlia, object]]:
    """A host with Kademlia and a js-libp2p node that know each other."""
    host = Host(
        Transports(TcpNetwork()),
        OwnKey(b"\x54" * 32),
        listen=["/ip4/127.0.0.1/tcp/0"],
        default_access=Access.STRANGER,
    )
    kad = Kademlia(host, protocols=(KAD_PROTOCOL, FOREIGN_PROTOCOL))
    with trio.fail_after(DEADLINE_S):
        async with js_node(kad=True) as js, trio.open_nursery() as nursery:
            await nursery.start(host.run)
            await nursery.start(kad.run)
            peer = await host.connect([js.addr])
            while FOREIGN_PROTOCOL not in host.peers[peer].protocols:  # noqa: ASYNC110  identify comes by itself
                await trio.sleep(0.01)
            assert await kad.bootstrap() == 1
            yield host, kad, js
            nursery.cancel_scope.cancel()


def author_of(js) -> str:
    return js.addr.rpartition("/")[2]


async def test_js_libp2p_gets_what_a_node_put(js_node):
    async with both(js_node) as (host, kad, js):
        stored = await kad.put("greeting", b"hello")
        assert stored.replicas == 2, "js-libp2p confirmed it, and the node holds it itself"
        found = await js.ask({"get": "greeting", "author": host.peer_id})
        assert bytes.fromhex(found["record"]) == kad.own_record("greeting").raw


async def test_a_node_gets_what_js_libp2p_put(js_node):
    async with both(js_node) as (_, kad, js):
        told = await js.ask({"put": "greeting", "value": "hallo", "sequence": 7})
        assert told["answered"] >= 1, told
        assert len(kad.answerer.records) == 1
        found = await kad.get(author_of(js), "greeting")
        assert found.record.value == b"hallo"
        assert found.record.sequence == 7


async def test_what_js_libp2p_puts_too_late_is_refused(js_node):
    async with both(js_node) as (_, kad, js):
        await js.ask({"put": "greeting", "value": "hallo", "life_s": -5})
        assert kad.counts["refused_expired"] >= 1
        assert len(kad.answerer.records) == 0


async def test_js_libp2p_is_found_and_asked_for_providers(js_node):
    async with both(js_node) as (_, kad, js):
        lookup = await kad.look_around(bytes_of_peer(author_of(js)), 3)
        assert [contact.peer for contact in lookup.nearest()] == [author_of(js)]
        assert await kad.provide(PROVIDED) == 1
        assert await kad.providers(PROVIDED) == [], "it is told of others only"
