"""DCUtR with js-libp2p: a connection that came through our relay becomes direct, whoever of the two leads.

js-libp2p dials public addresses only, and takes a name for one: so the fresh port is told as localhost. This
side dials nobody, as it does with strangers that it has not seen; js-libp2p's packets are enough here.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio
from multiaddr import Multiaddr

from mycel.node.host import Host
from mycel.node.reach.dcutr import Dcutr
from mycel.node.reach.echo import Echo
from mycel.node.reach.locate import Located, Locator
from mycel.node.reach.relay_client import RelayClient
from mycel.node.reach.relay_server import RelayServer
from mycel.node.tcp import TcpNetwork
from mycel.protocol import dcutr
from mycel.protocol.address import endpoint_of
from mycel.protocol.keys import OwnKey
from mycel.protocol.limits_reach import DEFAULT_PUNCH_LIMITS
from mycel.protocol.mesh import Access, PathKind

ECHO = "/mycel-test/echo/1"
DEADLINE_S = 60.0


class LocalNames(Locator):
    """Tells a port as localhost's."""

    async def locate(self, doorstep, own_ips, relay, *, task_status):
        port = endpoint_of(doorstep.beside("127.0.0.1")).port
        task_status.started(Located((f"/dns4/localhost/tcp/{port}",), (), symmetric=False, guessed=True))
        await trio.sleep_forever()


async def echo(stream):
    while data := await stream.receive_some():
        await stream.send(data)


async def until(holds: Callable[[], object]) -> None:
    while not holds():  # noqa: ASYNC110
        await trio.sleep(0.01)


@asynccontextmanager
async def town() -> AsyncIterator[tuple[Host, Host, RelayClient, Dcutr]]:
    """(a relay, a host that listens nowhere, its circuits, its upgrades)."""
    async with trio.open_nursery() as nursery:
        hosts = []
        for number, listen in ((1, ["/ip4/127.0.0.1/tcp/0"]), (2, [])):
            key = OwnKey(bytes([number]) * 32)
            hosts.append(Host(TcpNetwork(), key, listen=listen, default_access=Access.STRANGER))
            await nursery.start(hosts[-1].run)
        relay, hidden = hosts
        hidden.serve_stream(ECHO, echo, access=Access.STRANGER)
        server = RelayServer(relay)
        client = RelayClient(hidden, relays=(str(relay.listen_addrs[0]),))
        upgrades = Dcutr(
            hidden,
            TcpNetwork(),
            LocalNames(hidden, Echo(hidden, TcpNetwork()), DEFAULT_PUNCH_LIMITS),
            lambda peer, addr: False,
        )
        await nursery.start(server.run)
        await nursery.start(client.run)
        server.serve(True)
        client.want(1)
        await until(lambda: client.addrs)
        yield relay, hidden, client, upgrades
        nursery.cancel_scope.cancel()


async def test_a_node_that_js_libp2p_called_leads(js_node):
    with trio.fail_after(DEADLINE_S):
        async with town() as (relay, hidden, client, upgrades), js_node(dcutr=True) as js:
            seen = await js.ask({"dial": f"{client.addrs[0]}/p2p/{hidden.peer_id}", "large": 1000})
            assert seen["limited"]
            assert dcutr.PROTOCOL in seen["protocols"]
            (peer,) = [peer for peer in hidden.peers if peer != relay.peer_id]
            assert hidden.peers[peer].path is PathKind.RELAYED
            await upgrades.lead(peer)
            info = hidden.peers[peer]
            assert info.path is PathKind.DIRECT
            assert info.inbound, "who called through the relay dials"
            assert await hidden.ping(peer) < 5


async def test_js_libp2p_that_was_called_leads(js_node):
    with trio.fail_after(DEADLINE_S):
        async with town() as (relay, hidden, _, _):
            at = Multiaddr(f"{relay.listen_addrs[0]}/p2p-circuit")
            async with js_node(dcutr=True, listen=[str(at)]) as js:
                while not (addrs := await js.ask({"addrs": True})):  # noqa: ASYNC110
                    await trio.sleep(0.05)
                peer = await hidden.connect(addrs)
                assert hidden.peers[peer].path is PathKind.RELAYED
                await until(lambda: hidden.peers[peer].path is PathKind.DIRECT)
                # js-libp2p 3 dials here, too, where the specification has it listen.
                assert hidden.peers[peer].inbound
                assert await hidden.ping(peer) < 5
