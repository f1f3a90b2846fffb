"""Trainers as processes: they stay from round to round, hold no keys, and their end is told and mended."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio

from mycel.compute.engine import EngineLost
from mycel.compute.process import WorkerOptions
from mycel.compute.train.layout import Entry, Layout
from mycel.compute.train.trade import Source, StartAsk, WorkAsk, WorkDone
from mycel.compute.train.trainer import SERVE, Trainers, start_trainer
from mycel.protocol.tensor import Tensor

APP = b"""
import gc, os, sys
import numpy as np
import mycel

app = mycel.App()


@app.start
def start(task):
    return {"w": np.zeros(4, np.float32)}


@app.train
def train(task):
    task.cache["rounds"] = task.cache.get("rounds", 0) + 1
    if task.settings.get("fails"):
        raise KeyError("spam")
    files = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")
             if os.path.lexists(f"/proc/self/fd/{fd}")]
    return task.done(
        {"w": task.arrays["w"] + 1},
        examples=np.int64(3),
        pid=os.getpid(),
        rounds=task.cache["rounds"],
        secrets=sum("secret" in value for value in os.environ.values()),
        homes=sum("identity" in name or "mycel-home" in name for name in files),
        sockets=sum(name.startswith("socket:") for name in files),
        torch="torch" in sys.modules,
    )
"""
OWN = Source("own", {"app.py": APP})
LAYOUT = Layout((Entry("w", (4,)),))


def ask(number: int, **settings: Any) -> WorkAsk:
    row = np.zeros(4, np.float32)
    tensor = Tensor("float32", (4,), row.data.cast("B"))
    return WorkAsk("own", "job", number, LAYOUT, tensor, settings, 1, "/nowhere", True, False)


@pytest.fixture
async def trainers(tmp_path: Path) -> AsyncIterator[Trainers]:
    """As a daemon has them, whose environment has secrets, and whose key file is open."""
    environment = {**os.environ, "MYCEL_TICKET": "secret", "AWS_SECRET_ACCESS_KEY": "a secret"}
    options = WorkerOptions(environment, serve=SERVE, threads=1)
    home = tmp_path / "mycel-home"
    home.mkdir()
    with (home / "identity.key").open("w"):
        trainers = Trainers(lambda: start_trainer(options))
        yield trainers
        with trio.CancelScope(shield=True):
            await trainers.aclose()


async def work(trainers: Trainers, number: int, **settings: Any) -> WorkDone:
    with trio.fail_after(60):
        return await trainers.work(OWN, ask(number, **settings), 30.0)


async def test_a_trainer_stays_from_round_to_round_and_has_no_keys(trainers: Trainers) -> None:
    with trio.fail_after(60):
        begun = await trainers.start_model(OWN, StartAsk("own", {}, 1))
    assert begun.layout == LAYOUT
    first, second = [(await work(trainers, number)).metrics for number in (1, 2)]
    assert first["pid"] == second["pid"] != os.getpid()
    assert (first["rounds"], second["rounds"]) == (1, 2)
    assert (first["secrets"], first["homes"]) == (0, 0)
    assert first["sockets"] == 1, "the one to its daemon"
    assert not first["torch"], "whoever does not need torch does not wait for it"
    with pytest.raises(ValueError, match=r"KeyError: 'spam' \(app.py:18\)"):
        await work(trainers, 3, fails=True)
    assert (await work(trainers, 4)).metrics["pid"] == first["pid"], "it is as good as before"


async def test_a_trainer_that_is_killed_is_named_and_another_is_started(trainers: Trainers) -> None:
    pid = int((await work(trainers, 1)).metrics["pid"])
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(EngineLost, match="SIGKILL"):
        await work(trainers, 2)
    again = await work(trainers, 2)
    assert again.update is not None
    assert again.metrics["pid"] != pid
    assert again.metrics["rounds"] == 1
    assert np.frombuffer(again.update.data, np.float32).tolist() == [1.0] * 4
