"""What only real sockets have: descriptors, resolvers, and closing over unread bytes."""

from __future__ import annotations

import os
import resource
import socket

import pytest
import trio
from multiaddr import Multiaddr

from mycel.node import tcp
from mycel.node.tcp import TcpNetwork
from mycel.protocol.address import endpoint_of
from mycel.protocol.errors import DialError

LOOPBACK = Multiaddr("/ip4/127.0.0.1/tcp/0")


def open_descriptors():
    return len(os.listdir("/proc/self/fd"))


async def until_open_are(count):
    with trio.fail_after(10):
        while True:
            if open_descriptors() <= count:
                return
            await trio.sleep(0.01)


async def test_two_thousand_connections_in_sequence_leave_no_descriptor():
    network = TcpNetwork()
    listener = await network.listen(LOOPBACK)
    before = open_descriptors()
    for number in range(2000):
        near = await network.dial(listener.addr)
        far = await listener.accept()
        near.try_send(b"x")
        (near.close if number % 2 else near.reset)()
        far.close()
    await until_open_are(before)  # pipes that were closed over unsent bytes linger a moment
    listener.close()


async def test_a_refused_and_a_cancelled_dial_leave_no_descriptor():
    network = TcpNetwork()
    listener = await network.listen(LOOPBACK)
    listener.close()
    before = open_descriptors()
    for _ in range(50):
        with pytest.raises(DialError):
            await network.dial(listener.addr)
        with trio.CancelScope() as scope:
            scope.cancel()
            await network.dial(listener.addr)
    assert open_descriptors() == before


async def test_an_acceptor_out_of_descriptors_waits_and_goes_on():
    network = TcpNetwork()
    listener = await network.listen(LOOPBACK)
    near = await network.dial(listener.addr)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # The lowest free descriptor number is what the next accept would get: allow no number that high.
    probe = os.dup(0)
    os.close(probe)
    accepted = []

    async def accept():
        accepted.append(await listener.accept())

    async with trio.open_nursery() as nursery:
        resource.setrlimit(resource.RLIMIT_NOFILE, (probe, hard))
        try:
            nursery.start_soon(accept)
            await trio.sleep(0.2)
            assert not accepted
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert accepted[0].remote == near.local
    for thing in (near, accepted[0], listener):
        thing.close()


async def test_a_name_with_several_addresses_is_dialled_at_all_of_them(monkeypatch):
    network = TcpNetwork()
    listener = await network.listen(LOOPBACK)
    port = endpoint_of(listener.addr).port

    async def resolve(host, port, *_):
        return [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, port))
            for ip in ("127.0.0.2", "127.0.0.3", "127.0.0.1", "127.0.0.1")
        ]

    monkeypatch.setattr(trio.socket, "getaddrinfo", resolve)
    before = open_descriptors()
    pipe = await network.dial(Multiaddr(f"/dns/several.example/tcp/{port}"))
    assert pipe.remote == listener.addr
    pipe.close()
    listener.close()
    with pytest.raises(DialError) as caught:
        await network.dial(Multiaddr(f"/dns/several.example/tcp/{port}"))
    assert all(f"127.0.0.{last}" in str(caught.value) for last in (1, 2, 3))
    assert open_descriptors() <= before


async def test_a_port_that_dials_itself_finds_nobody():
    """TCP's simultaneous open connects a free ephemeral port to itself; that is no peer."""
    network = TcpNetwork()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    addr = Multiaddr(f"/ip4/127.0.0.1/tcp/{port}")
    with pytest.raises(DialError, match="refused"):
        await network.dial(addr, local=addr)


async def test_a_closed_pipe_gives_up_on_a_reader_who_never_reads(monkeypatch):
    monkeypatch.setattr(tcp, "LINGER_S", 0.2)
    network = TcpNetwork()
    listener = await network.listen(LOOPBACK)
    before = open_descriptors()
    near = await network.dial(listener.addr)
    far = await listener.accept()
    while near.try_send(bytes(1 << 20)):
        pass
    near.close()
    assert open_descriptors() == before + 2  # it still sends
    await until_open_are(before + 1)
    far.close()
    listener.close()


async def test_nagle_is_off_and_buffers_are_left_to_the_kernel():
    network = TcpNetwork()
    listener = await network.listen(LOOPBACK)
    near = await network.dial(listener.addr)
    far = await listener.accept()
    fresh = socket.socket()
    for pipe in (near, far):
        sock = pipe._sock
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) >= fresh.getsockopt(
            socket.SOL_SOCKET, socket.SO_RCVBUF
        )
    fresh.close()
    for thing in (near, far, listener):
        thing.close()
