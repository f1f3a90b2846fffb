"""Federated jobs in a swarm: rounds outlive everybody, and who spoils one spoils it for itself only."""

from __future__ import annotations

import json

import numpy as np
import pytest
import trio
from safetensors.numpy import load

from mycel.compute.train.app import App, Judged, Task, Trained
from mycel.compute.train.client import Owner
from mycel.compute.train.inline import InlineTrainer
from mycel.compute.train.trainer import Trainers
from mycel.compute.train.workshop import Workshop
from mycel.node.jobs.federate import FederateRunner
from mycel.node.jobs.spec import JobInvalid, read_spec


class Farm:
    """Clients that train towards their own number, and who trained what."""

    def __init__(self, tmp_path) -> None:
        self.trained: list[tuple[str, str, int]] = []
        self.spoils: dict[str, str] = {}
        self.folder = tmp_path

    def kind(self, services, node) -> FederateRunner:
        name = node.mesh.name
        goal = float(name.removeprefix("n"))
        app = App()

        @app.start
        def start(task: Task) -> dict[str, np.ndarray]:
            return {"w": np.zeros(500, np.float32)}

        @app.train
        def train(task: Task) -> Trained:
            self.trained.append((str(task.settings["job"]), name, task.number))
            how = self.spoils.get(name) if task.settings["job"] == "spoilt" else None
            size = 400 if how == "shape" else 500
            return task.done({"w": np.full(size, np.inf if how == "inf" else goal, np.float32)}, examples=1)

        @app.evaluate
        def evaluate(task: Task) -> Judged:
            return task.judged(examples=1, mean=float(task.arrays["w"].mean()))

        workshop = Workshop()
        workshop.add("classifier", app)
        trainers = Trainers(lambda: InlineTrainer(workshop, lambda ask: 1.0))
        return FederateRunner(services, trainers, Owner({"numbers": self.folder}))


def spec_of(name: str, rounds: int, **more: object):
    keys = {"kind": "federate", "name": name, "app": "classifier", "data": "numbers", "rounds": rounds}
    return read_spec({**keys, "quorum": 2, "settings": {"job": name}, **more})


async def ended(s, node, job) -> str:
    await s.until(lambda: node.view(job).is_ended, 300)
    return node.view(job).phase


async def test_after_the_whole_swarm_was_off_the_same_round_goes_on(swarm, autojump_clock, tmp_path):
    farm = Farm(tmp_path)
    async with swarm(farm.kind) as s:
        nodes = await s.grow(4)
        job = (await nodes[0].jobs.submit(spec_of("long", 12), {})).id
        await s.until(lambda: any(node.view(job).step >= 5 for node in nodes))
        done = max(node.view(job).step for node in nodes)
        for node in nodes:
            node.kill()
        await trio.sleep(5)
        before = len(farm.trained)
        for node in nodes:
            await node.restart()
        assert await ended(s, nodes[3], job) == "done"
        numbers = [number for _, _, number in farm.trained]
        assert min(numbers[before:]) in (done + 1, done + 2), "what was kept is not done again"
        assert sorted(dict.fromkeys(numbers)) == [*range(1, 13)]
        model = load(await nodes[3].result(job, "model.safetensors"))
        assert np.allclose(model["w"], 1.5)  # the mean of 0, 1, 2 and 3
        rows = json.loads(await nodes[3].result(job, "rounds.json"))
        assert rows[-1]["round"] == 12


async def test_updates_that_are_none_are_named_and_other_jobs_go_on(swarm, autojump_clock, tmp_path):
    farm = Farm(tmp_path)
    farm.spoils = {"n0": "inf", "n3": "shape"}
    async with swarm(farm.kind) as s:
        nodes = await s.grow(4)
        spoilt = (await nodes[0].jobs.submit(spec_of("spoilt", 3), {})).id
        other = (await nodes[1].jobs.submit(spec_of("other", 3), {})).id
        assert [await ended(s, nodes[2], job) for job in (spoilt, other)] == ["done", "done"]
        assert np.allclose(load(await nodes[2].result(spoilt, "model.safetensors"))["w"], 1.5)  # of 1 and 2
        assert np.allclose(load(await nodes[2].result(other, "model.safetensors"))["w"], 1.5)  # of all four
        said = [line.text async for line in nodes[2].jobs.lines(spoilt, follow=True)]
        for node, why in (
            (nodes[0], "went astray (an update that is not finite"),
            (nodes[3], "came back as (400,)"),
        ):
            assert any(f"round 1, {node.peer}" in line and why in line for line in said), said


async def test_a_round_under_quorum_fails_the_job_aloud(swarm, autojump_clock, tmp_path):
    farm = Farm(tmp_path)
    async with swarm(farm.kind) as s:
        nodes = await s.grow(3)
        job = (await nodes[0].jobs.submit(spec_of("few", 3, quorum=4, patience_s=1), {})).id
        assert await ended(s, nodes[1], job) == "failed"
        assert "has 3 of 4 updates, 3 clients are there" in nodes[1].view(job).text


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"strategy": "fedavgg"}, "no strategy 'fedavgg'"),
        ({"tuning": {"rat": 1.0}}, "rat"),
        ({"quorum": 4, "clients": 3}, "clients = 3: a round closes with its quorum of 4"),
        ({"strategy": "flag", "fan_out": 4}, "must see every update itself"),
        ({"app": "resnet"}, "built in are classifier"),
    ],
    ids=str,
)
async def test_what_can_only_fail_is_not_submitted(swarm, autojump_clock, tmp_path, keys, says):
    farm = Farm(tmp_path)
    async with swarm(farm.kind) as s:
        (node,) = await s.grow(1)
        with pytest.raises(JobInvalid, match=says):
            await node.jobs.submit(spec_of("wrong", 3, **keys), {})
        assert node.jobs.views().jobs == ()
