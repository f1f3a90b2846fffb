"""The stage service: this node's engines at work for everybody's sessions."""

from __future__ import annotations

from typing import Protocol

import msgspec
import trio

from mycel.compute.engine import Engine, StageInfo, StageSpec


class ServeOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How a stage is chosen when no layers are named."""

    stages: int | None = None
    """How many peers should share the model; None: as few as the memory allows."""
    weight_bytes_max: int | None = None
    """Memory for weights on this node; None: what the device has free."""


class SessionCounters(msgspec.Struct):
    """What one session cost this stage (or all of them together)."""

    rows_computed: int = 0
    rows_duplicate: int = 0
    """Rows that came again and were dropped."""
    rows_resent: int = 0
    """Rows sent from the log, not computed."""
    steps: int = 0


class StageServer(Protocol):
    """Construct with (mesh, rpc, board, links), then `await nursery.start(stages.run)`."""

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None: ...

    async def serve(
        self, engine: Engine, spec: StageSpec, options: ServeOptions = ServeOptions()
    ) -> StageInfo:
        """Load a stage into `engine` and serve it until `leave`. `spec.span` None: the span is planned from
        what the board shows to be missing. A lost engine is loaded again. Raises as `Engine.load`."""

    async def leave(self, grace_s: float = 5.0) -> None:
        """Say on the board that the stages go, wait until their sessions moved (at most `grace_s`), stop."""

    @property
    def totals(self) -> SessionCounters: ...

    def counters(self, session: str) -> SessionCounters | None:
        """A live session's counters; ended sessions are kept for a while."""
