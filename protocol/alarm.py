"""The one task that watches over all deadlines of a node's outgoing calls."""

from __future__ import annotations

import trio

from mycel.protocol.deadlines import Deadlines, Waiter


class Alarm:
    """Expires waiters whose time has come: one cancel scope for all, instead of one for each."""

    def __init__(self) -> None:
        self._deadlines = Deadlines()
        self._scope: trio.CancelScope | None = None

    async def run(self) -> None:
        """Ring until cancelled."""
        while True:
            with trio.CancelScope(deadline=self._deadlines.next_at) as self._scope:
                await trio.sleep_forever()
            for waiter in self._deadlines.due(trio.current_time()):
                waiter.expire()

    def set(self, when: float, number: int, waiter: Waiter) -> None:
        """Expire `waiter` at `when` (trio time). `number` is its own among all waiters."""
        waiter.is_settled = False
        self._deadlines.add(when, number, waiter)
        if self._scope is not None and when < self._scope.deadline:
            self._scope.deadline = when

    def clear(self, waiter: Waiter) -> None:
        """`waiter` needs no deadline any more; nothing happens where it has none."""
        self._deadlines.settle(waiter)
