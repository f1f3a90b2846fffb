"""The two other ends of bench/relay.py, each a process of its own: `relay`, and `far ADDR` which is reached
directly and through it.

Prints one line of JSON with its address, then serves until its input ends.
"""

from __future__ import annotations

import json
import os
import sys

import trio
from rpc_far import SINK, sink

from mycel.node.host import Host
from mycel.node.reach.relay_client import RelayClient
from mycel.node.reach.relay_server import RelayServer
from mycel.node.tcp import TcpNetwork
from mycel.protocol.keys import OwnKey
from mycel.protocol.limits_reach import RelayLimits
from mycel.protocol.mesh import Access

UNBOUND = RelayLimits(bytes_per_s=0, bytes_per_s_per_peer=0)


async def main(role: str, relay: str = "") -> None:
    """Serve until standard input ends."""
    host = Host(
        TcpNetwork(), OwnKey(os.urandom(32)), listen=["/ip4/127.0.0.1/tcp/0"], default_access=Access.MEMBER
    )
    host.serve_stream(SINK, sink)
    async with trio.open_nursery() as nursery:
        await nursery.start(host.run)
        said = {"direct": str(host.listen_addrs[0]), "pid": os.getpid()}
        if role == "relay":
            server = RelayServer(host, UNBOUND)
            await nursery.start(server.run)
            server.serve(True)
        else:
            client = RelayClient(host, relays=[relay])
            await nursery.start(client.run)
            client.want(1)
            while not client.addrs:  # noqa: ASYNC110
                await trio.sleep(0.01)
            said["relayed"] = f"{client.addrs[0]}/p2p/{host.peer_id}"
        print(json.dumps(said), flush=True)
        await trio.to_thread.run_sync(sys.stdin.read)
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(main, *sys.argv[1:])
