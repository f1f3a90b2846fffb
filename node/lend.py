"""What this node lends: engines with stages in them, by order of its owner or by the swarm's need.

Each stage has an engine of its own, which the stage service keeps alive; where no layers are named it plans
them from what the board shows to be missing.

**Assignment.** Unless its owner turned it off, a node looks at the models that the swarm runs, and takes
layers of each that it can find on this machine: in the folders that its config names, or on the hub if that
was allowed. A model is the same one only if its fingerprint is.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import trio

from mycel.compute.engine import (
    Engine,
    EngineLost,
    ModelCard,
    ModelUnsupported,
    Span,
    StageInfo,
    StageSpec,
)
from mycel.compute.infer.generate import Generator
from mycel.compute.infer.serve import ServeOptions, StageServer
from mycel.compute.supervise import EngineEvent, Loading, Lost, Ready
from mycel.node.config import Config
from mycel.node.views import StageView
from mycel.protocol.errors import MycelError

log = logging.getLogger("mycel.node")

EngineFactory = Callable[[], Engine]
"""Starts an engine and returns at once."""

SETTLE_S = 0.5
"""How long a node waits after the board changed before it looks what the swarm needs: news come in bursts."""
RETRY_S = 60.0
"""Pause before a model that could not be taken is tried again."""


@dataclass(slots=True)
class Lent:
    """One stage that this node lends or is about to."""

    model: str
    span: Span | None
    state: str = "starting"
    info: StageInfo | None = None
    trouble: str = ""

    def on_progress(self, fraction: float, what: str) -> None:
        """Loading goes on."""
        self.state = f"loading {fraction:.0%}"

    def view(self) -> StageView:
        """As shown by the faces."""
        info = self.info
        if info is None:
            start, end = (self.span.start, self.span.end) if self.span else (0, 0)
            return StageView(self.model, "", start, end, 0, self.state, trouble=self.trouble)
        return StageView(
            model=info.card.name,
            fingerprint=info.card.fingerprint,
            start=info.span.start,
            end=info.span.end,
            layers=info.card.n_layers,
            state=self.state,
            device=info.device,
            dtype=info.dtype,
            weight_bytes=info.weight_bytes,
            trouble=self.trouble,
        )


class Lender:
    """The service. `losses` counts workers that died."""

    def __init__(
        self, config: Config, engines: EngineFactory, stages: StageServer, generator: Generator
    ) -> None:
        self._config = config
        self._engines = engines
        self._stages = stages
        self._generator = generator
        self._lent: list[Lent] = []
        self._tried: dict[str, float] = {}
        self.losses = 0

    async def serve(self, model: str, span: Span | None) -> Lent:
        """Load layers of `model` and lend them until the node ends.

        `model` is a folder, a name in one of the config's folders, or a hub id. Raises `FileNotFoundError`,
        `ModelUnsupported`, `EngineLost`, and what the stage service refuses.
        """
        return await self._lend(model, self._place(model), span, None)

    async def _lend(self, model: str, place: str, span: Span | None, fingerprint: str | None) -> Lent:
        spec = StageSpec(
            model=place,
            span=span,
            dtype=self._config.dtype,
            device=self._config.device,
            kv_bytes_max=self._config.kv_bytes_max,
            threads=self._config.threads,
        )
        options = ServeOptions(
            stages=self._config.stages or None,
            weight_bytes_max=self._config.memory_bytes or None,
            fingerprint=fingerprint,
        )
        lent = Lent(model, span)
        self._lent.append(lent)
        try:
            lent.info = await self._stages.serve(
                spec, self._engines, options, lent.on_progress, lambda event: self._on_engine(lent, event)
            )
        except BaseException:  # why: a cancelled load is not lent either; raised again
            self._lent.remove(lent)
            raise
        lent.state = "ready"
        log.info("serving layers %d:%d of %s", lent.info.span.start, lent.info.span.end, model)
        return lent

    def _place(self, model: str) -> str:
        path = Path(model).expanduser()
        return str((path.absolute() if path.is_dir() else self.find(model)) or model)

    def find(self, name: str) -> Path | None:
        """The model of that name in one of the config's folders. Others' names lead nowhere else."""
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or ".." in name.split("/"):
            return None
        for folder in self._config.models:
            place = Path(folder).expanduser() / name
            if (place / "config.json").is_file():
                return place.absolute()
        return None

    def views(self) -> Sequence[StageView]:
        """What is lent, in order of asking."""
        return [lent.view() for lent in self._lent]

    async def assign(self) -> None:
        """Take layers of the swarm's models, until cancelled."""
        while True:
            for status in self._generator.models():
                await self._take(status.card)
            await self._wait_news()

    async def _take(self, card: ModelCard) -> None:
        now = trio.current_time()
        if any(lent.info is None or _is_same(lent.info.card, card) for lent in self._lent):
            return  # one at a time, and each model once
        if now < self._tried.get(card.fingerprint, now):
            return
        self._tried[card.fingerprint] = now + RETRY_S
        folder = self.find(card.name)
        if folder is None and not self._config.assign_from_hub:
            log.info("%s is not on this machine; its layers are left to others", card.name)
            return
        try:
            await self._lend(card.name, str(folder or card.name), None, card.fingerprint)
        except (MycelError, FileNotFoundError, ModelUnsupported, EngineLost) as error:
            log.warning("no layers of %s are taken: %s", card.name, error)

    async def _wait_news(self) -> None:
        """Until other models are known or others hold them, or it is time to try again."""
        known = self._known()
        with trio.move_on_after(RETRY_S):
            while known == self._known():  # noqa: ASYNC110 bursts of news are one
                await trio.sleep(SETTLE_S)

    def _known(self) -> list[tuple[str, object]]:
        return [(status.card.fingerprint, status.holders) for status in self._generator.models()]

    def _on_engine(self, lent: Lent, event: EngineEvent) -> None:
        match event:
            case Lost(why=why, retry_s=retry_s):
                self.losses += 1
                lent.state, lent.trouble = "lost", why
                then = "not started again" if retry_s is None else f"started again in {retry_s:g} s"
                log.error("the worker of %s is lost, %s: %s", lent.model, then, why)
            case Loading(fraction=fraction, what=what):
                lent.on_progress(fraction, what)
            case Ready():
                lent.state, lent.trouble = "ready", ""


def _is_same(one: ModelCard, other: ModelCard) -> bool:
    return one.fingerprint == other.fingerprint
