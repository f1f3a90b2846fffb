"""Whom to dial and when: the plan by which a swarm's mesh becomes and stays connected.

Pure: events and the time come in, dials come out. A node knows **contacts**, peers with addresses, from
three sources: its ticket and config (lasting: dialled for ever), what it remembers of its last run, and what
members tell each other (`mycel.node.gather`). Every contact that is not connected is dialled; a failure
doubles its wait, with a random spread so that the peers of a node that came back do not all knock at once.
A contact that is not lasting is forgotten after some failures in a row: somebody will tell of it again if
it lives. One that is heard of at an address that was not known is dialled at once. A peer that refuses this
node is not asked again before the longest wait. One that left in order is not dialled at all: it dials when
it is back, or somebody tells of it later. (Lasting contacts are: they may not be able to dial this node.)

Where a peer can be reached changes, with its networks and its relays. While it is connected its own word
counts, and nothing else: addresses that it does not name any more are dropped. What others say of it is
hearsay, and added to what was known.

Everything is bounded: contacts, addresses of one, dials at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mycel.protocol.mesh import PeerId

CONTACTS_MAX = 1024
ADDRS_MAX = 8
ADDR_CHARS_MAX = 256
"""Longest address: a relayed one with a host name has about 200."""
DIALS_MAX = 16
FAILURES_MAX = 6
"""Failures in a row after which a contact is forgotten unless it is lasting."""

HEARSAY_S = 10.0
"""For so long after a peer's goodbye others may speak of it without knowing that it is gone."""


@dataclass(slots=True)
class Contact:
    """A peer that this node wants to be connected with."""

    peer: PeerId
    addrs: tuple[str, ...]
    lasting: bool
    due_s: float
    """Trio time of the next dial."""
    is_connected: bool = False
    is_dialling: bool = False
    failures: int = 0
    trouble: str = ""
    """Why the last dial failed."""
    left_s: float | None = None
    """When it said goodbye, if it did."""
    given: tuple[str, ...] = ()
    """Those of its addresses that stand in the ticket or config."""
    stated: tuple[str, ...] = ()
    """Where it said itself, when last connected, that it listens."""
    held_until: float = -math.inf
    was_refused: bool = False

    @property
    def current(self) -> tuple[str, ...]:
        """What others may be told of it: its own word where there is any."""
        return self.stated or self.addrs


