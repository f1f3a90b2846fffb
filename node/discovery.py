"""Kademlia in the daemon: who is where beyond those in sight, small signed records, who provides what.

`mycel.dht.kad` does the work; here is what it needs of a node and what the node makes of it.

- **Its mode** follows what `mycel.node.reach` finds out: a node that others can call (public, or all in one
  house) answers questions, any other one only asks. The verdict changes while the node runs, and the mode
  with it: others see it in what identify says this node serves.
- **Its address** is stated in a record as soon as somebody is there to keep it, and again when it changes. So
  a member that is not connected is found by its id alone (`find`), wherever it moved, behind relays too; a
  contact that does not answer where it was is looked up so, and dialled where it is now.
- **What it knows** is kept in the home, now and then and at the end: whom it knew, what it stated and what it
  provides. A node that starts again begins with those, and needs no bootstrap peer.
- **Its connections** are the mesh's: one that a lookup opened is hung up only where the mesh does not want
  that peer and nobody has a stream to it.

Values beyond a record go into blocks once there is who keeps them (`hold_blocks`).
"""

from __future__ import annotations

import logging

import trio

from mycel.dht.kad import place
from mycel.dht.kad.ask import dialable
from mycel.dht.kad.large import Blocks, Read, Values
from mycel.dht.kad.message import KAD_PROTOCOL
from mycel.dht.kad.service import Kademlia, Stored
from mycel.node.config import Config
from mycel.node.contacts import Contacts
from mycel.node.gather import Gather
from mycel.node.host import Host
from mycel.node.memory import Memory
from mycel.node.reach.reach import Reach
from mycel.node.reach.verdict import Kind
from mycel.protocol.errors import DialError, LimitExceeded
from mycel.protocol.mesh import PeerId

log = logging.getLogger("mycel.node")

REMEMBERED = "kad"
ANSWERING = (Kind.PUBLIC, Kind.LOCAL)
"""Verdicts under which others can call this node, so that it answers questions."""

MEET_S = 0.25
"""Connections come in bursts: so long after the first news the table is told of all."""
STATE_S = 8.0
"""How often a node looks whether its addresses are those it stated. Short-lived ones are not worth 40
messages."""
SEEK_S = 5.0
"""Between two members that are looked up because they do not answer where they were..."""
SEEK_AGAIN_S = 120.0
"""...and for one of them."""
SEEK_FAILURES = 2
"""Dials that must have failed: the first may have met a restart."""
KEEP_S = 60.0
"""How often what is known is written to the home."""


