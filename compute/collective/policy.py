"""What the members of a group agree on before there is one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Quorum = Literal["majority", "any"]
"""Whose voices settle the next epoch: most of this one's members, or all of those who go on together."""


@dataclass(frozen=True, slots=True)
class Policy:
    """What a group's members agree on beforehand, and whether this one may begin it."""

    quorum: Quorum = "majority"
    admits: Literal["whenever", "border"] = "whenever"
    """Newcomers come in whenever nothing moves, or only while all members wait in `border`, once there were
    `least` of them: before that nobody has got anywhere."""
    least: int = 1
    """With fewer members than this nothing begins."""
    founds: bool = True
    """Whether this node begins the group where it finds none: by majority once in its process's life, and
    two that do and cannot hear each other begin two."""
