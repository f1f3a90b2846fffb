"""An attempt under way at this node: who takes part, who is ready, how it ended."""

from __future__ import annotations

import threading
from collections.abc import Callable

import trio

from mycel.compute.collective.operation import Operation
from mycel.protocol.errors import MycelError
from mycel.protocol.lane import Parcel
from mycel.protocol.mesh import PeerId


class Run:
    """An attempt under way, or done and held back."""

    def __init__(self, operation: Operation) -> None:
        self.operation = operation
        self.over = trio.Event()
        self.failure: MycelError | None = None
        self.hint = ""
        course, places = operation.course, operation.places
        self.members = [peer for peer in places if peer != operation.plan.own]
        self.sources = [places[place] for place in course.sources]
        self.targets = [places[place] for place in course.targets]
        self.neighbours = list(dict.fromkeys(self.sources + self.targets))
        self._turn = threading.Lock()
        self._waiting = {places[place]: operation.first(place) for place in course.targets}

    def place_of(self, peer: PeerId) -> int | None:
        """Where `peer` stands in the ring, None for no member."""
        places = self.operation.places
        return places.index(peer) if peer in places else None

    @property
    def unready(self) -> list[PeerId]:
        """Targets that did not say that they take parts."""
        return list(self._waiting)

    def release(self, peer: PeerId) -> list[Parcel]:
        """`peer` takes parts: what waited for that."""
        with self._turn:
            return self._waiting.pop(peer, [])

    def now_or_later(self, parcel: Parcel) -> bool:
        """Whether `parcel` can be sent now; it is kept until its peer is ready otherwise."""
        with self._turn:
            waiting = self._waiting.get(parcel.peer)
            if waiting is None:
                return True
            waiting.append(parcel)
            return False


class Held:
    """A `Staged` result."""

    def __init__(self, keep: Callable[[], None], drop: Callable[[], None]) -> None:
        self._keep = keep
        self._drop = drop

    def keep(self) -> None:
        """See `Staged.keep`."""
        self._keep()

    def drop(self) -> None:
        """See `Staged.drop`."""
        self._drop()
