"""Where a peer can be dialled, in its own words: a record that each node keeps up to date.

Peers that answer questions stand in others' tables with their addresses; those that cannot be called (client
mode) stand nowhere, and are reached through relays that change. So every node states its addresses in a
record, `addrs`: a msgpack array of up to 8 multiaddrs in their binary form. Who knows no more of a member
than its id reads that, and asks the peers next to the id at the same time; the member's own word goes first.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import trio
from multiaddr import Multiaddr

from mycel.dht.kad.key import bytes_of_peer
from mycel.dht.kad.message import ADDR_BYTES_MAX, ADDRS_MAX
from mycel.dht.kad.service import Kademlia
from mycel.dht.kad.table import Contact
from mycel.protocol.mesh import PeerId

NAME = "addrs"


def write(addrs: Sequence[Multiaddr]) -> bytes:
    """What to state; `addrs` end in /p2p/ID each, as `Mesh.listen_addrs` has them, which is left out."""
    raw = [Multiaddr(str(addr).rpartition("/p2p/")[0]).to_bytes() for addr in addrs]
    return msgspec.msgpack.encode([one for one in raw if len(one) <= ADDR_BYTES_MAX][:ADDRS_MAX])


def read(value: bytes) -> tuple[bytes, ...]:
    """What was stated; nothing where it makes no sense."""
    try:
        addrs = msgspec.msgpack.decode(value, type=list[bytes])
    except (msgspec.MsgspecError, RecursionError):
        return ()
    return tuple(addr for addr in addrs[:ADDRS_MAX] if 0 < len(addr) <= ADDR_BYTES_MAX)


async def find(kad: Kademlia, peer: PeerId) -> Contact | None:
    """Where `peer` can be dialled, None where nobody knows. Raises `ValueError` for text that is no id."""
    bytes_of_peer(peer)  # raises here, not in a task
    told: list[Contact] = []
    stated: tuple[bytes, ...] = ()

    async def ask_neighbours() -> None:
        found = await kad.find_peer(peer)
        told.extend([] if found is None else [found])

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask_neighbours)
        found = await kad.get(peer, NAME)
        if found is not None and not found.record.names_block:
            stated = read(found.record.value)
    addrs = tuple(dict.fromkeys([*stated, *(addr for one in told for addr in one.addrs)]))
    return Contact(peer, addrs[:ADDRS_MAX]) if addrs else None
