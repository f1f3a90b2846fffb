"""The door of a group: how somebody outside finds it, or begins it; and who of those outside may come in.

Whoever is outside and wants in knocks at every peer it is connected to. Members answer, and the first of
them in the epoch's order lets newcomers in with the next epoch. Where nobody is inside for a while, the
lowest peer id among those who knock and may begin a group begins one of its own alone, and the others come
in there. Who may begin one is the caller's to say: two that cannot hear each other would begin two groups.
"""

from __future__ import annotations

import math

from mycel.compute.collective.epoch import Hello, Member
from mycel.protocol.limits_group import GroupLimits
from mycel.protocol.mesh import PeerId


class Door:
    """What a node knows of those outside, and of groups it is not in."""

    def __init__(self, me: PeerId, limits: GroupLimits) -> None:
        self._me = me
        self._limits = limits
        self.heard: dict[PeerId, Hello] = {}
        """Connected peers that said where they stand."""
        self._since: dict[PeerId, float] = {}
        self.outside_since = math.inf
        """Since when this node waits outside; infinite while it is inside, or wants nothing."""
        self.knock_at = math.inf

    def wait(self, now: float) -> None:
        """This node wants in from now on."""
        self.outside_since = self.knock_at = now

    def end(self) -> None:
        """This node is in, or wants in no more."""
        self.outside_since = self.knock_at = math.inf

    def hear(self, now: float, peer: PeerId, hello: Hello) -> None:
        """A peer said where it stands."""
        before = self.heard.get(peer)
        if before is None or before.life != hello.life or not before.wants_in:
            self._since[peer] = now
        self.heard[peer] = hello

    def forget(self, peer: PeerId) -> None:
        """A peer is not connected any more."""
        self.heard.pop(peer, None)
        self._since.pop(peer, None)

    def knocks(self, now: float) -> bool:
        """Whether it is time to knock."""
        if now < self.knock_at:
            return False
        self.knock_at = now + self._limits.hello_s
        return True

    def may_found(self, now: float) -> bool:
        """Whether this node, which may, should begin the group."""
        if now < self.outside_since + self._limits.found_s:
            return False
        return not any(
            hello.place is not None or (hello.wants_in and hello.founds and peer < self._me)
            for peer, hello in self.heard.items()
        )

    def newcomers(self, now: float, members: list[PeerId]) -> list[Member]:
        """Who waits outside, for long enough, and reaches all of `members`."""
        return [
            Member(peer, hello.life)
            for peer, hello in sorted(self.heard.items())
            if hello.place is None
            and hello.wants_in
            and now >= self._since[peer] + self._limits.admit_s
            and peer not in members
            and all(member in hello.peers for member in members)
        ]
