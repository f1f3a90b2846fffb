"""Kademlia over a `Mesh`: find peers, keep and find signed records, say and find who provides what.

    kad = Kademlia(mesh)
    await nursery.start(kad.run)
    await kad.bootstrap()
    stored = await kad.put("models", b"...")      # stored.replicas peers confirmed it
    found = await kad.get(author, "models")       # the newest that the peers next to its key hold

A node in server mode (`serve=True`, for those who can be dialled) answers questions and gets into others'
tables; one in client mode only asks. How long a put or a get takes is bounded by the peers' own pace, not by
fixed time-outs: see `mycel.dht.kad.lookup`.

A record goes to the 20 peers nearest to its key; a reader asks the 11 nearest it can find and takes the
newest. What 10 of the 20 or more confirmed is therefore seen by every reader that finds the same 20, whatever
older version it saw before; replicas that hold an older version, or none, are told the newest by the reader.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import trio
from trio import TaskStatus

from mycel.dht.kad import memory
from mycel.dht.kad.answer import Answerer
from mycel.dht.kad.ask import Asker, access_to, contact_of
from mycel.dht.kad.desk import Desk
from mycel.dht.kad.key import bytes_of_peer, key_of, key_of_peer
from mycel.dht.kad.lookup import Lookup
from mycel.dht.kad.message import KAD_PROTOCOL, Kind, Message
from mycel.dht.kad.record import Record, name_of, seal
from mycel.dht.kad.search import Searcher
from mycel.dht.kad.table import Contact, Table
from mycel.dht.kad.upkeep import Upkeep
from mycel.protocol.errors import LimitExceeded
from mycel.protocol.limits import DEFAULT_KAD_LIMITS, KadLimits
from mycel.protocol.mesh import Mesh, PeerDown, PeerId


@dataclass(frozen=True, slots=True)
class Stored:
    """How a put went."""

    sequence: int
    replicas: int
    """Peers that hold the record now, this node included where it is one of the nearest."""
    asked: int
    """Peers that were to hold it."""
    newer: Record | None
    """A newer record of this name that a replica holds: another process signs with this node's key."""


@dataclass(frozen=True, slots=True)
class Found:
    """A record, and what it took to find it."""

    record: Record
    replicas: int
    """How many of the asked hold this version."""
    hops: int
    """Questions one after the other until the first peer that held it."""
    questions: int


@dataclass(frozen=True, slots=True)
class Own:
    """A record that this node states, and how long it lives from each signature."""

    record: Record
    life_s: float


