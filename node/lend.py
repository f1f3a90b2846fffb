"""What this node lends: engines with stages in them.

Each stage has an engine of its own, which the stage service keeps alive; where no layers are named it plans
them from what the board shows to be missing. A model is looked for on this machine, then among those that
members have as blocks, of which just the layers that are lent are fetched, then on the hub. What the config
names is loaded at the start, and tried again when that fails: a disk may be mounted late, a checkpoint may
still be copied. What the swarm needs beyond that is the business of `mycel.node.assign`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import trio

from mycel.compute.engine import Engine, EngineLost, ModelUnsupported, Span, StageInfo, StageSpec
from mycel.compute.infer.serve import ServeOptions, StageServer
from mycel.compute.supervise import EngineEvent, Loading, Lost, Ready
from mycel.node.catalog import Catalog, Progress
from mycel.node.config import Config, parse_model_layers
from mycel.node.views import StageView
from mycel.protocol.cid import Cid
from mycel.protocol.errors import MycelError, Refused

log = logging.getLogger("mycel.node")

EngineFactory = Callable[[], Engine]
"""Starts an engine and returns at once."""

RETRY_S = 60.0
"""The longest pause before a model that could not be served is tried again."""
RETRY_FIRST_S = 2.0
"""The first; each further one is twice as long."""
FAILURES = (MycelError, FileNotFoundError, ModelUnsupported, EngineLost)
"""Why a model cannot be served."""


@dataclass(slots=True)
class Lent:
    """One stage that this node lends or is about to."""

    model: str
    place: str
    """Where the model is: a folder, or a hub id."""
    span: Span | None
    root: Cid | None = None
    """Its root where it is fetched as blocks; `place` is where they are laid out then."""
    note: Progress | None = None
    """Hears how far it is."""
    state: str = "starting"
    info: StageInfo | None = None
    trouble: str = ""

    def on_progress(self, fraction: float, what: str) -> None:
        """Loading goes on."""
        self.state = f"loading {fraction:.0%}"
        if self.note is not None:
            self.note(what, round(fraction * 100), 100)

    def on_fetched(self, what: str, done: int, total: int) -> None:
        """Blocks came."""
        self.state = f"{what} {done / max(total, 1):.0%}"
        if self.note is not None:
            self.note(what, done, total)

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

    def __init__(self, config: Config, engines: EngineFactory, stages: StageServer, catalog: Catalog) -> None:
        self._config = config
        self._engines = engines
        self._stages = stages
        self.catalog = catalog
        self.lent: list[Lent] = []
        """In order of asking."""
        self.losses = 0

    async def serve(self, model: str, span: Span | None, note: Progress | None = None) -> Lent:
        """Load layers of `model` and lend them until the node ends.

        `model` is a folder, a name in one of the config's folders, a name or root that members announce, or a
        hub id. Raises `FileNotFoundError`, `ModelUnsupported`, `EngineLost`, what the stage service refuses,
        and what fetching raises. `note` hears how far it is.
        """
        place = self._place(model)
        if place is not None:
            return await self.lend(Lent(model, place, span, note=note))
        root = await self.catalog.seek(model)
        try:
            return await self.lend(Lent(model, model, span, root, note))
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{error}; and no member has it as blocks (`mycel models list` shows those that they have)"
            ) from None

    async def serve_configured(
        self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Serve what the config names; started once each was tried, returns when all are served."""
        async with trio.open_nursery() as nursery:
            for item in self._config.serve:
                model, layers = parse_model_layers(item)
                span = Span(*layers) if layers else None
                if not await self._try(item, model, span):
                    nursery.start_soon(self._keep_trying, item, model, span)
            task_status.started()

    async def _keep_trying(self, item: str, model: str, span: Span | None) -> None:
        pause = RETRY_FIRST_S
        await trio.sleep(pause)
        while not await self._try(item, model, span):
            pause = min(2 * pause, RETRY_S)
            await trio.sleep(pause)

    async def _try(self, item: str, model: str, span: Span | None) -> bool:
        """Whether there is nothing more to do about it."""
        try:
            await self.serve(model, span)
        except FAILURES as error:
            over = isinstance(error, Refused) and error.reason in ("twice", "leaving")
            log.error("%s is not served%s: %s", item, "" if over else " yet", error)
            return over
        return True

    async def lend(self, lent: Lent, fingerprint: str | None = None, *, beside: bool = False) -> Lent:
        """Load what `lent` says. `fingerprint`, `beside`: see `ServeOptions`. Raises as `serve`."""
        options = ServeOptions(
            stages=self._config.stages or None,
            weight_bytes_max=self._config.memory_bytes or None,
            fingerprint=fingerprint,
            beside=beside,
            bring=None if lent.root is None else partial(self._bring, lent, lent.root),
        )
        self.lent.append(lent)
        try:
            if lent.root is not None:
                lent.state = "fetching"
                lent.place = str(await self.catalog.prepare(lent.root))
            spec = StageSpec(
                model=lent.place,
                span=lent.span,
                dtype=self._config.dtype,
                device=self._config.device,
                kv_bytes_max=self._config.kv_bytes_max,
                threads=self._config.threads,
            )
            lent.info = await self._stages.serve(
                spec, self._engines, options, lent.on_progress, lambda event: self._on_engine(lent, event)
            )
        except BaseException:  # why: a cancelled load is not lent either; raised again
            self.lent.remove(lent)
            raise
        lent.state, lent.note = "ready", None
        log.info("serving layers %d:%d of %s", lent.info.span.start, lent.info.span.end, lent.model)
        return lent

    async def _bring(self, lent: Lent, root: Cid, span: Span) -> None:
        await self.catalog.bring(root, (span.start, span.end), lent.on_fetched)

    async def drop(self, lent: Lent) -> None:
        """Lend these layers no more."""
        if lent.info is not None:
            await self._stages.drop(lent.info, self._config.leave_s)
            self.lent.remove(lent)

    def _place(self, model: str) -> str | None:
        """Where `model` is on this machine, None where it is not."""
        path = Path(model).expanduser()
        place = path.absolute() if path.is_dir() else self.find(model)
        return None if place is None else str(place)

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
        return [lent.view() for lent in self.lent]

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
