"""One stage of a model on this node, from choosing its layers to leaving.

The engine's life is the supervisor's business; what follows from it is decided here: while it is down the
stage refuses sessions and its fact says "loading"; when it is back, the fact says "ready" again.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import msgspec
import trio
from trio import TaskStatus

from mycel.compute.engine import Engine, EngineLost, ModelCard, ModelUnsupported, Span, StageInfo, StageSpec
from mycel.compute.infer.links import Links
from mycel.compute.infer.messages import ModelFact, StageFact, is_stage_key, model_key, stage_key
from mycel.compute.infer.placement import Holding, Placement, plan_placement
from mycel.compute.infer.rescue import plan_rescue, read_rooms
from mycel.compute.infer.stage import Stage
from mycel.compute.supervise import EngineEvent, Lost, Ready, Supervisor
from mycel.protocol.board import Board
from mycel.protocol.errors import MycelError, Refused
from mycel.protocol.mesh import PeerId

FACT_S = 1.0
"""Load and speed are published at most this often."""
CLAIM_S = 0.5
"""How long a claim may take to reach everybody who claims at the same moment."""
UNBOUNDED = 1 << 62


class ServeOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How a stage is chosen when no layers are named."""

    stages: int | None = None
    """How many peers should share the model; None: as few as the memory allows."""
    weight_bytes_max: int | None = None
    """Memory for weights on this node; None: no bound, all layers fit."""
    standby: bool = False
    """Be a spare: taken into routes only where nobody else serves the layers. Spans that are chosen because
    all layers have a holder already are spares anyway."""
    fingerprint: str | None = None
    """Serve only this very model; another one of the same name is refused."""
    beside: bool = False
    """Take of the layers that lost their last holder, beside the stages that this node has of the model."""
    bring: Callable[[Span], Awaitable[None]] | None = None
    """Brings the files of the layers that were chosen, before they are loaded. Raises to end the stage."""


