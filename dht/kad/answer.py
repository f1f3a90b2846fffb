"""Answering questions: what this node knows and keeps, and what it refuses.

Everything refused is counted under its reason (`refused_signature`, `refused_quota`, ...), and nothing a peer
sends makes this node hold more than its limits say. A peer that asks faster than the limit is not answered.

Pure: a question and the times come in, the answer comes out.
"""

from __future__ import annotations

from mycel.dht.kad import record as records
from mycel.dht.kad.book import ProviderBook, RecordBook
from mycel.dht.kad.key import key_of
from mycel.dht.kad.message import Kind, Message
from mycel.dht.kad.record import Record, Verify
from mycel.dht.kad.table import Contact, Table
from mycel.protocol.errors import Refused
from mycel.protocol.limits import KadLimits
from mycel.protocol.mesh import PeerId
from mycel.protocol.rate import Bucket


class Answerer:
    """The keeping and telling half of a node."""

    def __init__(self, table: Table, verify: Verify, limits: KadLimits, counts: dict[str, int]) -> None:
        self.table = table
        self.records = RecordBook(limits)
        self.providers = ProviderBook(limits)
        self._verify = verify
        self._limits = limits
        self._counts = counts
        self._rates: dict[PeerId, Bucket] = {}

    def may_ask(self, asker: PeerId, now: float) -> bool:
        """Whether another question of `asker` is answered now; counts it."""
        bucket = self._rates.get(asker)
        if bucket is None:
            bucket = self._rates[asker] = Bucket(self._limits.questions_per_s, now)
        if bucket.ready_at(now) > now:
            self.count("refused_flood")
            return False
        bucket.spend(1)
        return True

    def forget(self, asker: PeerId) -> None:
        """`asker` is not connected any more."""
        self._rates.pop(asker, None)

    def answer(self, asker: Contact, question: Message, wall: float, now: float) -> Message:
        """What to say to `question`."""
        self.count(f"question_{question.kind.name.lower()}")
        name = question.name
        if question.kind is Kind.PUT_VALUE:
            return Message(question.kind, name, self._put(question, wall, now))
        if question.kind is Kind.ADD_PROVIDER:
            return Message(question.kind, name, providers=self._add(asker, question, now))
        if question.kind is Kind.PING:
            return Message(question.kind)
        near = self.table.closest(key_of(name), self._limits.bucket + 1)
        closer = [contact for contact in near if contact.peer != asker.peer][: self._limits.bucket]
        held = self.records.get(name, wall) if question.kind is Kind.GET_VALUE else None
        found = self.providers.get(name, now) if question.kind is Kind.GET_PROVIDERS else []
        return Message(question.kind, name, None if held is None else held.raw, tuple(closer), tuple(found))

    def check(self, name: bytes, raw: bytes, wall: float) -> Record | None:
        """The record `raw` if it is good; else it is counted under what is wrong with it."""
        try:
            return records.read(name, raw, wall, self._verify, self._limits)
        except Refused as error:
            self.count(f"refused_{error.reason}")
            return None

    def keep(self, record: Record, wall: float, now: float) -> Record | None:
        """The record held after a good one was offered, None where it was refused (and counted)."""
        try:
            return self.records.take(record, wall, now)
        except Refused as error:
            self.count(f"refused_{error.reason}")
            return None

    def _put(self, question: Message, wall: float, now: float) -> bytes | None:
        record = self.check(question.name, question.record or b"", wall)
        held = None if record is None else self.keep(record, wall, now)
        return None if held is None else held.raw

    def _add(self, asker: Contact, question: Message, now: float) -> tuple[Contact, ...]:
        added = []
        for contact in question.providers:
            if contact.peer != asker.peer:
                self.count("refused_provider_other")  # a peer speaks for itself only
                continue
            try:
                self.providers.add(question.name, Contact(asker.peer, contact.addrs or asker.addrs), now)
                added.append(contact)
            except Refused as error:
                self.count(f"refused_provider_{error.reason}")
        return tuple(added[:1])

    def count(self, what: str) -> None:
        """One more of `what` happened."""
        self._counts[what] = self._counts.get(what, 0) + 1
