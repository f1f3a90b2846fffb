"""Circuit relay v2 with js-libp2p on loopback: it dials through our relay and is reached through it, and a
node of ours is reached through a relay of its kind."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import trio

from mycel.node.host import Host
from mycel.node.reach.relay_client import RelayClient
from mycel.node.reach.relay_server import RelayServer
from mycel.node.tcp import TcpNetwork
from mycel.protocol.errors import ConnectionLost, StreamReset
from mycel.protocol.keys import OwnKey
from mycel.protocol.mesh import Access, PathKind

ECHO = "/mycel-test/echo/1"
DEADLINE_S = 60.0


async def echo(stream):
    while data := await stream.receive_some():
        await stream.send(data)


async def until(holds: Callable[[], object]) -> None:
    while not holds():  # noqa: ASYNC110
        await trio.sleep(0.01)


@asynccontextmanager
async def node(
    number: int, *, relay: bool = False, want: int = 0, relays: tuple[str, ...] = ()
) -> AsyncIterator[tuple[Host, RelayClient]]:
    """A host of nobody's swarm that echoes. One that wants reservations listens nowhere."""
    host = Host(
        TcpNetwork(),
        OwnKey(bytes([number]) * 32),
        listen=[] if want else ["/ip4/127.0.0.1/tcp/0"],
        default_access=Access.STRANGER,
    )
    host.serve_stream(ECHO, echo, access=Access.STRANGER)
    server, client = RelayServer(host), RelayClient(host, relays=relays)
    async with trio.open_nursery() as nursery:
        await nursery.start(host.run)
        await nursery.start(server.run)
        await nursery.start(client.run)
        server.serve(relay)
        client.want(want)
        yield host, client
        nursery.cancel_scope.cancel()


async def echoed(host: Host, peer, count: int) -> bytes:
    stream = await host.open_stream(peer, ECHO)
    await stream.send(bytes(range(256)) * (count // 256))
    got = await stream.receive_exactly(count // 256 * 256)
    await stream.aclose()
    return got


async def test_js_libp2p_reaches_a_node_that_listens_nowhere_through_our_relay(js_node):
    with trio.fail_after(DEADLINE_S):
        async with (
            node(1, relay=True) as (relay, _),
            js_node() as js,
            node(2, want=1, relays=(str(relay.listen_addrs[0]),)) as (hidden, client),
        ):
            await until(lambda: client.addrs)
            seen = await js.ask({"dial": f"{client.addrs[0]}/p2p/{hidden.peer_id}"})
            assert seen["peer"] == hidden.peer_id
            assert seen["limited"]  # js-libp2p is a stranger
            assert seen["encryption"] == "/noise"
            assert seen["muxer"] == "/yamux/1.0.0"
            assert seen["ping_ms"] < 5000
            assert seen["agent"].startswith("mycel/")
            assert seen["echoed_small"] == 5
            assert seen["echoed_large"] == 3_000_000
            assert seen["unknown"] != "opened"
            (peer,) = [one for one in hidden.peers.values() if one.path is PathKind.RELAYED]
            assert peer.agent.startswith("js-libp2p/3")
            assert relay.peer_id in hidden.peers


async def test_a_js_node_behind_our_relay_is_reached(js_node):
    with trio.fail_after(DEADLINE_S):
        async with (
            node(1, relay=True) as (relay, _),
            node(3) as (caller, _client),
            js_node(listen=[f"{relay.listen_addrs[0]}/p2p-circuit"]) as js,
        ):
            addrs: list[str] = []
            while not addrs:
                addrs = [addr for addr in await js.ask({"addrs": True}) if "/p2p-circuit/" in addr]
                await trio.sleep(0.1)
            peer = await caller.connect(addrs)
            assert caller.peers[peer].path is PathKind.RELAYED
            assert await caller.ping(peer) < 5
            assert len(await echoed(caller, peer, 3_000_000)) == 2_999_808


async def test_a_node_is_reached_through_a_js_relay_within_its_limits(js_node):
    with trio.fail_after(DEADLINE_S):
        async with (
            js_node(relay=True) as js,
            node(3) as (caller, _),
            node(2, want=1, relays=(js.addr,)) as (hidden, client),
        ):
            await until(lambda: client.addrs)
            addrs = [f"{addr}/p2p/{hidden.peer_id}" for addr in client.addrs]
            peer = await caller.connect(addrs)
            assert caller.peers[peer].path is PathKind.RELAYED
            assert await caller.ping(peer) < 5
            assert len(await echoed(caller, peer, 20_480)) == 20_480
            # js-libp2p relays let 128 KiB pass: then the circuit ends, and a new one is made
            async with caller.events() as events:
                with pytest.raises((ConnectionLost, StreamReset)):
                    await echoed(caller, peer, 1_024_000)
                async for event in events:
                    assert "131072 bytes" in event.text
                    break
            assert await caller.connect(addrs) == peer
            assert len(await echoed(caller, peer, 20_480)) == 20_480


async def test_js_libp2p_reaches_a_node_through_a_js_relay(js_node):
    with trio.fail_after(DEADLINE_S):
        async with (
            js_node(relay=True) as js,
            js_node() as other,
            node(2, want=1, relays=(js.addr,)) as (hidden, client),
        ):
            await until(lambda: client.addrs)
            stream = await hidden.open_stream(client.relays[0], "/ipfs/ping/1.0.0")
            await stream.send(bytes(32))
            assert await stream.receive_exactly(32) == bytes(32)
            addr = f"{client.addrs[0]}/p2p/{hidden.peer_id}"
            seen = await other.ask({"dial": addr, "large": 20_000})
            assert seen["peer"] == hidden.peer_id
            assert seen["echoed_large"] == 20_000
