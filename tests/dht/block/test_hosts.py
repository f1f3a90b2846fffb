"""Blocks between real hosts over loopback, from disk to disk."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from mycel.dht.block.disk import DiskStore
from mycel.dht.block.exchange import Exchange
from mycel.dht.block.manifest import Want
from mycel.node.host import Host
from mycel.node.tcp import TcpNetwork
from mycel.protocol.cid import cid_of, cid_text
from mycel.protocol.keys import OwnKey
from mycel.protocol.limits import DEFAULT_BLOCK_LIMITS
from mycel.protocol.mesh import Access

SIZE = DEFAULT_BLOCK_LIMITS.block_bytes
DATA = [n.to_bytes(4, "big") * (SIZE // 4) for n in range(24)] + [bytes(n) for n in range(1, 40)]
WANTS = [Want(cid_of(data), len(data)) for data in DATA]


@asynccontextmanager
async def exchanging(folder: Path) -> AsyncIterator[tuple[Host, DiskStore, Exchange]]:
    """A host with a store on disk."""
    store = DiskStore(folder)
    key = OwnKey(os.urandom(32))
    host = Host(TcpNetwork(), key, listen=["/ip4/127.0.0.1/tcp/0"], default_access=Access.MEMBER)
    async with trio.open_nursery() as nursery:
        await nursery.start(host.run)
        yield host, store, Exchange(host, store)
        nursery.cancel_scope.cancel()
    store.close()


async def test_blocks_travel_from_disk_to_disk(tmp_path: Path) -> None:
    async with (
        exchanging(tmp_path / "a") as (a, store_a, exchange_a),
        exchanging(tmp_path / "b") as (b, store_b, exchange_b),
        exchanging(tmp_path / "c") as (c, store_c, exchange_c),
    ):
        for n, data in enumerate(DATA):
            await (store_a if n % 2 else store_b).put(WANTS[n].cid, data)
        for host in (a, b):
            await c.connect(host.listen_addrs)
        with trio.fail_after(60):
            await exchange_c.fetch(WANTS)
        assert [await store_c.get(want.cid) for want in WANTS] == DATA
        assert exchange_c.bytes_received == sum(map(len, DATA))
        assert exchange_a.uploads.blocks_sent > 0
        assert exchange_b.uploads.blocks_sent > 0
        assert exchange_c.corrupt == exchange_c.broken == 0


async def test_a_block_damaged_on_the_senders_disk_is_not_sent(tmp_path: Path) -> None:
    """The sender notices by itself and is not taken for a liar; the block comes from another."""
    seeded = DiskStore(tmp_path / "a")
    for want, data in zip(WANTS, DATA, strict=True):
        await seeded.put(want.cid, data)
    seeded.close()
    for want in WANTS[:24]:
        text = cid_text(want.cid)
        (tmp_path / "a" / "blocks" / text[-2:] / text).write_bytes(bytes(SIZE - 1) + b"?")
    async with (
        exchanging(tmp_path / "a") as (a, store_a, _),
        exchanging(tmp_path / "b") as (b, store_b, _),
        exchanging(tmp_path / "c") as (c, store_c, exchange_c),
    ):
        for want, data in zip(WANTS[:24], DATA, strict=False):
            await store_b.put(want.cid, data)
        await c.connect(a.listen_addrs)
        await c.connect(b.listen_addrs)
        with trio.fail_after(60):
            await exchange_c.fetch(WANTS)
        assert [await store_c.get(want.cid) for want in WANTS] == DATA
        assert store_a.damaged >= 1
        assert exchange_c.liars == {}
