"""Where applications run: the inside of a trainer process, and of simulations.

It turns rows into named arrays and back, keeps each application's cache and each job's momentum, and knows no
network. A bundle's files are written to a folder of this process and imported from there: whoever runs one
has decided before that its submitter is trusted.

**Worker momentum** (setting `worker_momentum`, beta): instead of its update u the client sends m = beta * m +
(1 - beta) * u, begun with its first update. It is kept by job and lives as long as the process. A round that
is repeated counts once in it.
"""

from __future__ import annotations

import importlib
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mycel.compute.train.app import App, Judged, Task, Trained, as_arrays
from mycel.compute.train.layout import Layout
from mycel.compute.train.rows import Flat, check_finite, flatten, layout_of, row_of, unflatten
from mycel.compute.train.trade import (
    BUNDLE_ENTRY,
    Begun,
    Source,
    StartAsk,
    WorkAsk,
    WorkDone,
)
from mycel.protocol.errors import MycelError, UsageProblem
from mycel.protocol.tensor import Tensor

MODEL_BYTES_MAX = 1 << 34
MODULES = {
    "classifier": "mycel.compute.train.apps.classifier",
    "causal-lm": "mycel.compute.train.apps.causal_lm",
}


class Workshop:
    """Applications by name, and what they keep. `clock` gives seconds, to say how long work took."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._apps: dict[str, App] = {}
        self._caches: dict[str, dict[str, Any]] = {}
        self._momenta: dict[str, tuple[int, Flat, Flat]] = {}  # job: (round, before it, after it)

    def open(self, source: Source) -> None:
        """Load an application; nothing happens where it is loaded. Raises `UsageProblem`."""
        if source.check().name in self._apps:
            return
        if not source.files:
            module = importlib.import_module(MODULES[source.name])
        else:
            folder = Path(tempfile.mkdtemp(prefix="mycel-bundle-"))
            for name, content in source.files.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(content)
            sys.path.insert(0, str(folder))
            module = importlib.import_module(BUNDLE_ENTRY.removesuffix(".py"))
            if len(source.files) == 1:  # it is loaded; parts of larger ones may still be to come
                shutil.rmtree(folder)
        self.add(source.name, getattr(module, "app", None))

    def add(self, name: str, app: object) -> None:
        """Know an application by a name. Raises `UsageProblem` where it is none, or has no training."""
        if not isinstance(app, App) or app.trains is None:
            raise UsageProblem(
                f"application {name!r} defines no app = App() with a function under @app.train"
            )
        self._apps[name] = app

    def start(self, ask: StartAsk) -> Begun:
        """Make the first model of a job. Raises `UsageProblem`."""
        app = self._app(ask.app)
        if app.starts is None:
            raise UsageProblem(
                f"application {ask.app!r} has no function under @app.start, and the job no first model"
            )
        task = Task({}, ask.settings, Path(), 0, ask.seed, self._cache(ask.app))
        arrays = as_arrays(app.starts(task))
        layout = layout_of(arrays).check(MODEL_BYTES_MAX)
        flat = flatten(arrays, layout)
        check_finite(flat)
        return Begun(layout, Tensor("float32", (layout.size,), flat.data.cast("B")))

    def work(self, ask: WorkAsk) -> WorkDone:
        """Judge and train as asked. Raises `UsageProblem`, `Refused`, and what the application raises."""
        began = self._clock()
        app = self._app(ask.app)
        layout = ask.layout
        model = row_of(ask.model.data, layout)
        judged, trained, update = Judged(0, {}), None, None
        if ask.evaluate:
            if app.evaluates is None:
                raise UsageProblem(f"application {ask.app!r} has no function under @app.evaluate")
            judged = app.evaluates(self._task(ask, model, layout))
            _expect(judged, Judged, ask.app, "task.judged(...)")
        if ask.train and app.trains is not None:
            trained = app.trains(self._task(ask, model, layout))
            _expect(trained, Trained, ask.app, "task.done(...)")
            update = self._update(ask, flatten(trained.arrays, layout) - model)
        return WorkDone(
            update=None if update is None else Tensor("float32", (layout.size,), update.data.cast("B")),
            examples=trained.examples if trained else 0,
            metrics=dict(trained.metrics) if trained else {},
            judged_examples=judged.examples,
            judged=dict(judged.metrics),
            seconds=self._clock() - began,
        )

    def _update(self, ask: WorkAsk, update: Flat) -> Flat:
        try:
            check_finite(update)
        except MycelError as error:
            raise UsageProblem(f"training went astray ({error}): lower the learning rate") from None
        beta = ask.settings.get("worker_momentum", 0.0)
        if not isinstance(beta, int | float) or not 0 <= beta < 1:
            raise UsageProblem(f"worker_momentum = {beta!r}: it must be a number in [0, 1)")
        if not beta:
            return update
        before = update
        if ask.job in self._momenta:
            number, earlier, latest = self._momenta[ask.job]
            before = earlier if number == ask.number else latest
            if before.shape != update.shape:
                before = update
        after: Flat = np.float32(beta) * before + np.float32(1 - beta) * update
        self._momenta[ask.job] = (ask.number, before, after)
        return after

    def _task(self, ask: WorkAsk, model: Flat, layout: Layout) -> Task:
        arrays = unflatten(model.copy(), layout)
        return Task(arrays, ask.settings, Path(ask.data), ask.number, ask.seed, self._cache(ask.app))

    def _app(self, name: str) -> App:
        if name not in self._apps:
            raise UsageProblem(f"application {name!r} is not loaded here")
        return self._apps[name]

    def _cache(self, name: str) -> dict[str, Any]:
        return self._caches.setdefault(name, {})


def _expect(result: object, kind: type, app: str, how: str) -> None:
    if not isinstance(result, kind):
        raise UsageProblem(f"application {app!r} returned {type(result).__name__}; end it by return {how}")
