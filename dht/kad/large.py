"""Values that no record holds: a block holds them, and the record says which.

    values = Values(kad, blocks)
    await values.put("config", 700_000 bytes)
    read = await values.get(author, "config")      # read.value, read.found.replicas, ...

The record's value is then the msgpack array [CID, bytes]. Its author keeps the block pinned as long as it
states it, and says in Kademlia that it provides it; who read it says so too, for an hour, so that a value
that many want does not hang on one line. A value up to `value_bytes` is in the record itself, as ever. The
block is as good as its name, so it does not matter who gives it.

A block is not copied by the 20 who keep the record: a large value is lost when its author and all its recent
readers are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec
import trio

from mycel.dht.kad.ask import FAILURES
from mycel.dht.kad.place import find
from mycel.dht.kad.service import Found, Kademlia, Stored
from mycel.dht.kad.table import Contact
from mycel.protocol.cid import Cid, cid_from, cid_text
from mycel.protocol.errors import DialError, LimitExceeded, RemoteProtocolError
from mycel.protocol.mesh import PeerId

SOURCES = 4
"""Peers that are connected to for a value."""


class Blocks(Protocol):
    """What keeps and fetches blocks."""

    async def add_bytes(self, data: bytes, *, pin: str | None = None) -> Cid:
        """Keep `data` as one block, pinned under `pin`; its name."""

    async def fetch(self, cid: Cid, holders: Sequence[PeerId] = ()) -> bytes:
        """The block, from here or from connected peers, `holders` first."""

    async def unpin(self, pin: str) -> None:
        """Let go what was pinned so."""


@dataclass(frozen=True, slots=True)
class Read:
    """A value, and the record it came by."""

    found: Found
    value: bytes


class Values:
    """Puts and gets of any size up to `KadLimits.large_bytes`."""

    def __init__(self, kad: Kademlia, blocks: Blocks) -> None:
        self._kad = kad
        self._blocks = blocks
        self._told_at: dict[Cid, float] = {}

    async def put(self, name: str, value: bytes, *, life_s: float | None = None) -> Stored:
        """As `Kademlia.put`. Raises what that and keeping blocks raise."""
        limits, before = self._kad.limits, self._stated(name)
        if len(value) > limits.large_bytes:
            raise LimitExceeded(
                f"a value has up to {limits.large_bytes} bytes, not {len(value)}; add it as a model or a file"
            )
        if len(value) <= limits.value_bytes:
            stored = await self._kad.put(name, value, life_s=life_s)
            await self._let_go(name, before)
            return stored
        cid = await self._blocks.add_bytes(value, pin=_pin(name))
        await self._kad.provide(cid)
        address = msgspec.msgpack.encode((cid, len(value)))
        stored = await self._kad.put(name, address, life_s=life_s, names_block=True)
        if before is not None and before != cid:
            self._kad.unprovide(before)
        return stored

    async def withdraw(self, name: str) -> None:
        """As `Kademlia.withdraw`, and let its block go."""
        before = self._stated(name)
        self._kad.withdraw(name)
        await self._let_go(name, before)

    def _stated(self, name: str) -> Cid | None:
        """The block that this node's record names now."""
        record = self._kad.own_record(name)
        if record is None or not record.names_block:
            return None
        return _read_address(record.value, self._kad.limits.large_bytes)[0]

    async def _let_go(self, name: str, cid: Cid | None) -> None:
        if cid is not None:
            self._kad.unprovide(cid)
            await self._blocks.unpin(_pin(name))

    async def get(self, author: PeerId, name: str) -> Read | None:
        """The newest that `author` states under `name`, None where nobody next to its key has it.

        Raises `DialError` where the record is found but nobody who has its block can be reached,
        `RemoteProtocolError` for a record that names no such block, and what fetching raises.
        """
        found = await self._kad.get(author, name)
        if found is None:
            return None
        if not found.record.names_block:
            return Read(found, found.record.value)
        cid, nbytes = _read_address(found.record.value, self._kad.limits.large_bytes)
        value = await self._blocks.fetch(cid, await self._holders(author, cid))
        if len(value) != nbytes:
            raise RemoteProtocolError(f"a record that says {nbytes} bytes of a block that has {len(value)}")
        await self._tell(cid)
        return Read(found, value)

    async def _tell(self, cid: Cid) -> None:
        """Others may have the block from here now; say so, unless that was said lately."""
        now, every = trio.current_time(), self._kad.limits.provider_s / 2
        self._told_at = {one: at for one, at in self._told_at.items() if at > now - every}
        if cid not in self._told_at:
            self._told_at[cid] = now
            await self._kad.provide(cid, again=False)

    async def _holders(self, author: PeerId, cid: Cid) -> list[PeerId]:
        """Connected peers that have the block. Raises `DialError`."""
        if author == self._kad.asker.own or cid in self._told_at:
            return []
        contacts = [one for one in await self._kad.providers(cid, SOURCES) if one.peer != author]
        where = await find(self._kad, author)
        reached: list[PeerId] = []

        async def reach(contact: Contact) -> None:
            try:
                await self._kad.asker.connect(contact)
            except FAILURES:
                return
            reached.append(contact.peer)

        async with trio.open_nursery() as nursery:
            for contact in [*([] if where is None else [where]), *contacts][:SOURCES]:
                nursery.start_soon(reach, contact)
        if not reached:
            raise DialError(f"nobody who has the block {cid_text(cid)} can be reached; ask again later")
        return reached


def _pin(name: str) -> str:
    return f"record/{name}"


def _read_address(value: bytes, bytes_max: int) -> tuple[Cid, int]:
    try:
        raw, nbytes = msgspec.msgpack.decode(value, type=tuple[bytes, int])
    except (msgspec.MsgspecError, RecursionError) as error:
        raise RemoteProtocolError(f"a record that names no block: {error}") from None
    if not 0 < nbytes <= bytes_max:
        raise RemoteProtocolError(f"a record that names a block of {nbytes} bytes")
    return cid_from(raw), nbytes
