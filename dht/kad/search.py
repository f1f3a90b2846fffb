"""Running lookups: a `Lookup` says whom to ask, this asks.

A lookup goes on where its answers arrive, and wakes its caller when it is done. It does not wait for who is
late, but whether the late one answers after all is worth knowing, for the table and for the next lookup."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import trio

from mycel.dht.kad.ask import Asker
from mycel.dht.kad.key import Key
from mycel.dht.kad.lookup import Lookup
from mycel.dht.kad.message import Message
from mycel.dht.kad.table import Contact, Table
from mycel.protocol.limits import KadLimits
from mycel.protocol.mesh import PeerId

Heard = Callable[[Contact, Message], None]
"""Called with each answer as it comes."""


class Searcher:
    """Runs lookups and batches of questions."""

    def __init__(self, own: PeerId, table: Table, asker: Asker, limits: KadLimits) -> None:
        self._own = own
        self._table = table
        self._asker = asker
        self._limits = limits
        self._running: dict[Lookup, Search] = {}
        self.remembered: Sequence[Contact] = ()
        """Contacts of an earlier run: where lookups begin while the table is thin."""

    def lookup(self, target: Key, width: int) -> Lookup:
        """A lookup that begins with whom this node knows."""
        self._table.looked(target, trio.current_time())
        seeds = {one.peer: one for one in self._table.closest(target, self._limits.bucket)}
        if len(seeds) < self._limits.paths:
            self._asker.meet()
            seeds = {one.peer: one for one in self._table.closest(target, self._limits.bucket)}
            seeds = {one.peer: one for one in self.remembered} | seeds
        return Lookup(target, self._own, list(seeds.values()), self._limits, width)

    async def run(self, lookup: Lookup, question: Message, heard: Heard | None = None) -> None:
        """Ask `question` along `lookup` until it is done."""
        search = Search(partial(self._go_on, lookup, question, heard))
        self._running[lookup] = search
        try:
            await search.run()
        finally:
            del self._running[lookup]

    def _go_on(self, lookup: Lookup, question: Message, heard: Heard | None) -> float:
        """Ask whoever is to be asked now; until when nothing else need be done, minus infinity for ever."""
        for contact in lookup.plan(trio.current_time()):
            lookup.asked(contact.peer, self._asker.late_at(contact.peer))
            self._asker.ask_soon(contact, question, partial(self._answered, lookup, contact, heard))
        return float("-inf") if lookup.is_done else lookup.late_next

    def _answered(
        self, lookup: Lookup, contact: Contact, heard: Heard | None, answer: Message | None
    ) -> None:
        if answer is None:
            lookup.failed(contact.peer)
        else:
            lookup.answered(contact.peer, answer.closer)
            if heard is not None:
                heard(contact, answer)
        search = self._running.get(lookup)
        if search is not None:
            search.step()

    async def tell(
        self, contacts: Sequence[Contact], question: Message, heard: Heard, enough: Callable[[], bool]
    ) -> None:
        """Ask everybody at once; returns when all answered, or all who do not are late and there is
        `enough`."""
        waiting = {contact.peer: None for contact in contacts}
        late_at = max((self._asker.late_at(contact.peer) for contact in contacts), default=0.0)

        def until() -> float:
            late = trio.current_time() >= late_at
            if not waiting or (late and enough()):
                return float("-inf")
            return float("inf") if late else late_at

        search = Search(until)

        def answered(contact: Contact, answer: Message | None) -> None:
            del waiting[contact.peer]
            if answer is not None:
                heard(contact, answer)
            search.step()

        for contact in contacts:
            self._asker.ask_soon(contact, question, partial(answered, contact))
        await search.run()


class Search:
    """One task that waits for what others do: `step` until it says to wait for nothing more."""

    def __init__(self, go_on: Callable[[], float]) -> None:
        """`go_on` does what there is to do and says until when to wait, minus infinity: no more."""
        self._go_on = go_on
        self._scope: trio.CancelScope | None = None
        self._over = trio.Event()

    async def run(self) -> None:
        """Step now, whenever told to, and at the times that `go_on` names, until it is over."""
        while not self._over.is_set():
            with trio.CancelScope() as self._scope:
                self.step()
                await self._over.wait()

    def step(self) -> None:
        """Something happened."""
        if self._scope is None or self._over.is_set():
            return
        until = self._go_on()
        if until == float("-inf"):
            self._over.set()
        elif until != self._scope.deadline:
            self._scope.deadline = until
