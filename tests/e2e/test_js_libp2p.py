"""Interoperation with js-libp2p (its current major) on loopback: it dials a host, and is dialed by one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from mycel.node.host import Host
from mycel.node.tcp import TcpNetwork
from mycel.node.transports import Transports
from mycel.protocol.errors import Refused
from mycel.protocol.keys import OwnKey
from mycel.protocol.mesh import Access

ECHO = "/mycel-test/echo/1"
DEADLINE_S = 60.0


async def echo(stream):
    while data := await stream.receive_some():
        await stream.send(data)


@asynccontextmanager
async def host(listen: str = "/ip4/127.0.0.1/tcp/0") -> AsyncIterator[Host]:
    """A host on loopback that serves `ECHO`."""
    host = Host(
        Transports(TcpNetwork()),
        OwnKey(b"\x51" * 32),
        listen=[listen],
        default_access=Access.STRANGER,
    )
    host.serve_stream(ECHO, echo, access=Access.STRANGER)
    async with trio.open_nursery() as nursery:
        await nursery.start(host.run)
        yield host
        nursery.cancel_scope.cancel()


async def test_js_libp2p_dials_a_host(js_node):
    with trio.fail_after(DEADLINE_S):
        async with host() as node, js_node() as js:
            seen = await js.ask({"dial": str(node.listen_addrs[0])})
            assert seen["peer"] == node.peer_id
            assert seen["encryption"] == "/noise"
            assert seen["muxer"] == "/yamux/1.0.0"
            assert seen["ping_ms"] < 5000
            assert seen["agent"].startswith("mycel/")
            assert {ECHO, "/ipfs/ping/1.0.0", "/ipfs/id/1.0.0"} <= set(seen["protocols"])
            assert seen["observed"].startswith("/ip4/127.0.0.1/tcp/")
            assert seen["signed"] == [str(addr) for addr in node.bound_addrs]
            assert seen["echoed_small"] == 5
            assert seen["echoed_large"] == 3_000_000
            assert seen["unknown"] != "opened"
            (peer,) = node.peers.values()
            assert peer.agent.startswith("js-libp2p/3")
            assert peer.inbound
            assert node.counters.lost == {}


async def test_a_host_dials_js_libp2p(js_node):
    with trio.fail_after(DEADLINE_S):
        async with host() as node, js_node() as js:
            peer = await node.connect([js.addr])
            assert js.addr.endswith(peer)
            assert await node.ping(peer) < 5
            while not node.peers[peer].agent:  # noqa: ASYNC110  identify comes by itself
                await trio.sleep(0.01)
            assert node.peers[peer].agent.startswith("js-libp2p/3")
            assert {ECHO, "/ipfs/ping/1.0.0"} <= set(node.peers[peer].protocols)
            stream = await node.open_stream(peer, ECHO)
            data = bytes(range(256)) * 12_000

            async def write() -> None:
                await stream.send(data)
                await stream.send_eof()

            got = bytearray()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(write)
                while piece := await stream.receive_some():
                    got += piece
            assert got == data
            nobody = await node.open_stream(peer, "/mycel-test/nobody/1")
            await nobody.send(b"hello")
            with pytest.raises(Refused):
                await nobody.receive_some()
            # idle for longer than silence would be forgiven: js-libp2p answers the pings
            await trio.sleep(3.5)
            assert peer in node.peers
            assert node.rtt(peer) is not None


async def test_js_libp2p_and_a_host_dial_each_other_over_websocket(js_node):
    with trio.fail_after(DEADLINE_S):
        async with host("/ip4/127.0.0.1/tcp/0/ws") as node, js_node() as js:
            seen = await js.ask({"dial": str(node.listen_addrs[0])})
            assert seen["peer"] == node.peer_id
            assert seen["echoed_large"] == 3_000_000
        async with host() as node, js_node(listen=["/ip4/127.0.0.1/tcp/0/ws"]) as js:
            assert "/ws/p2p/" in js.addr
            peer = await node.connect([js.addr])
            assert await node.ping(peer) < 5
            assert str(node.peers[peer].addr).endswith("/ws")


async def test_a_killed_js_node_is_noticed_at_once(js_node):
    with trio.fail_after(DEADLINE_S):
        async with host() as node, node.events() as events:
            async with js_node() as js:
                peer = await node.connect([js.addr])
            began = trio.current_time()
            async for event in events:
                if type(event).__name__ == "PeerDown":
                    break
            assert trio.current_time() - began < 0.5
            assert peer not in node.peers
