"""Many connections one after the other, on real sockets: nothing is left behind."""

from __future__ import annotations

import functools
import gc
import os

import psutil
import pytest
import trio
import trio.testing

from mycel.node.host import Host
from mycel.node.tcp import TcpNetwork
from mycel.protocol.keys import OwnKey
from mycel.protocol.mesh import Access

CONNECTIONS = int(os.environ.get("MYCEL_TEST_CONNECTIONS", "4000"))
"""How many; `make soak` asks for ten thousand."""

WARM = CONNECTIONS // 2
"""After so many everything that is remembered has its full size; what grows after that is a leak."""


def living_tasks():
    return trio.lowlevel.current_statistics().tasks_living


async def settled(hosts, tasks, seconds=15.0):
    """Return once no host has a connection or stream, and no more than so many tasks live."""
    with trio.fail_after(seconds):
        while any(host.connections or host.streams for host in hosts) or living_tasks() > tasks:  # noqa: ASYNC110
            await trio.sleep(0.05)


def resources():
    """(File descriptors, objects, bytes), with the caches of functions emptied: those are bounded."""
    for cached in [one for one in gc.get_objects() if type(one) is functools._lru_cache_wrapper]:
        cached.cache_clear()
    gc.collect()
    process = psutil.Process()
    return process.num_fds(), len(gc.get_objects()), process.memory_info().rss


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_thousands_of_connections_in_sequence_leave_nothing_behind():
    network = TcpNetwork()
    served = 0

    async def serve(stream):
        nonlocal served
        await stream.send(await stream.receive_exactly(5), end=True)
        served += 1

    near = Host(network, OwnKey(b"\x61" * 32), default_access=Access.MEMBER)
    far = Host(network, OwnKey(b"\x62" * 32), listen=["/ip4/127.0.0.1/tcp/0"], default_access=Access.MEMBER)
    far.serve_stream("/once", serve)
    async with trio.open_nursery() as nursery:
        await nursery.start(near.run)
        await nursery.start(far.run)
        addrs = far.listen_addrs
        await trio.testing.wait_all_tasks_blocked()
        tasks = living_tasks()
        before = resources()
        for number in range(CONNECTIONS):
            peer = await near.connect(addrs)
            if number % 10 == 0:
                stream = await near.open_stream(peer, "/once")
                await stream.send(b"hello", end=True)
                assert await stream.receive_exactly(5) == b"hello"
            near.disconnect(peer, "next")
            if number == WARM:
                await settled([near, far], tasks)
                before = resources()
        await settled([near, far], tasks)
        after = resources()
        assert near.counters.opened == CONNECTIONS
        assert served == len(range(0, CONNECTIONS, 10))
        assert not near.peers
        assert not far.peers
        assert after[0] <= before[0]
        assert after[1] - before[1] < (CONNECTIONS - WARM) / 4  # objects: not one for every fourth connection
        # Bytes: the heap's shape, earlier tests' included, is worth some MiB; a connection takes 100 kB.
        assert after[2] - before[2] < 64 << 20
        nursery.cancel_scope.cancel()
