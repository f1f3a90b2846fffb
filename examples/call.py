"""A service of your own between two nodes: python examples/call.py [--simulated]

One node founds a swarm and serves a method, another joins it by ticket and calls it, and one from elsewhere
is turned away. With --simulated the same code runs in the internet in memory, over a line of 80 ms.
"""

from __future__ import annotations

import sys

import msgspec
import trio

from mycel.node.host import Host
from mycel.node.tcp import TcpNetwork
from mycel.protocol.errors import Refused
from mycel.protocol.identity import SigningKey
from mycel.protocol.keys import OwnKey
from mycel.protocol.membership import Credentials, Membership, found_swarm
from mycel.protocol.mesh import Access
from mycel.protocol.network import Network
from mycel.protocol.rpc import Call, Method, Rpc
from mycel.protocol.ticket import issue_ticket, parse_ticket
from mycel.simnet import clock
from mycel.simnet.internet import InternetOptions, internet
from mycel.simnet.link import LinkOptions
from mycel.simnet.network import SimNetwork


class Text(msgspec.Struct):
    """What is asked."""

    text: str


class Count(msgspec.Struct):
    """What is answered."""

    words: int


COUNT_WORDS = Method("example.count-words", Text, Count, access=Access.SUBMIT)


async def count_words(call: Call, request: Text) -> Count:
    """The method's handler; `call` says who asks, with which role, and how long there is."""
    return Count(len(request.text.split()))


async def main(networks: list[Network], listen: str) -> None:
    """Three nodes, one on each network."""
    at_home, abroad, elsewhere = networks
    async with trio.open_nursery() as nursery:
        root = SigningKey(at_home.entropy(32))
        key = OwnKey(at_home.entropy(32))
        founder = Membership(found_swarm(key.peer_id, root, at_home.wall()), at_home.wall)
        server = Host(at_home, key, listen=[listen], membership=founder)
        await nursery.start(server.run)
        rpc = Rpc(server)
        rpc.serve(COUNT_WORDS, count_words)
        await nursery.start(rpc.run)

        ticket = issue_ticket(root, access=Access.SUBMIT, now=at_home.wall(), entropy=at_home.entropy)
        text = ticket.with_bootstrap(server.listen_addrs).text()
        print(f"the ticket: {text[:40]}... ({len(text)} characters)")

        await call_with(text, abroad, nursery)
        await call_without(text, elsewhere, nursery)
        nursery.cancel_scope.cancel()


async def call_with(text: str, network: Network, nursery: trio.Nursery) -> None:
    """Join by ticket, then call."""
    ticket, key = parse_ticket(text), OwnKey(network.entropy(32))
    credentials = Credentials(key.peer_id, ticket.root, ticket.chain_for(key.peer_id))
    client = Host(network, key, membership=Membership(credentials, network.wall))
    await nursery.start(client.run)
    rpc = Rpc(client)
    await nursery.start(rpc.run)
    server = await client.connect(ticket.bootstrap)
    began = trio.current_time()
    answer = await rpc.call(server, COUNT_WORDS, Text("one for all and all for one"), deadline_s=5)
    print(f"{answer.words} words, says {server[-8:]} after {1000 * (trio.current_time() - began):.1f} ms")


async def call_without(text: str, network: Network, nursery: trio.Nursery) -> None:
    """Knock with the papers of another swarm."""
    key = OwnKey(network.entropy(32))
    credentials = found_swarm(key.peer_id, SigningKey(network.entropy(32)), network.wall())
    stranger = Host(network, key, membership=Membership(credentials, network.wall))
    await nursery.start(stranger.run)
    try:
        await stranger.connect(parse_ticket(text).bootstrap)
    except Refused as refused:
        print(f"another swarm's node is turned away: {refused.reason}")


async def simulated() -> None:
    """The same on three machines of the internet in memory."""
    line = LinkOptions(latency_s=0.020)  # from each machine to the backbone: 80 ms there and back
    async with internet(InternetOptions(seed=7, link=line)) as net:
        await main(
            [SimNetwork(net.add(name)) for name in ("home", "abroad", "elsewhere")], "/ip4/0.0.0.0/tcp/4001"
        )


if __name__ == "__main__":
    if sys.argv[1:] == ["--simulated"]:
        clock.run(simulated, 7)
    else:
        real: list[Network] = [TcpNetwork(), TcpNetwork(), TcpNetwork()]
        trio.run(main, real, "/ip4/127.0.0.1/tcp/0")
