"""WebSocket as a way to a node: on both networks, and against what else may knock at a web port."""

from __future__ import annotations

import ssl

import pytest
import trio
from multiaddr import Multiaddr

from mycel.node.daemon import choose_ports
from mycel.node.host import Host
from mycel.node.memory import VolatileMemory
from mycel.node.tcp import TcpNetwork
from mycel.node.tls import server_context
from mycel.node.transports import PENDING_MAX, Transports
from mycel.protocol.address import tcp_of, web_of
from mycel.protocol.errors import AddressError, DialError
from mycel.protocol.keys import OwnKey
from mycel.protocol.mesh import Access
from mycel.simnet import clock
from mycel.simnet.internet import internet
from mycel.simnet.network import SimNetwork

LOOPBACK = "/ip4/127.0.0.1/tcp/0/ws"


async def meet(near_network, far_network, listen):
    """Two hosts, connected from near to far, and what they echo to each other."""
    near = Host(near_network, OwnKey(b"\x11" * 32), default_access=Access.MEMBER)
    far = Host(far_network, OwnKey(b"\x12" * 32), listen=[listen], default_access=Access.MEMBER)

    async def echo(stream):
        while data := await stream.receive_some():
            await stream.send(data)

    far.serve_stream("/echo", echo)
    async with trio.open_nursery() as nursery:
        await nursery.start(near.run)
        await nursery.start(far.run)
        peer = await near.connect(far.listen_addrs)
        stream = await near.open_stream(peer, "/echo")
        payload = bytes(range(256)) * 4096
        nursery.start_soon(stream.send, payload)
        assert await stream.receive_exactly(len(payload)) == payload
        addr = near.peers[peer].addr
        nursery.cancel_scope.cancel()
    return str(addr)


async def test_hosts_meet_over_websocket():
    network = Transports(TcpNetwork())
    assert (await meet(network, network, LOOPBACK)).endswith("/ws")


def test_hosts_meet_over_websocket_on_the_simulated_internet():
    async def main():
        async with internet() as net:
            near, far = (Transports(SimNetwork(net.add(name))) for name in "ab")
            assert "/tcp/80/ws" in await meet(near, far, "/ip4/0.0.0.0/tcp/80/ws")

    clock.run(main, seed=1)


async def test_a_tcp_address_goes_to_the_network_below():
    network = Transports(TcpNetwork())
    assert not (await meet(network, network, "/ip4/127.0.0.1/tcp/0")).endswith("/ws")


async def test_what_is_no_websocket_is_dropped_and_a_silent_newcomer_holds_up_nobody():
    network = Transports(TcpNetwork())
    listener = await network.listen(Multiaddr(LOOPBACK))
    tcp = web_of(listener.addr).tcp
    silent = await TcpNetwork().dial(tcp)
    for noise in (b"\x00" * 64, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"GET / HTTP/1.1\r\n" + b"a" * 70000):
        knocker = await TcpNetwork().dial(tcp)
        knocker.try_send(noise)
        with trio.fail_after(5):
            await knocker.wait_readable()  # an answer or the end, and not silence
        knocker.reset()
    with trio.fail_after(5):
        pipe = await network.dial(listener.addr)
        accepted = await listener.accept()
    for end in (silent, pipe, accepted):
        end.reset()
    listener.close()


async def test_newcomers_in_handshake_are_bounded():
    network = Transports(TcpNetwork())
    listener = await network.listen(Multiaddr(LOOPBACK))
    tcp = web_of(listener.addr).tcp
    knockers = []

    async def is_turned_away():
        try:
            knockers.append(await TcpNetwork().dial(tcp))
        except DialError:
            return True  # reset before the dial was through
        with trio.move_on_after(0.2 if len(knockers) > PENDING_MAX else 0):
            await knockers[-1].wait_readable()
            return True
        return False

    with trio.fail_after(10):
        while not await is_turned_away():
            pass
    assert len(knockers) >= PENDING_MAX
    for pipe in knockers:
        pipe.reset()
    listener.close()


async def test_a_server_that_speaks_no_websocket_is_a_dial_error():
    below = await TcpNetwork().listen(Multiaddr("/ip4/127.0.0.1/tcp/0"))

    async def answer():
        pipe = await below.accept()
        await pipe.wait_readable()
        pipe.try_send(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")
        pipe.close()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(answer)
        with pytest.raises(DialError, match="refused WebSocket with HTTP status 403"), trio.fail_after(5):
            await Transports(TcpNetwork()).dial(Multiaddr(f"{below.addr}/ws"))
        nursery.cancel_scope.cancel()
    below.close()


async def test_a_listener_for_tls_wants_a_certificate(tmp_path):
    with pytest.raises(AddressError, match="set web_certificate"):
        await Transports(TcpNetwork()).listen(Multiaddr("/ip4/127.0.0.1/tcp/0/tls/ws"))
    (tmp_path / "junk.pem").write_text("junk")
    with pytest.raises(AddressError, match="PEM files that belong together"):
        server_context(tmp_path / "junk.pem", tmp_path / "junk.pem")


async def test_a_dialer_that_speaks_no_tls_is_dropped(tmp_path):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)  # without a certificate no handshake succeeds
    network = Transports(TcpNetwork(), server_tls=context)
    listener = await network.listen(Multiaddr("/ip4/127.0.0.1/tcp/0/tls/ws"))
    with pytest.raises(DialError, match="does not speak TLS"), trio.fail_after(5):
        await network.dial(listener.addr)
    listener.close()


async def test_a_web_port_is_kept_over_a_restart():
    network, memory = Transports(TcpNetwork()), VolatileMemory()
    first = await choose_ports([LOOPBACK], network, memory)
    assert tcp_of(first[0]).port
    assert first[0].endswith("/ws")
    assert await choose_ports([LOOPBACK], network, memory) == first
