"""Dialing a peer that has several addresses: in parallel, staggered, first success wins.

Addresses are tried in the order given. The next try starts as soon as the one before failed, or after a
stagger at the latest (RFC 8305, section 5). How long that is, is learnt: twice as long as connecting took
lately, so that on a quick network a dead first address costs next to nothing. A success is returned at once
and ends the others.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

import trio
from multiaddr import Multiaddr

from mycel.protocol.errors import DialError, MycelError, Refused

STAGGER_FIRST_S = 0.15
"""Before anything is known: about a round trip across an ocean."""
STAGGER_MIN_S, STAGGER_MAX_S = 0.02, 0.25
"""Never so short that every address is tried at once, nor so long that a person notices."""

PARALLEL_MAX = 8
"""Tries at once for one peer."""

_T = TypeVar("_T")


class Stagger:
    """How long an address has to itself before the next one is tried too, learnt from successes."""

    def __init__(self) -> None:
        self._took: float | None = None

    @property
    def seconds(self) -> float:
        """The stagger now."""
        if self._took is None:
            return STAGGER_FIRST_S
        return min(max(2 * self._took, STAGGER_MIN_S), STAGGER_MAX_S)

    def learn(self, took: float) -> None:
        """A try succeeded after `took` seconds."""
        self._took = took if self._took is None else self._took + (took - self._took) / 4


class Race(Generic[_T]):
    """One dial over several addresses."""

    def __init__(
        self,
        addrs: Sequence[Multiaddr],
        attempt: Callable[[Multiaddr], Awaitable[_T]],
        stagger: Stagger | None = None,
        discard: Callable[[_T], None] = lambda loser: None,
    ) -> None:
        """`attempt` connects to one address and raises `MycelError` where that fails; it must clean up
        after itself when cancelled. `discard` ends what a slower try brought all the same; `stagger` is
        what earlier dials learnt."""
        self._addrs = addrs
        self._attempt = attempt
        self._stagger = stagger or Stagger()
        self._discard = discard
        self._failures: dict[int, MycelError] = {}
        self._won: list[_T] = []

    async def run(self) -> _T:
        """The first success. Raises `Refused` where a peer was reached and refused, else `DialError` naming
        every address and its failure."""
        if not self._addrs:
            raise DialError("no address to dial: give at least one multiaddr of the peer")
        try:
            await self._race()
        except BaseException:  # why: who cancels the race gets nothing of it; raised again
            self._drop(self._won)
            raise
        if self._won:
            self._drop(self._won[1:])
            return self._won[0]
        for failure in self._failures.values():
            if isinstance(failure, Refused):
                raise failure
        raise DialError("; ".join(f"{self._addrs[i]}: {e}" for i, e in sorted(self._failures.items())))

    def _drop(self, losers: Sequence[_T]) -> None:
        for loser in losers:
            self._discard(loser)

    async def _race(self) -> None:
        limiter = trio.CapacityLimiter(PARALLEL_MAX)
        async with trio.open_nursery() as nursery:
            for index, addr in enumerate(self._addrs):
                failed = trio.Event()
                await limiter.acquire_on_behalf_of(index)
                nursery.start_soon(self._try, index, addr, failed, limiter, nursery.cancel_scope)
                with trio.move_on_after(self._stagger.seconds):
                    await failed.wait()

    async def _try(
        self,
        index: int,
        addr: Multiaddr,
        failed: trio.Event,
        limiter: trio.CapacityLimiter,
        race: trio.CancelScope,
    ) -> None:
        began = trio.current_time()
        try:
            self._won.append(await self._attempt(addr))
            self._stagger.learn(trio.current_time() - began)
            race.cancel()
        except MycelError as error:
            self._failures[index] = error
        finally:
            failed.set()
            limiter.release_on_behalf_of(index)
