"""Running lookups: a `Lookup` says whom to ask, this asks, in a task for each question.

The tasks live in the service's nursery and not in the lookup's caller: a lookup does not wait for who is
late, but whether the late one answers after all is worth knowing, for the table and for the next lookup."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from functools import partial

import trio

from mycel.dht.kad.ask import Asker
from mycel.dht.kad.key import Key
from mycel.dht.kad.lookup import Lookup
from mycel.dht.kad.message import Message
from mycel.dht.kad.table import Contact, Table
from mycel.protocol.errors import LocalProtocolError
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
        self._nursery: trio.Nursery | None = None
        self.remembered: Sequence[Contact] = ()
        """Contacts of an earlier run: where lookups begin while the table is thin."""

    def lives_in(self, nursery: trio.Nursery | None) -> None:
        """Where the questions' tasks live."""
        self._nursery = nursery

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
        news = News()
        while True:
            for contact in lookup.plan(trio.current_time()):
                lookup.asked(contact.peer, self._asker.late_at(contact.peer))
                self.start(partial(self._ask, lookup, contact, question, heard, news))
            if lookup.is_done:
                return
            await news.wait(lookup.late_next)

    async def _ask(
        self, lookup: Lookup, contact: Contact, question: Message, heard: Heard | None, news: News
    ) -> None:
        answer = await self._asker.ask(contact, question)
        if answer is None:
            lookup.failed(contact.peer)
        else:
            lookup.answered(contact.peer, answer.closer)
            if heard is not None:
                heard(contact, answer)
        news.tell()

    async def tell(
        self, contacts: Sequence[Contact], question: Message, heard: Heard, enough: Callable[[], bool]
    ) -> None:
        """Ask everybody at once; returns when all answered, or all who do not are late and there is
        `enough`."""
        news, waiting = News(), {contact.peer: None for contact in contacts}
        late_at = max((self._asker.late_at(contact.peer) for contact in contacts), default=0.0)

        async def ask(contact: Contact) -> None:
            answer = await self._asker.ask(contact, question)
            del waiting[contact.peer]
            if answer is not None:
                heard(contact, answer)
            news.tell()

        for contact in contacts:
            self.start(partial(ask, contact))
        while waiting:
            late = trio.current_time() >= late_at
            if late and enough():
                return
            await news.wait(float("inf") if late else late_at)

    def start(self, task: Callable[[], Awaitable[object]]) -> None:
        """Run `task` beside everything else. Raises `LocalProtocolError` where the service does not run."""
        if self._nursery is None:
            raise LocalProtocolError("Kademlia.run is not running; start it before asking")
        self._nursery.start_soon(task)


class News:
    """Wakes one waiting task; news that come while nobody waits are not lost."""

    def __init__(self) -> None:
        self._event = trio.Event()

    def tell(self) -> None:
        """Something happened."""
        self._event.set()

    async def wait(self, until: float) -> None:
        """Until something happened since the last wait, or the trio time `until`."""
        with trio.CancelScope(deadline=until):
            await self._event.wait()
        if self._event.is_set():
            self._event = trio.Event()
