"""Dialing a peer that has several addresses: in parallel, staggered, first success wins.

Addresses are tried in the order given. The next try starts as soon as the one before failed, or after
`STAGGER_S` at the latest (RFC 8305, section 5); a success is returned at once and ends the others.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

import trio
from multiaddr import Multiaddr

from mycel.protocol.errors import DialError, MycelError, Refused

STAGGER_S = 0.15
"""Between two tries while the earlier one is still open: about a round trip across an ocean."""

PARALLEL_MAX = 8
"""Tries at once for one peer."""

_T = TypeVar("_T")


class Race(Generic[_T]):
    """One dial over several addresses."""

    def __init__(self, addrs: Sequence[Multiaddr], attempt: Callable[[Multiaddr], Awaitable[_T]]) -> None:
        """`attempt` connects to one address and raises `MycelError` where that fails; it must clean up
        after itself when cancelled."""
        self._addrs = addrs
        self._attempt = attempt
        self._failures: dict[int, MycelError] = {}
        self._won: list[_T] = []

    async def run(self) -> _T:
        """The first success. Raises `Refused` where a peer was reached and refused, else `DialError` naming
        every address and its failure."""
        if not self._addrs:
            raise DialError("no address to dial: give at least one multiaddr of the peer")
        limiter = trio.CapacityLimiter(PARALLEL_MAX)
        async with trio.open_nursery() as nursery:
            for index, addr in enumerate(self._addrs):
                failed = trio.Event()
                await limiter.acquire_on_behalf_of(index)
                nursery.start_soon(self._try, index, addr, failed, limiter, nursery.cancel_scope)
                with trio.move_on_after(STAGGER_S):
                    await failed.wait()
        if self._won:
            return self._won[0]
        for failure in self._failures.values():
            if isinstance(failure, Refused):
                raise failure
        raise DialError("; ".join(f"{self._addrs[i]}: {e}" for i, e in sorted(self._failures.items())))

    async def _try(
        self,
        index: int,
        addr: Multiaddr,
        failed: trio.Event,
        limiter: trio.CapacityLimiter,
        race: trio.CancelScope,
    ) -> None:
        try:
            self._won.append(await self._attempt(addr))
            race.cancel()
        except MycelError as error:
            self._failures[index] = error
        finally:
            failed.set()
            limiter.release_on_behalf_of(index)
