"""Interoperation with py-libp2p on loopback: it dials a host, and is dialed by one."""

from __future__ import annotations

import gc
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest
import trio
from libp2p import new_host
from libp2p.abc import IHost
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_noise_key
from libp2p.host.ping import PingService
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import info_from_p2p_addr
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport as Noise
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX
from libp2p.stream_muxer.yamux.yamux import Yamux
from multiaddr import Multiaddr

from mycel.node.host import Host
from mycel.node.tcp import TcpNetwork
from mycel.protocol.errors import Refused
from mycel.protocol.keys import OwnKey
from mycel.protocol.mesh import Access

ECHO = "/mycel-test/echo/1"
DEADLINE_S = 60.0


@pytest.fixture(autouse=True)
def forget_leaks() -> Iterator[None]:
    """py-libp2p leaves sockets to the garbage collector, whose warnings must not fail a later test."""
    yield
    gc.collect()


async def echo(stream):
    while data := await stream.receive_some():
        await stream.send(data)


async def their_echo(stream):
    data = await stream.read(1000)
    await stream.write(data)
    await stream.close()


@asynccontextmanager
async def both() -> AsyncIterator[tuple[Host, IHost]]:
    """A host and a py-libp2p host, each listening on loopback."""
    logging.getLogger("libp2p").setLevel(logging.CRITICAL)
    ours = Host(
        TcpNetwork(), OwnKey(b"\x52" * 32), listen=["/ip4/127.0.0.1/tcp/0"], default_access=Access.STRANGER
    )
    ours.serve_stream(ECHO, echo, access=Access.STRANGER)
    pair = create_new_key_pair(b"\x53" * 32)
    theirs = new_host(
        key_pair=pair,
        sec_opt={NOISE: Noise(pair, noise_privkey=create_noise_key().private_key)},
        muxer_opt={YAMUX: Yamux},
    )
    theirs.set_stream_handler(ECHO, their_echo)
    async with trio.open_nursery() as nursery:
        await nursery.start(ours.run)
        async with theirs.run(listen_addrs=[Multiaddr("/ip4/127.0.0.1/tcp/0")]):
            yield ours, theirs
        nursery.cancel_scope.cancel()


@pytest.mark.filterwarnings("ignore")
async def test_a_host_dials_py_libp2p():
    with trio.fail_after(DEADLINE_S):
        async with both() as (ours, theirs):
            peer = await ours.connect([str(theirs.get_addrs()[0])])
            assert peer == theirs.get_id().to_string()
            stream = await ours.open_stream(peer, ECHO)
            await stream.send(b"from us")
            assert await stream.receive_exactly(7) == b"from us"
            assert await ours.ping(peer) < 5
            while not ours.peers[peer].protocols:  # noqa: ASYNC110
                await trio.sleep(0.01)
            assert ECHO in ours.peers[peer].protocols
            nobody = await ours.open_stream(peer, "/mycel-test/nobody/1")
            await nobody.send(b"hello")
            with pytest.raises(Refused):
                await nobody.receive_some()


@pytest.mark.filterwarnings("ignore")
async def test_py_libp2p_dials_a_host():
    with trio.fail_after(DEADLINE_S):
        async with both() as (ours, theirs):
            await theirs.connect(info_from_p2p_addr(ours.listen_addrs[0]))
            us = ID.from_string(ours.peer_id)
            stream = await theirs.new_stream(us, [ECHO])
            await stream.write(b"from them")
            assert await stream.read(100) == b"from them"
            await stream.close()
            assert len(await PingService(theirs).ping(us, ping_amt=3)) == 3
            peer = theirs.get_id().to_string()
            while peer not in ours.peers or not ours.peers[peer].protocols:  # noqa: ASYNC110
                await trio.sleep(0.01)
            assert ours.peers[peer].inbound
            assert ours.counters.lost == {}
