"""Where one task waits for the simulated world to wake it."""

from __future__ import annotations

import trio


class Park:
    """A place for one waiting task. A bare task park: no event object, no lock."""

    __slots__ = ("_task", "_what")

    def __init__(self, what: str) -> None:
        """`what` names the resource in the error that a second task gets."""
        self._task: trio.lowlevel.Task | None = None
        self._what = what

    async def wait(self) -> None:
        """Wait for the next `wake`. Raises `trio.BusyResourceError` when another task waits here."""
        if self._task is not None:
            raise trio.BusyResourceError(f"another task is waiting for {self._what}")
        self._task = trio.lowlevel.current_task()

        def abort(_: object) -> trio.lowlevel.Abort:
            self._task = None
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)

    def wake(self) -> None:
        """Let the waiting task go on; nothing happens where none waits."""
        if self._task is not None:
            task, self._task = self._task, None
            trio.lowlevel.reschedule(task)
