"""What lies behind a member and ahead of it: its latest epochs, which it tells those who are behind, and what
came from epochs that it has not heard of yet."""

from __future__ import annotations

from mycel.compute.collective.epoch import Arrive, Epoch, News, Place, Placed, Prepare, Suspect, Vote
from mycel.protocol.mesh import PeerId


class History:
    """Epochs, each the successor of the one before; `most` of them are remembered."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._epochs: list[tuple[Place, Epoch]] = []

    def add(self, place: Place, epoch: Epoch) -> None:
        """This node has entered `epoch`."""
        self._epochs = [*self._epochs, (place, epoch)][-self._most :]

    def clear(self) -> None:
        """This node is outside: it speaks for no epoch any more."""
        self._epochs = []

    def since(self, place: Place) -> News:
        """What somebody at `place` has not heard; the latest epoch, where it is on another way."""
        places = [known for known, _ in self._epochs]
        behind = places.index(place) + 1 if place in places else len(places) - 1
        return News(tuple(epoch for _, epoch in self._epochs[behind:]))


class Early:
    """What came from epochs that this node has not heard of yet; bounded, for anybody can send it."""

    def __init__(self, lineages: int, messages: int) -> None:
        self._lineages = lineages
        self._messages = messages
        self._kept: dict[bytes, list[tuple[PeerId, Placed]]] = {}

    def keep(self, peer: PeerId, message: Placed) -> None:
        """Keep `message` of `peer` until its epoch is entered, if it is of use then."""
        if isinstance(message, Arrive | Vote | Suspect | Prepare):
            kept = self._kept.setdefault(message.at.lineage, [])
            if len(kept) < self._messages:
                kept.append((peer, message))
        while len(self._kept) > self._lineages:
            del self._kept[next(iter(self._kept))]

    def pop(self, lineage: bytes) -> list[tuple[PeerId, Placed]]:
        """What came of this epoch, in order."""
        return self._kept.pop(lineage, [])
