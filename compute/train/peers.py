"""What a training loop needs of the peers it trains with. Calls block: a training loop is ordinary code in
its thread.

Behind this seam is a group of `compute.collective`, in this process or in the daemon that started it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from numpy.typing import NDArray

from mycel.protocol.errors import MycelError

Array = NDArray[Any]


class LeftOut(MycelError):
    """The others went on without this peer: it was too slow, or cut off. `sync` brings it in again."""


@dataclass(frozen=True, slots=True)
class Reduced:
    """How a reduction went; the array holds its result, the same bits on every peer."""

    contributors: int
    """Peers whose arrays are in it, this one included."""
    epoch: int
    """The membership in which it was done; another number than the last time: peers came or went."""


class Pending(Protocol):
    """A reduction under way."""

    def wait(self) -> Reduced:
        """Until it is done. Raises `LeftOut`; the array is then as it was."""


class Peers(Protocol):
    """A group, as a training loop sees it."""

    @property
    def count(self) -> int:
        """Members now, this peer included."""

    def all_reduce(
        self, array: Array, *, op: str = "avg", tag: str = "", codec: str | None = None
    ) -> Reduced:
        """Replace `array` by the sum, average, smallest or largest (`op`) over all members.

        `codec` "int8" or "int4" sends blocks of small integers with a scale each. Raises `LeftOut`; the
        array is then as it was.
        """

    def begin_all_reduce(
        self, array: Array, *, op: str = "avg", tag: str = "", codec: str | None = None
    ) -> Pending:
        """The same, without waiting: the caller neither reads nor writes `array` until `wait` returned."""

    def is_awaited(self, tag: str) -> bool:
        """Whether another member waits for this one in the next reduction under `tag`. Costs nothing."""

    def sync(self, state: Mapping[str, Array]) -> bool:
        """A border: admit who wants in, and agree on `state`; whether this peer's was replaced.

        Members compare hashes; whoever differs from the majority (a newcomer, or one that missed a step) gets
        what differs, in place, from the others, who go on meanwhile. Every member calls it at the same border
        of its work; a newcomer calls it first of all, with numbers of its own, and so does who was left out.
        """
