"""What must hold in every simulated world, whatever the scenario.

The checkers are always on and watch the trace, so a scenario that passes has also kept these rules at every
one of its events. A broken rule raises `InvariantBroken` with the last events, at the moment it breaks.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from mycel.simnet.events import Event, Trace

if TYPE_CHECKING:
    from mycel.simnet.flow import Flow
    from mycel.simnet.machine import Machine


class InvariantBroken(AssertionError):
    """The simulated world did what no world may do."""


class Checks:
    """All checkers of one world."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._last_at = 0.0
        trace.watch(self._on_event)

    def _fail(self, text: str) -> None:
        recent = "\n  ".join(map(str, self._trace.recent))
        raise InvariantBroken(f"{text}; the last events were\n  {recent}")

    def _on_event(self, event: Event) -> None:
        """Time never runs backwards."""
        if event.at < self._last_at:
            self._fail(f"time ran backwards, from {self._last_at} to {event.at}")
        self._last_at = event.at

    def on_flow(self, flow: Flow) -> None:
        """Bytes are neither made nor lost, and no buffer grows past its bound."""
        if not 0 <= flow.read <= flow.arrived <= flow.sent <= flow.taken:
            self._fail(f"bytes were made up or lost: {flow}")
        if flow.unread > flow.receive_bound:
            self._fail(f"{flow.unread} bytes in a receive buffer of {flow.receive_bound}: {flow}")
        if flow.unsent > flow.send_bound:
            self._fail(f"{flow.unsent} bytes in a send buffer of {flow.send_bound}: {flow}")

    def at_end(self, machines: Iterable[Machine]) -> None:
        """A machine that is off holds nothing."""
        for machine in machines:
            if not machine.is_on and (machine.pipes or machine.listeners or machine.tcp.openings):
                self._fail(f"{machine} is off and still holds {machine.pipes} {machine.listeners}")
