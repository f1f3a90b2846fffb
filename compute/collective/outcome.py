"""How an operation of a group ends for its caller, and what is kept of one until then."""

from __future__ import annotations

from dataclasses import dataclass, field

import trio

from mycel.compute.collective.attempt import Array, Rule
from mycel.compute.collective.epoch import Terms
from mycel.protocol.errors import MycelError
from mycel.protocol.mesh import PeerId


class OperationRefused(MycelError):
    """The operation failed on all members, because one of them will not have it; the text says which, why."""


class GroupClosed(MycelError):
    """The group does not run at this node, or no more."""


class Fenced(MycelError):
    """This node is outside of the group; take over the group's state before the next call."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an operation went."""

    contributors: tuple[PeerId, ...]
    """Whose arrays are in the result, in the order of the parts."""
    epoch: int
    """The epoch in which it was done: another one than the last time means that members came or went."""
    attempts: int
    """How often bytes were moved for it; more than one where somebody died."""
    name: str = ""
    """What the operation is called on all members: its epoch's lineage, its tag and its number."""


@dataclass(slots=True)
class Operation:
    """A call of this node that waits for its end."""

    terms: Terms
    rule: Rule
    array: Array
    into: Array | None = None
    """Where the result goes, where that is not `array`."""
    done: trio.Event = field(default_factory=trio.Event)
    turn: trio.Lock = field(default_factory=trio.Lock)
    """Held while a mover works in the array: the next attempt waits for the last one's end."""
    result: Array | None = None
    outcome: Outcome | None = None
    error: MycelError | None = None
