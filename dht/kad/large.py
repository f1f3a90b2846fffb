"""Values that no record holds: a block holds them, and the record says which.

    values = Values(kad, store, fetch)
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

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import msgspec
import trio

from mycel.dht.kad.ask import FAILURES
from mycel.dht.kad.place import find
from mycel.dht.kad.service import Found, Kademlia, Stored
from mycel.dht.kad.table import Contact
from mycel.protocol.blockstore import BlockStore
from mycel.protocol.cid import Cid, cid_from, cid_of, cid_text
from mycel.protocol.errors import DialError, LimitExceeded, RemoteProtocolError
from mycel.protocol.mesh import PeerId

Fetch = Callable[[Cid, int, Sequence[PeerId]], Awaitable[bytes]]
"""Fetches a block of so many bytes from these connected peers, and keeps it (`Exchange.get`)."""

SOURCES = 4
"""Peers that a value is asked of."""


@dataclass(frozen=True, slots=True)
class Read:
    """A value, and the record it came by."""

    found: Found
    value: bytes


class Values:
    """Puts and gets of any size up to `KadLimits.large_bytes`."""

    def __init__(self, kad: Kademlia, store: BlockStore, fetch: Fetch) -> None:
        self._kad = kad
        self._store = store
        self._fetch = fetch

    async def put(self, name: str, value: bytes, *, life_s: float | None = None) -> Stored:
        """As `Kademlia.put`. Raises what that and the block store raise."""
        limits, pin = self._kad.limits, _pin(name)
        if len(value) > limits.large_bytes:
            raise LimitExceeded(
                f"a value has up to {limits.large_bytes} bytes, not {len(value)}; add it as a model or a file"
            )
        before = list(self._store.pinned(pin))
        if len(value) <= limits.value_bytes:
            stored = await self._kad.put(name, value, life_s=life_s)
            await self._let_go(name, before)
            return stored
        cid = cid_of(value)
        await self._store.pin(pin, [*before, cid])
        await self._store.put(cid, value)
        await self._kad.provide(cid)
        address = msgspec.msgpack.encode((cid, len(value)))
        stored = await self._kad.put(name, address, life_s=life_s, names_block=True)
        await self._store.pin(pin, [cid])
        for old in before:
            if old != cid:
                self._kad.unprovide(old)
        return stored

    async def withdraw(self, name: str) -> None:
        """As `Kademlia.withdraw`, and let its block go."""
        self._kad.withdraw(name)
        await self._let_go(name, self._store.pinned(_pin(name)))

    async def _let_go(self, name: str, cids: Sequence[Cid]) -> None:
        for cid in cids:
            self._kad.unprovide(cid)
        if cids:
            await self._store.unpin(_pin(name))

    async def get(self, author: PeerId, name: str) -> Read | None:
        """The newest that `author` states under `name`, None where nobody next to its key has it.

        Raises `DialError` where the record is found but nobody who has its block can be reached,
        `RemoteProtocolError` for a record that names no block, and what fetching raises.
        """
        found = await self._kad.get(author, name)
        if found is None:
            return None
        if not found.record.names_block:
            return Read(found, found.record.value)
        cid, nbytes = _read_address(found.record.value, self._kad.limits.large_bytes)
        value = await self._store.get(cid)
        if value is None:
            value = await self._fetch(cid, nbytes, await self._sources(author, cid))
            await self._kad.provide(cid, again=False)
        return Read(found, value)

    async def _sources(self, author: PeerId, cid: Cid) -> list[PeerId]:
        """Connected peers that have the block. Raises `DialError`."""
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
    return f"record {name}"


def _read_address(value: bytes, bytes_max: int) -> tuple[Cid, int]:
    try:
        raw, nbytes = msgspec.msgpack.decode(value, type=tuple[bytes, int])
    except (msgspec.MsgspecError, RecursionError) as error:
        raise RemoteProtocolError(f"a record that names no block: {error}") from None
    if not 0 < nbytes <= bytes_max:
        raise RemoteProtocolError(f"a record that names a block of {nbytes} bytes")
    return cid_from(raw), nbytes