class Kademlia:
    """See the head of this file. `remembered` is what `memory` gave in an earlier run."""

    def __init__(
        self,
        mesh: Mesh,
        *,
        serve: bool = True,
        protocols: tuple[str, ...] = (KAD_PROTOCOL,),
        limits: KadLimits = DEFAULT_KAD_LIMITS,
        remembered: bytes | None = None,
    ) -> None:
        self._mesh = mesh
        self.limits = self._limits = limits
        self.is_serving = False
        """Whether this node answers questions (server mode)."""
        self.counts: dict[str, int] = {}
        """What was asked of this node, and what it refused, by reason."""
        self.table = Table(mesh.peer_id, limits)
        self.asker = Asker(mesh, self.table, protocols, limits)
        self.answerer = Answerer(self.table, mesh.verify, limits, self.counts)
        self._searcher = Searcher(mesh.peer_id, self.table, self.asker, limits)
        self._protocols = protocols
        kept = memory.read(remembered)
        self._searcher.remembered = self.remembered = kept.contacts
        self._own = self._reread(kept.records)
        self._provided = dict.fromkeys(kept.provided, float("-inf"))
        self._upkeep = Upkeep(self, mesh, limits)
        self._desk = Desk(mesh, self.asker, self.answerer, limits)
        self.serve(serve)

    def _reread(self, kept: Sequence[tuple[bytes, bytes, float]]) -> dict[bytes, Own]:
        wall, found = self._mesh.wall(), {}
        for name, raw, life_s in kept:
            record = self.answerer.check(name, raw, wall)
            if record is not None and record.author == self._mesh.peer_id:
                found[name] = Own(record, min(life_s, self._limits.life_s))
        return found

    # --- the service

    def serve(self, on: bool) -> None:
        """Answer questions from now on, or only ask. What is kept for others then goes to others."""
        if on == self.is_serving:
            return
        self.is_serving = on
        for protocol in self._protocols:
            if on:
                self._mesh.take_streams(protocol, self._desk.take, access=access_to(protocol))
            else:
                self._mesh.stop_serving(protocol)
        if not on:
            self.answerer.records.hand_over()

    async def run(self, *, task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Answer, ask and keep in order until cancelled."""
        async with trio.open_nursery() as nursery:
            self.asker.lives_in(nursery)
            try:
                await nursery.start(self._watch)
                nursery.start_soon(self._upkeep.run)
                task_status.started()
                await trio.sleep_forever()
            finally:
                self.asker.lives_in(None)

    async def _watch(self, *, task_status: TaskStatus[None]) -> None:
        while True:
            async with self._mesh.events() as events:
                self.asker.meet()
                task_status.started()
                task_status = trio.TASK_STATUS_IGNORED
                try:
                    async for event in events:
                        if isinstance(event, PeerDown):
                            self.asker.lost(event.peer, event.reason)
                            self.answerer.forget(event.peer)
                        else:
                            self.asker.heard(event.peer)
                except LimitExceeded:
                    continue  # too slow once: start over from who is connected now

    async def bootstrap(self) -> int:
        """Find the peers nearest to this node, who so learn of it; how many peers are known then."""
        self.asker.meet()
        await self.look_around(bytes_of_peer(self._mesh.peer_id), self._limits.bucket)
        self.table.looked_around(trio.current_time())
        return len(self.table)

    def memory(self) -> bytes:
        """What to give the next run."""
        records = tuple((own.record.name, own.record.raw, own.life_s) for own in self._own.values())
        contacts = tuple(self.table.all()[: self._limits.bucket * 8])
        return memory.write(memory.Remembered(contacts, records, tuple(self._provided)))

    # --- peers

    async def look_around(self, name: bytes, width: int) -> Lookup:
        """Look for the peers nearest to the key of `name`; the lookup, when it is done."""
        lookup = self._searcher.lookup(key_of(name), width)
        await self._searcher.run(lookup, Message(Kind.FIND_NODE, name))
        return lookup

    async def find_peer(self, peer: PeerId) -> Contact | None:
        """Where `peer` can be dialled, None where nobody next to it knows. Raises `ValueError`."""
        info = self._mesh.peers.get(peer)
        if info is not None:
            return contact_of(info)
        found = [contact for contact in [self.table.find(peer)] if contact is not None]
        if not found:
            lookup = self._searcher.lookup(key_of_peer(peer), self._limits.quorum)

            def heard(contact: Contact, answer: Message) -> None:
                found.extend(one for one in answer.closer if one.peer == peer and one.addrs)
                if found:
                    lookup.stop()

            await self._searcher.run(lookup, Message(Kind.FIND_NODE, bytes_of_peer(peer)), heard)
        return found[0] if found else None

    # --- records

    async def put(
        self, name: str, value: bytes, *, life_s: float | None = None, names_block: bool = False
    ) -> Stored:
        """State `value` under `name` for this node, newer than whatever it stated before.

        It lives `life_s` (the limit by default) from now, and is signed anew in time as long as this node
        runs. `names_block`: see `mycel.dht.kad.large`. Raises `ValueError` for a name and `LimitExceeded`
        for a value out of bounds.
        """
        if len(value) > self._limits.value_bytes:
            raise LimitExceeded(
                f"a record holds {self._limits.value_bytes} bytes, not {len(value)}; put more into a block"
            )
        raw_name, wall = name_of(self._mesh.peer_id, name, self._limits), self._mesh.wall()
        before = self._own.get(raw_name)
        sequence = max(int(wall * 1000), 0 if before is None else before.record.sequence + 1)
        life = min(life_s or self._limits.life_s, self._limits.life_s)
        stated = (sequence, wall + life, value)
        record = seal(self._mesh.peer_id, raw_name, stated, self._mesh.sign, names_block=names_block)
        others = sum(len(own.record.raw) for other, own in self._own.items() if other != raw_name)
        if others + len(record.raw) > self._limits.own_bytes:
            raise LimitExceeded(
                f"a node states {self._limits.own_bytes} bytes in all; withdraw records, or use blocks"
            )
        self._own[raw_name] = Own(record, life)
        self.answerer.count("puts")
        stored = await self.replicate(record)
        if 2 * stored.replicas <= stored.asked:
            self.answerer.count("puts_short")
        return stored

    def withdraw(self, name: str) -> None:
        """Let the record under `name` run out: it is not signed anew. Raises `ValueError`."""
        self._own.pop(name_of(self._mesh.peer_id, name, self._limits), None)

    def own_record(self, name: str) -> Record | None:
        """What this node states under `name`. Raises `ValueError` for a name that cannot be."""
        own = self._own.get(name_of(self._mesh.peer_id, name, self._limits))
        return None if own is None else own.record

    async def renew(self) -> None:
        """Sign own records for another life, and say again what is provided, where half of a life is gone."""
        wall = self._mesh.wall()
        for name, own in list(self._own.items()):
            if own.record.expires - wall < own.life_s / 2 and name in self._own:
                stated = (own.record.sequence, wall + own.life_s, own.record.value)
                kind = own.record.names_block
                renewed = seal(self._mesh.peer_id, name, stated, self._mesh.sign, names_block=kind)
                self._own[name] = Own(renewed, own.life_s)
                await self.replicate(renewed)
        since = trio.current_time() - self._limits.provider_s / 2
        for name in [name for name, said_at in self._provided.items() if said_at < since]:
            if name in self._provided:
                await self.provide(name)

    async def replicate(self, record: Record) -> Stored:
        """See to it that the peers nearest to a checked record's key hold it."""
        lookup = await self.look_around(record.name, self._limits.bucket)
        held: dict[PeerId, None] = {}
        newer: list[Record] = []
        targets = self._without_self_if_near(lookup, record, held, newer)

        def heard(contact: Contact, answer: Message) -> None:
            if answer.record == record.raw:
                held[contact.peer] = None
            elif answer.record is not None:
                other = self.answerer.check(record.name, answer.record, self._mesh.wall())
                if other is not None and other.order > record.order:
                    newer.append(other)

        await self._searcher.tell(
            targets,
            Message(Kind.PUT_VALUE, record.name, record.raw),
            heard,
            lambda: 2 * len(held) > len(targets),
        )
        self.answerer.records.told(record.name, trio.current_time())
        newest = max(newer, key=lambda one: one.order, default=None)
        return Stored(record.sequence, len(held), len(targets) + (self._mesh.peer_id in held), newest)

    def _without_self_if_near(
        self, lookup: Lookup, record: Record, held: dict[PeerId, None], newer: list[Record]
    ) -> list[Contact]:
        """Whom to tell; where this node is one of the nearest it keeps the record itself."""
        targets, own = lookup.nearest(), key_of_peer(self._mesh.peer_id) ^ lookup.target
        full = len(targets) >= self._limits.bucket
        if not self.is_serving or (full and targets[-1].key ^ lookup.target < own):
            return targets
        kept = self.answerer.keep(record, self._mesh.wall(), trio.current_time())
        if kept is not None and kept.order > record.order:
            newer.append(kept)
        elif kept is not None:
            held[self._mesh.peer_id] = None
        return targets[: self._limits.bucket - 1]

    async def get(self, author: PeerId, name: str) -> Found | None:
        """The newest record of `author` under `name`, None where nobody next to its key has one.

        Raises `ValueError` for an author or a name that cannot be.
        """
        raw_name = name_of(author, name, self._limits)
        self.answerer.count("gets")
        lookup = self._searcher.lookup(key_of(raw_name), self._limits.quorum)
        held: dict[PeerId, Record | None] = {}

        def heard(contact: Contact, answer: Message) -> None:
            record = None
            if answer.record is not None:
                record = self.answerer.check(raw_name, answer.record, self._mesh.wall())
            held[contact.peer] = record

        question = Message(Kind.GET_VALUE, raw_name)
        await self._searcher.run(lookup, question, heard)
        if not any(held.values()):
            lookup.widen(self._limits.bucket)
            await self._searcher.run(lookup, question, heard)
        mine = self._known(raw_name)
        newest = max(filter(None, [mine, *held.values()]), key=lambda one: one.order, default=None)
        if newest is None or newest.expires <= self._mesh.wall():
            self.answerer.count("gets_missed")
            return None
        self._repair(lookup, newest, held)
        return self._found(lookup, newest, held)

    def _known(self, name: bytes) -> Record | None:
        """What this node itself holds under `name`."""
        own = self._own.get(name)
        kept = self.answerer.records.get(name, self._mesh.wall())
        held = [record for record in (kept, None if own is None else own.record) if record is not None]
        return max(held, key=lambda record: record.order, default=None)

    def _found(self, lookup: Lookup, newest: Record, held: dict[PeerId, Record | None]) -> Found:
        first = next((peer for peer, record in held.items() if record is not None), None)
        return Found(
            newest,
            sum(record is not None and record.order == newest.order for record in held.values()),
            0 if first is None else lookup.hops_of(first),
            lookup.questions,
        )

    def _repair(self, lookup: Lookup, newest: Record, held: dict[PeerId, Record | None]) -> None:
        """Tell the newest to those of the nearest that hold an older one or none, without waiting."""
        for contact in lookup.nearest():
            record = held.get(contact.peer)
            if record is None or record.order < newest.order:
                question = Message(Kind.PUT_VALUE, newest.name, newest.raw)
                self.asker.ask_soon(contact, question)
                self.answerer.count("repaired")

    # --- providers

    async def provide(self, name: bytes, *, again: bool = True) -> int:
        """Say that this node provides `name`, now and again until `unprovide`; how many peers confirmed.

        Not `again`: once, which holds for `provider_s`. Raises `ValueError` for a name that is empty or too
        long, `LimitExceeded` where this node provides too much.
        """
        if not 0 < len(name) <= self._limits.name_bytes:
            raise ValueError(f"what is provided is named by 1 to {self._limits.name_bytes} bytes")
        if again:
            if name not in self._provided and len(self._provided) >= self._limits.provider_keys:
                raise LimitExceeded(f"a node provides {self._limits.provider_keys} things; unprovide some")
            self._provided[name] = trio.current_time()
        lookup = await self.look_around(name, self._limits.bucket)
        own = Contact(self._mesh.peer_id, tuple(addr.to_bytes() for addr in self._mesh.listen_addrs))
        confirmed: dict[PeerId, None] = {}

        def heard(contact: Contact, answer: Message) -> None:
            if any(one.peer == own.peer for one in answer.providers):
                confirmed[contact.peer] = None

        targets = lookup.nearest()
        await self._searcher.tell(
            targets,
            Message(Kind.ADD_PROVIDER, name, providers=(own,)),
            heard,
            lambda: 2 * len(confirmed) > len(targets),
        )
        return len(confirmed)

    def unprovide(self, name: bytes) -> None:
        """Say no more that this node provides `name`; what others hold of it expires."""
        self._provided.pop(name, None)

    async def providers(self, name: bytes, count: int = 20) -> list[Contact]:
        """Up to `count` peers that provide `name`, this node not among them."""
        lookup = self._searcher.lookup(key_of(name), self._limits.quorum)
        found = {one.peer: one for one in self.answerer.providers.get(name, trio.current_time())}

        def heard(contact: Contact, answer: Message) -> None:
            for one in answer.providers:
                if one.peer != self._mesh.peer_id:
                    found.setdefault(one.peer, one)
            if len(found) >= count:
                lookup.stop()

        await self._searcher.run(lookup, Message(Kind.GET_PROVIDERS, name), heard)
        return list(found.values())[:count]