class Served:
    """A stage and what the board says of it."""

    def __init__(
        self,
        links: Links,
        board: Board,
        spec: StageSpec,
        options: ServeOptions,
        report: Callable[[EngineEvent], None] | None,
    ) -> None:
        self.stage: Stage | None = None
        self.files: dict[str, bytes] | None = None
        """The model's small files, None where it has no tokenizer."""
        self.number = 0
        """Which of this node's stages of the model it is."""
        self._links = links
        self._board = board
        self._me = links.mesh.peer_id
        self._spec = spec
        self._options = options
        self._report = report
        self._standby = options.standby
        self._card: ModelCard | None = None
        self._supervisor: Supervisor | None = None
        self._scope = trio.CancelScope()
        self._fact: StageFact | None = None
        self._losses = 0
        self._change = trio.Event()  # of the engine's state

    # --- life

    async def run(
        self, start_engine: Callable[[], Engine], *, task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Keep the engine alive and the stage at work until `end`."""
        self._supervisor = Supervisor(start_engine, self._on_engine_event)
        with self._scope:
            async with trio.open_nursery() as nursery:
                await nursery.start(self._supervisor.run)
                nursery.start_soon(self._work)
                nursery.start_soon(self._publish_load)
                task_status.started()
        self._withdraw()

    async def describe(self) -> ModelCard:
        """The model's card. Raises as `Engine.describe`."""
        self._card = await self._engine.describe(self._spec.model)
        return self._card

    @property
    def fingerprint(self) -> str | None:
        """The model's, once it is known."""
        return None if self._card is None else self._card.fingerprint

    @property
    def span(self) -> Span | None:
        """Its layers, once they are known."""
        return self._spec.span

    async def load(self, progress: Callable[[float, str], None] | None) -> StageInfo:
        """Choose the layers where none are named, and load them. Raises as `Engine.load`, and `Refused`."""
        card = self._described
        span = self._spec.span
        if span is None:
            placement = await self._choose(card)
            span, self._standby = placement.span, placement.standby or self._options.standby
            self._spec = msgspec.structs.replace(self._spec, span=span)
        self._publish(StageFact(span=span, state="loading", standby=self._standby))
        try:
            self.files = await self._engine.tokenizer_files(self._spec.model)
        except ModelUnsupported:
            self.files = None
        if self._options.bring is not None:
            await self._options.bring(span)
        info = await self._engine.load(self._spec, progress)
        self._board.publish(model_key(card.fingerprint), msgspec.msgpack.encode(ModelFact(info.card)))
        self.stage = Stage(self._engine, info, self._links)
        self._publish(StageFact(span=info.span, state="ready", standby=self._standby))
        self._changed()
        return info

    def begin_leaving(self) -> None:
        """Take no more sessions and say so."""
        if self.stage is not None and self._fact is not None:
            self.stage.closing = True
            self._publish(msgspec.structs.replace(self._fact, state="leaving"))

    def end(self) -> None:
        """Stop; what runs here is cut off."""
        if self.stage is not None:
            self.stage.fail_all("engine", "the stage left")
        self._scope.cancel()
        self._withdraw()

    @property
    def _engine(self) -> Supervisor:
        if self._supervisor is None:
            raise MycelError("the stage is not running")
        return self._supervisor

    @property
    def _described(self) -> ModelCard:
        if self._card is None:
            raise MycelError("the model is not described yet")
        return self._card

    # --- layers

    async def _choose(self, card: ModelCard) -> Placement:
        claim: Placement | None = None
        bound = self._options.weight_bytes_max
        while True:
            holdings = read_holdings(self._board, card.fingerprint, but=(self._me, self._key))
            if self._options.beside:
                span = plan_rescue(card, holdings, read_rooms(self._board), self._me)
                if span is None:
                    raise Refused(f"the layers of {card.name} are taken by now", reason="settled")
                plan: Placement | None = Placement(span, standby=False)
            else:
                plan = plan_placement(
                    card, holdings, self._me, UNBOUNDED if bound is None else bound, self._options.stages
                )
            if plan is None:
                raise Refused(
                    f"one layer of {card.name} takes {(card.layer_bytes + card.edge_bytes) >> 20} MiB, more "
                    f"than the {(bound or 0) >> 20} MiB for weights; raise that bound",
                    reason="memory",
                )
            if plan == claim:
                return plan
            claim = plan
            self._publish(StageFact(span=plan.span, state="claiming", standby=plan.standby))
            await trio.sleep(CLAIM_S)

    # --- the engine

    async def _work(self) -> None:
        """Run the stage's loop, again after each loss."""
        while True:
            stage, losses = self.stage, self._losses
            if stage is None or stage.down is not None:
                await self._change.wait()
                continue
            try:
                await stage.run()
            except EngineLost:
                while self._losses == losses:  # the supervisor is about to say so too
                    await self._change.wait()

    def _on_engine_event(self, event: EngineEvent) -> None:
        stage = self.stage
        if isinstance(event, Lost):
            self._losses += 1
            if stage is not None and self._fact is not None:
                stage.down = event.why
                stage.fail_all("engine", event.why)
                if event.retry_s is None:
                    self._withdraw()
                else:
                    self._publish(msgspec.structs.replace(self._fact, state="loading", sessions=0))
            self._changed()
        elif isinstance(event, Ready) and stage is not None and self._fact is not None:
            stage.down = None
            self._publish(msgspec.structs.replace(self._fact, state="leaving" if stage.closing else "ready"))
            self._changed()
        if self._report is not None:
            self._report(event)

    def _changed(self) -> None:
        change, self._change = self._change, trio.Event()
        change.set()

    # --- facts

    @property
    def _key(self) -> str:
        return stage_key(self._described.fingerprint, self.number)

    def _publish(self, fact: StageFact) -> None:
        self._fact = fact
        self._board.publish(self._key, msgspec.msgpack.encode(fact))

    def _withdraw(self) -> None:
        """Take the stage back, and the model with the last of its stages."""
        if self._fact is None:
            return
        self._fact = None
        fingerprint = self._described.fingerprint
        self._board.withdraw(self._key)
        if all(held.peer != self._me for held in read_holdings(self._board, fingerprint)):
            self._board.withdraw(model_key(fingerprint))

    async def _publish_load(self) -> None:
        """Keep the fact's load and speed true enough."""
        while True:
            await trio.sleep(FACT_S)
            stage, fact = self.stage, self._fact
            if stage is None or fact is None:
                continue
            measured = stage.layer_row_s
            if len(stage.sessions) != fact.sessions or abs(measured - fact.layer_row_s) > measured / 5:
                self._publish(
                    msgspec.structs.replace(fact, sessions=len(stage.sessions), layer_row_s=measured)
                )


def read_holdings(board: Board, fingerprint: str, but: tuple[PeerId, str] | None = None) -> list[Holding]:
    """Who holds what of a model, and in which state; without the fact of one author and key, if given."""
    holdings = []
    for fact in board.facts(stage_key(fingerprint)):
        stage = read_stage(fact.value)
        if stage is not None and is_stage_key(fact.key, fingerprint) and (fact.author, fact.key) != but:
            holdings.append(Holding(fact.author, stage.span, stage.state, stage.standby))
    return holdings


def read_stage(value: bytes | None) -> StageFact | None:
    """The stage that a fact speaks of; None for one that makes no sense."""
    if value is None:
        return None
    try:
        fact = msgspec.msgpack.decode(value, type=StageFact)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    return fact if fact.span != Span(0, 0) and 0 <= fact.span.start < fact.span.end else None
