"""The other ends of bench/blocks.py, each a process of its own with a store on disk.

    blocks_far.py FOLDER UPLINK

serves the blocks in FOLDER at UPLINK bytes per second (0: as fast as it goes) and prints its address as a
line of JSON. Each line of JSON on its input is done and answered by one: {"connect": [addresses]} or
{"fetch": root, "only": peer or null}. On a RAW stream it sends as many bytes as it is asked for, and no
more.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import trio

from mycel.dht.block.disk import DiskStore
from mycel.dht.block.exchange import Exchange
from mycel.dht.block.model import Sources, fetch_model
from mycel.node.host import Host
from mycel.node.tcp import TcpNetwork
from mycel.protocol.cid import parse_cid
from mycel.protocol.keys import OwnKey
from mycel.protocol.limits import MIB
from mycel.protocol.mesh import Access, Stream

RAW = "/bench/raw/1"
CHUNK = bytes(2 * MIB)


async def send_raw(stream: Stream) -> None:
    """Send as many bytes as the other side says in 8 bytes."""
    count = int.from_bytes(await stream.receive_exactly(8), "big")
    for _ in range(count // len(CHUNK)):
        await stream.send(CHUNK)
    await stream.aclose()


async def main(folder: str, uplink: str) -> None:
    """Serve until standard input ends."""
    key = OwnKey(os.urandom(32))
    host = Host(TcpNetwork(), key, listen=["/ip4/127.0.0.1/tcp/0"], default_access=Access.MEMBER)
    host.serve_stream(RAW, send_raw)
    exchange = Exchange(host, DiskStore(Path(folder)), upload_bytes_per_s=float(uplink))
    async with trio.open_nursery() as nursery:
        await nursery.start(host.run)
        print(json.dumps({"addr": str(host.listen_addrs[0]), "peer": host.peer_id}), flush=True)
        while line := await trio.to_thread.run_sync(sys.stdin.readline):
            print(json.dumps(await answer(host, exchange, json.loads(line))), flush=True)
        nursery.cancel_scope.cancel()


async def answer(host: Host, exchange: Exchange, asked: dict[str, Any]) -> dict[str, Any]:
    """Do what one line says."""
    if "connect" in asked:
        for addr in asked["connect"]:
            await host.connect([addr])
        return {}
    before = exchange.bytes_received
    began = time.perf_counter()
    only = [asked["only"]] if asked["only"] else None
    await fetch_model(exchange, parse_cid(asked["fetch"]), sources=Sources(only))
    return {"s": time.perf_counter() - began, "received": exchange.bytes_received - before}


if __name__ == "__main__":
    trio.run(main, *sys.argv[1:])
