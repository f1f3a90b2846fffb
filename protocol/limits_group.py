"""Bounds of groups (`mycel.compute.collective`), each with its unit and the reason for its size."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GroupLimits:
    """Seconds and counts of one group."""

    members: int = 256
    """Members of an epoch: every operation costs each of them two messages to every other."""

    tags: int = 256
    """Tags that are used in one epoch; they may be used again and again..."""

    tag_chars: int = 128
    """...and the length of one."""

    why_chars: int = 512
    """Characters of a reason that travel."""

    attempts: int = 16
    """Tries of one operation. With one death each that is a group's end; without, something does not work."""

    grace_s: float = 0.5
    """A member whose connection was lost may be back within this before the next epoch leaves it out. Who is
    dialled in vain is not waited for: where a process was killed, its machine says so at once."""

    silent_s: float = 0.25
    """As `grace_s`, for a member that fell silent: it was waited for already when its connection ended."""

    doubt_s: float = 1.0
    """A member whom somebody suspects, or misses, may take this long to answer."""

    patience_s: float = 5.0
    """How long a connected member that nobody suspects may take to answer about the next epoch. A dead one's
    connection ends before, so this is for those that are busy."""

    stagger_s: float = 0.25
    """Members propose the next epoch one after the other, so far apart, in the order of the epoch."""

    change_s: float = 6.0
    """Whoever promised its voice to somebody who is connected proposes itself when nothing came of it after
    this: longer than the other may wait for answers."""

    remind_s: float = 1.0
    """What is not answered is said again. Calls do not get lost without a connection's end, so this is
    for what ends together with one."""

    hello_s: float = 0.5
    """How often somebody outside knocks..."""

    found_s: float = 1.0
    """...and for how long in vain, before it begins a group itself."""

    admit_s: float = 0.1
    """Newcomers that knock within this come in together."""

    early: int = 256
    """Messages kept of each member that is an epoch ahead..."""

    history: int = 16
    """...and epochs remembered, to tell those who are behind how each ended."""


DEFAULT_GROUP_LIMITS = GroupLimits()
