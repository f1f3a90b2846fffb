"""Interoperation with js-libp2p (its current major) on loopback: it dials a host, and is dialed by one."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from mycel.node.host import Host
from mycel.node.tcp import TcpNetwork
from mycel.protocol.errors import Refused
from mycel.protocol.keys import OwnKey
from mycel.protocol.mesh import Access

JS = Path(__file__).parent / "js"
ECHO = "/mycel-test/echo/1"
DEADLINE_S = 60.0


@pytest.fixture(scope="module")
def js_ready() -> None:
    """node, npm and the packages that package-lock.json names."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("node and npm are needed for the interop test with js-libp2p; install node 20 or newer")
    if not (JS / "node_modules" / ".package-lock.json").exists():
        done = subprocess.run(
            ["npm", "ci", "--no-audit", "--no-fund"], cwd=JS, capture_output=True, text=True, check=False
        )
        if done.returncode:
            pytest.skip(f"npm ci failed in {JS.name}/: {done.stderr.strip()[-300:]}")


class JsNode:
    """A running js-libp2p node."""

    def __init__(self, process: trio.Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._stdin = process.stdin
        self._stdout = process.stdout
        self._held = b""
        self.addr = ""

    async def answer(self) -> dict[str, Any]:
        """The next line it prints."""
        while b"\n" not in self._held:
            piece = await self._stdout.receive_some()
            assert piece, "the js node ended"
            self._held += piece
        line, _, self._held = self._held.partition(b"\n")
        return json.loads(line)

    async def ask(self, command: dict[str, Any]) -> dict[str, Any]:
        """Its answer to `command`."""
        await self._stdin.send_all(json.dumps(command).encode() + b"\n")
        answer = await self.answer()
        assert "error" not in answer, answer["error"]
        return answer


@asynccontextmanager
async def js_node() -> AsyncIterator[JsNode]:
    """A js-libp2p node on loopback."""
    process = await trio.lowlevel.open_process(
        ["node", str(JS / "node.mjs")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        node = JsNode(process)
        node.addr = (await node.answer())["listen"]
        yield node
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()


async def echo(stream):
    while data := await stream.receive_some():
        await stream.send(data)


@asynccontextmanager
async def host() -> AsyncIterator[Host]:
    """A host on loopback that serves `ECHO`."""
    host = Host(
        TcpNetwork(),
        OwnKey(b"\x51" * 32),
        listen=["/ip4/127.0.0.1/tcp/0"],
        default_access=Access.STRANGER,
    )
    host.serve_stream(ECHO, echo, access=Access.STRANGER)
    async with trio.open_nursery() as nursery:
        await nursery.start(host.run)
        yield host
        nursery.cancel_scope.cancel()


async def test_js_libp2p_dials_a_host(js_ready):
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


async def test_a_host_dials_js_libp2p(js_ready):
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


async def test_a_killed_js_node_is_noticed_at_once(js_ready):
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
