"""What Kademlia does unasked: expire, check who is there, look through quiet buckets, tell records again.

Everything due at a tick is done in turn, so upkeep has one lookup under way and no burst. A replica tells a
record again only when nobody told it for a while (Maymounkov 2002, 2.5): of 20 replicas one does. The ticks
of different nodes are spread by chance, which comes from the mesh."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from mycel.dht.kad.key import key_of_peer, name_near
from mycel.dht.kad.message import Kind, Message
from mycel.protocol.limits import KadLimits
from mycel.protocol.mesh import Mesh

if TYPE_CHECKING:
    from mycel.dht.kad.service import Kademlia

REPUBLISH_AT_ONCE = 16
"""Records told again at a tick, at most."""

ALONE_S_MAX = 600.0
"""The longest pause before those known from an earlier run are tried again while nobody is there."""


class Upkeep:
    """The unasked half of a node."""

    def __init__(self, kad: Kademlia, mesh: Mesh, limits: KadLimits) -> None:
        self._kad = kad
        self._mesh = mesh
        self._limits = limits
        self._settled = False
        self._alone_s = 0.0
        self._look_at = float("-inf")
        self._patience = self._chance()

    def _chance(self) -> float:
        """Between 0 and 1."""
        return int.from_bytes(self._mesh.entropy(4), "big") / (1 << 32)

    async def run(self) -> None:
        """Tick until cancelled."""
        while True:
            await trio.sleep(self._limits.tick_s * (0.5 + self._chance()))
            now = trio.current_time()
            self._kad.answerer.records.expire(self._mesh.wall())
            self._kad.answerer.providers.expire(now)
            self._kad.asker.meet_changed()
            await self._join(now)
            await self._check(now)
            await self._refresh(now)
            await self._kad.renew()
            await self._republish(now)

    async def _join(self, now: float) -> None:
        """Look for oneself once somebody is there, and anew when everybody was lost meanwhile.

        While nobody is, those of an earlier run are tried, at growing intervals.
        """
        alone = not len(self._kad.table)
        self._settled = self._settled and not alone
        if self._settled or (alone and (now < self._look_at or not self._kad.remembered)):
            return
        self._settled = await self._kad.bootstrap() > 0
        self._alone_s = 0.0 if self._settled else min(2 * self._alone_s + self._limits.tick_s, ALONE_S_MAX)
        self._look_at = now + self._alone_s

    async def _check(self, now: float) -> None:
        """Ask those who were not heard of for long whether they are there, all at once."""
        silent = self._kad.table.unheard(now - self._limits.check_s)[: self._limits.checks]
        async with trio.open_nursery() as nursery:
            for contact in silent:
                nursery.start_soon(self._kad.asker.ask, contact, Message(Kind.PING))

    async def _refresh(self, now: float) -> None:
        """Look through one bucket that no lookup went through for long.

        Those in which nobody is but this node's neighbours are looked through together, by looking for
        oneself: names that fall into deep buckets are dear (see `name_near`).
        """
        own, table = key_of_peer(self._mesh.peer_id), self._kad.table
        for index in table.stale_buckets(now - self._limits.refresh_s)[:1]:
            name = None
            if index < table.neighbourhood:
                name = name_near(own, index, self._mesh.entropy(16))
            if name is None:
                await self._kad.bootstrap()
            else:
                await self._kad.look_around(name, self._limits.quorum)

    async def _republish(self, now: float) -> None:
        """Tell records again that nobody told for a while; how long is drawn anew each time."""
        before = now - self._limits.republish_s * (1 + 0.5 * self._patience)
        for record in self._kad.answerer.records.due(before, REPUBLISH_AT_ONCE):
            await self._kad.replicate(record)
            self._kad.answerer.records.told(record.name, trio.current_time())
            self._patience = self._chance()