class Contacts:
    """The table of contacts. Waits are seconds; `spread` is a random number in [0, 1)."""

    def __init__(self, own: PeerId, *, redial_s: float, redial_max_s: float) -> None:
        self._own = own
        self._redial_s = redial_s
        self._redial_max_s = redial_max_s
        self._table: dict[PeerId, Contact] = {}

    def learn(self, peer: PeerId, addrs: Iterable[str], now: float, *, lasting: bool = False) -> None:
        """Somebody says that `peer` listens on `addrs`; newer addresses come first."""
        if peer == self._own:
            return
        contact = self._table.get(peer)
        if contact is None:
            if len(self._table) >= CONTACTS_MAX and not self._forget_one():
                return
            contact = self._table[peer] = Contact(peer, (), lasting, now)
        elif contact.left_s is not None and now - contact.left_s > HEARSAY_S:
            contact.left_s, contact.due_s = None, now
        contact.lasting = contact.lasting or lasting
        heard = [addr for addr in addrs if len(addr) <= ADDR_CHARS_MAX]
        if lasting:
            contact.given = contact.addrs = tuple(dict.fromkeys(heard))[:ADDRS_MAX]
        elif not contact.is_connected or not contact.addrs:
            if contact.failures and not contact.was_refused and not {*heard} <= {*contact.addrs}:
                contact.failures, contact.due_s = 0, now
            contact.addrs = _bounded([*heard, *contact.addrs], contact.given)

    def state(self, peer: PeerId, addrs: Iterable[str]) -> None:
        """`peer`, which is connected, says itself that it listens on `addrs` and nowhere else."""
        contact = self._table.get(peer)
        stated = [addr for addr in addrs if len(addr) <= ADDR_CHARS_MAX]
        if contact is not None and stated:
            contact.stated = tuple(stated[:ADDRS_MAX])
            contact.addrs = _bounded(stated, contact.given)

    def hold(self, peer: PeerId, until: float) -> None:
        """Do not dial `peer` before `until`: it was asked to dial this node."""
        contact = self._table.get(peer)
        if contact is not None:
            contact.held_until = until

    def holds(self, peer: PeerId) -> bool:
        """Whether this node wants to be connected with `peer`."""
        return peer in self._table

    def idle(self) -> Sequence[Contact]:
        """Contacts that could be dialled, in the order in which they were learnt of."""
        return [one for one in self._table.values() if self._is_idle(one)]

    def plan_dials(self, now: float) -> list[Contact]:
        """Contacts to dial now; each stays marked until `on_up` or `on_failed`."""
        busy = sum(contact.is_dialling for contact in self._table.values())
        due = [one for one in self._table.values() if self._is_idle(one) and _due_s(one) <= now]
        chosen = sorted(due, key=_due_s)[: max(0, DIALS_MAX - busy)]
        for contact in chosen:
            contact.is_dialling = True
        return chosen

    def next_s(self) -> float:
        """Trio time at which `plan_dials` will have something; infinity when an event must come first."""
        if sum(contact.is_dialling for contact in self._table.values()) >= DIALS_MAX:
            return math.inf
        return min((_due_s(one) for one in self._table.values() if self._is_idle(one)), default=math.inf)

    def on_up(self, peer: PeerId) -> None:
        """`peer` is connected, whoever dialled."""
        contact = self._table.get(peer)
        if contact is not None:
            contact.is_connected, contact.is_dialling = True, False
            contact.failures, contact.trouble, contact.left_s = 0, "", None

    def on_down(self, peer: PeerId, now: float, *, left: bool = False) -> None:
        """The last connection to `peer` ended; it is dialled again soon, unless it said that it leaves."""
        contact = self._table.get(peer)
        if contact is not None:
            contact.is_connected = False
            contact.due_s = now + self._redial_s
            contact.left_s = now if left and not contact.lasting else None

    def on_failed(self, peer: PeerId, now: float, spread: float, trouble: str, *, refused: bool) -> None:
        """A dial of `peer` failed; `refused` when the peer itself said no."""
        contact = self._table.get(peer)
        if contact is None:
            return
        contact.is_dialling = False
        contact.failures += 1
        contact.trouble, contact.was_refused = trouble, refused
        if contact.failures >= FAILURES_MAX and not contact.lasting and not contact.is_connected:
            del self._table[peer]
            return
        wait = self._redial_max_s if refused else self._redial_s * 2.0 ** min(contact.failures - 1, 32)
        contact.due_s = now + min(wait, self._redial_max_s) * (0.75 + 0.5 * spread)

    def told(self) -> Sequence[Contact]:
        """Contacts worth telling others and remembering: those connected, ordered by peer id."""
        return sorted((one for one in self._table.values() if one.is_connected), key=lambda one: one.peer)

    def troubled(self) -> Sequence[Contact]:
        """Contacts that could not be reached when last tried, ordered by peer id."""
        return sorted(
            (one for one in self._table.values() if one.trouble and not one.is_connected),
            key=lambda one: one.peer,
        )

    def _is_idle(self, contact: Contact) -> bool:
        if contact.is_connected or contact.is_dialling or contact.left_s is not None:
            return False
        return bool(contact.addrs)

    def _forget_one(self) -> bool:
        """Make room: drop one that left, or else the one with the most failures that is not in use."""
        idle = [
            one
            for one in self._table.values()
            if (self._is_idle(one) or one.left_s is not None) and not one.lasting
        ]
        if not idle:
            return False
        del self._table[max(idle, key=lambda one: (one.left_s is not None, one.failures, one.peer)).peer]
        return True


def _due_s(contact: Contact) -> float:
    return max(contact.due_s, contact.held_until)


def _bounded(addrs: Iterable[str], given: tuple[str, ...]) -> tuple[str, ...]:
    """`addrs` within the bound; those that were `given` stay in any case, behind the others."""
    others = [addr for addr in dict.fromkeys(addrs) if addr not in given]
    return (*others[: ADDRS_MAX - len(given)], *given)