class Discovery:
    """The service. Its parts may be used while it runs: `kad`, `find`, `connect`, `put`, `get`."""

    def __init__(
        self,
        config: Config,
        host: Host,
        contacts: Contacts,
        gather: Gather,
        reach: Reach,
        memory: Memory,
    ) -> None:
        self._host = host
        self._contacts = contacts
        self._gather = gather
        self._reach = reach
        self._memory = memory
        self._kept: bytes | None = memory.get(REMEMBERED)
        self._values: Values | None = None
        self.kad = Kademlia(
            host,
            serve=False,
            protocols=(KAD_PROTOCOL, *config.foreign_protocols),
            remembered=self._kept,
        )
        self.kad.asker.may_hang_up = self._is_spare
        self.kad.asker.can_lead = lambda addr: gather.can_lead(addr)
        reach.on_settled = self._choose_mode

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled; started once this node answers as its verdict says."""
        self._choose_mode()
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(self.kad.run)
                nursery.start_soon(self._meet)
                nursery.start_soon(self._state)
                nursery.start_soon(self._seek)
                nursery.start_soon(self._keep_up)
                task_status.started()
        finally:
            self._keep()

    def hold_blocks(self, blocks: Blocks) -> None:
        """From now on values too large for a record go into blocks."""
        self._values = Values(self.kad, blocks)

    # --- what it is asked

    async def put(self, name: str, value: bytes, *, life_s: float | None = None) -> Stored:
        """State `value` under `name` for this node; see `Kademlia.put` and `Values.put`."""
        if self._values is not None:
            return await self._values.put(name, value, life_s=life_s)
        return await self.kad.put(name, value, life_s=life_s)

    async def get(self, author: PeerId, name: str) -> Read | None:
        """The newest that `author` states under `name`; see `Kademlia.get` and `Values.get`."""
        if self._values is not None:
            return await self._values.get(author, name)
        found = await self.kad.get(author, name)
        return None if found is None or found.record.names_block else Read(found, found.record.value)

    async def find(self, peer: PeerId) -> tuple[str, ...]:
        """Where `peer` can be dialled, nothing where nobody knows. Raises `ValueError` for what is no id."""
        found = await place.find(self.kad, peer)
        return () if found is None else tuple(dict.fromkeys(dialable(found)))

    async def connect(self, peer: PeerId) -> None:
        """Be connected with a peer of whom no more is known than its id.

        Raises `DialError` where nobody knows it or it cannot be reached, `Refused` where either side
        refuses, `ValueError` for what is no peer id.
        """
        if peer in self._host.peers:
            return
        addrs = [addr for addr in await self.find(peer) if self._gather.can_lead(addr)]
        if not addrs:
            raise DialError(f"nobody here knows where {peer} is: is it up, and a member of this swarm?")
        await self._host.connect(addrs)

    # --- what it does

    def _choose_mode(self) -> None:
        answers = self._reach.verdict.kind in ANSWERING
        if answers != self.kad.is_serving:
            log.info("this node %s of Kademlia", "answers questions" if answers else "asks as a client")
            self.kad.serve(answers)

    def _is_spare(self, peer: PeerId) -> bool:
        """Whether the connection to `peer` is of no use to anybody but lookups."""
        return not self._contacts.holds(peer) and not self._host.streams_with(peer)

    async def _meet(self) -> None:
        """Those who connect, or begin or cease to answer questions, are known as such."""
        while True:
            self.kad.asker.meet_changed()
            await self._host.links_changed()
            await trio.sleep(MEET_S)

    async def _state(self) -> None:
        """State where this node is, while there is somebody to keep it, and whenever it changed."""
        while True:
            await trio.sleep(STATE_S * (1 + self._chance()))
            own, before = place.write(self._host.listen_addrs), self.kad.own_record(place.NAME)
            if not len(self.kad.table) or (before is not None and before.value == own):
                continue
            try:
                stored = await self.kad.put(place.NAME, own)
            except LimitExceeded as error:  # this node states too much besides
                log.warning("where this node is stays unstated: %s", error)
                continue
            log.debug("%d of %d peers know this node's addresses", stored.replicas, stored.asked)

    async def _seek(self) -> None:
        """Look up those who do not answer where they were, one after the other."""
        asked_at: dict[PeerId, float] = {}
        while True:
            await trio.sleep(SEEK_S)
            now = trio.current_time()
            asked_at = {peer: at for peer, at in asked_at.items() if at > now - SEEK_AGAIN_S}
            lost = [one for one in self._contacts.troubled() if one.peer not in asked_at]
            for contact in lost:
                if contact.failures >= SEEK_FAILURES and not contact.was_refused and len(self.kad.table):
                    asked_at[contact.peer] = now
                    await self._look_up(contact.peer)
                    break

    async def _look_up(self, peer: PeerId) -> None:
        try:
            addrs = await self.find(peer)
        except (ValueError, DialError):  # what others told as its id is none, or none of its addresses
            return
        if addrs:
            self._gather.learn(peer, addrs)

    async def _keep_up(self) -> None:
        while True:
            await trio.sleep(KEEP_S * (0.5 + self._chance()))
            self._keep()

    def _keep(self) -> None:
        known = self.kad.memory()
        if known == self._kept or not (len(self.kad.table) or self._kept is None):
            return  # a node that lost everybody keeps whom it knew
        try:
            self._memory.put(REMEMBERED, known)
            self._kept = known
        except OSError as error:
            log.warning("what Kademlia knows is not remembered: %s", error)

    def _chance(self) -> float:
        """Between 0 and 1."""
        return int.from_bytes(self._host.entropy(2), "big") / 65536
