"""Train jobs in a swarm: the course outlives its coordinator, and the whole swarm's end."""

from __future__ import annotations

import json

import numpy as np
import pytest
import trio
from safetensors.numpy import load

from mycel.compute.train.app import App, Task, Trained
from mycel.compute.train.client import Owner
from mycel.compute.train.inline import InlineTrainer
from mycel.compute.train.trainer import Trainers
from mycel.compute.train.workshop import Workshop
from mycel.node.jobs.kinds import TrainSpec
from mycel.node.jobs.spec import JobInvalid, read_spec
from mycel.node.jobs.train import TrainRunner
from mycel.node.together import Together
from mycel.protocol.errors import Refused, UsageProblem

DATA = {"data": b"3.0\n"}
STEPS, EVERY = 60, 5

app = App()


@app.start
def start(task: Task) -> dict[str, np.ndarray]:
    return {"w": np.full(2000, 10.0, np.float32)}


@app.train
def train(task: Task) -> Trained:
    """Go half of the way to the number in the data."""
    goal = float(task.data.read_text())
    away = task.arrays["w"] - np.float32(goal)
    if task.settings.get("fails"):
        raise UsageProblem("this cannot be trained on")
    kept = 0.95 ** task.setting("steps", 1)
    return task.done(
        {"w": np.float32(goal) + away * np.float32(kept)}, examples=1, loss=float(abs(away).mean())
    )


def kind(services, node, owner: Owner | None = None, cost=lambda ask: 1.0) -> TrainRunner:
    """The train kind, with a trainer that takes a virtual second for each request, or as `cost` says."""
    together = Together(node.mesh, node.rpc)
    node.services.append(together)
    workshop = Workshop()
    workshop.add("classifier", app)

    def begin() -> InlineTrainer:
        node.trainer = InlineTrainer(workshop, cost)
        return node.trainer

    trainers = Trainers(begin)
    return TrainRunner(services, trainers, owner or Owner(), together)


def spec_of(**more: object) -> TrainSpec:
    keys: dict[str, object] = {
        "kind": "train",
        "app": "classifier",
        "data": "data.txt",
        "steps": STEPS,
        "inner_steps": EVERY,
        "peers": 2,
    }
    spec = read_spec({key: value for key, value in {**keys, **more}.items() if value is not None})
    assert isinstance(spec, TrainSpec)
    return spec


async def ended(s, node, job) -> str:
    await s.until(lambda: node.view(job).is_ended, 600)
    return node.view(job).phase


async def results(node, job) -> tuple[np.ndarray, list[dict[str, float]]]:
    model = load(await node.result(job, "model.safetensors"))
    return model["w"], json.loads(await node.result(job, "borders.json"))


async def test_members_train_one_model_and_anybody_sees_how_it_goes(swarm, autojump_clock):
    async with swarm(kind) as s:
        nodes = await s.grow(3)
        job = (await nodes[0].jobs.submit(spec_of(), DATA)).id
        await s.until(lambda: nodes[2].view(job).step == 4)
        assert nodes[2].view(job).metrics["peers"] == 3.0
        assert await ended(s, nodes[1], job) == "done"
        weights, borders = await results(nodes[1], job)
        assert [one["step"] for one in borders] == list(range(1, STEPS // EVERY + 1))
        assert abs(weights - 3.0).max() < 1.0
        assert borders[-1]["loss"] < 0.2 * borders[0]["loss"]
        checkpoint = load(await nodes[0].result(job, "checkpoint.safetensors"))
        assert np.array_equal(checkpoint["w"], weights)
        assert checkpoint["outer.momentum"].shape == (2000,)


async def test_a_course_goes_on_while_its_coordinator_is_replaced(swarm, autojump_clock):
    async with swarm(kind) as s:
        nodes = await s.grow(4)
        job = (await nodes[0].jobs.submit(spec_of(), DATA)).id
        await s.until(lambda: any(node.view(job).step >= 3 for node in nodes))
        coordinator = s.coordinator(job)
        coordinator.kill()
        others = [node for node in nodes if node is not coordinator]
        assert await ended(s, others[0], job) == "done"
        weights, borders = await results(others[1], job)
        assert abs(weights - 3.0).max() < 1.0
        assert borders[-1]["step"] == STEPS // EVERY
        assert {one["peers"] for one in borders} <= {3, 4}


async def test_after_the_whole_swarm_was_off_the_course_goes_on_from_its_checkpoint(swarm, autojump_clock):
    async with swarm(kind) as s:
        nodes = await s.grow(3)
        job = (await nodes[0].jobs.submit(spec_of(steps=200), DATA)).id
        await s.until(lambda: any(node.view(job).step >= 12 for node in nodes), 600)
        for node in nodes:
            node.kill()
        await trio.sleep(5)
        for node in nodes:
            await node.restart()
        assert await ended(s, nodes[0], job) == "done"
        _, borders = await results(nodes[0], job)
        assert borders[0]["step"] > 3, "it did not begin anew"
        assert borders[-1]["step"] == 40


async def test_what_cannot_be_trained_fails_with_the_reason(swarm, autojump_clock):
    async with swarm(kind) as s:
        nodes = await s.grow(3)
        job = (await nodes[0].jobs.submit(spec_of(settings={"fails": True}), DATA)).id
        assert await ended(s, nodes[1], job) == "failed"
        assert "cannot be trained on" in nodes[1].view(job).text


async def refusals(node, job, why: str) -> list[str]:
    """What peers said about taking no part."""
    said = [line.text async for line in node.jobs.lines(job, follow=True)]
    return [line for line in said if line.startswith("takes no part") and why in line]


async def test_code_and_data_are_the_owners_to_give_and_who_may_take_no_part_lets_another_coordinate(
    swarm, autojump_clock, tmp_path
):
    (tmp_path / "notes").write_text("3.0\n")
    offers = {"notes": tmp_path / "notes"}
    owners = {"n3": Owner(offers), "n4": Owner({}, [])}

    def owned(services, node):
        trusting = Owner(offers, [node.swarm.nodes[0].peer])
        return kind(services, node, owners.get(node.mesh.name, trusting))

    async with swarm(owned) as s:
        nodes = await s.grow(5)
        spec = spec_of(code="app.py", offered="notes", data=None)
        job = (await nodes[0].jobs.submit(spec, {"code": b"raise SystemExit"})).id
        await s.until(lambda: any(node.view(job).step >= 2 for node in nodes), 300)
        coordinator = s.coordinator(job)
        assert coordinator in nodes[:3]
        coordinator.kill()
        left = next(node for node in nodes if node is not coordinator)
        assert await ended(s, left, job) == "done"
        assert left.view(job).metrics["peers"] == 2.0
        assert len(await refusals(left, job, "whom this node's owner does not trust")) == 2
        plain = spec_of(offered="notes", data=None, steps=10)
        job = (await left.jobs.submit(plain, {})).id
        assert await ended(s, left, job) == "done"
        assert len(await refusals(left, job, "offers no data named 'notes'")) == 1


async def test_a_trainer_that_dies_costs_what_its_node_did_and_not_the_job(swarm, autojump_clock):
    async with swarm(kind) as s:
        nodes = await s.grow(3)
        job = (await nodes[0].jobs.submit(spec_of(steps=200), DATA)).id
        await s.until(lambda: any(node.view(job).step >= 3 for node in nodes))
        first = s.coordinator(job)
        first.trainer.break_down("killed: out of memory")
        assert await ended(s, nodes[0], job) == "done"
        assert nodes[0].view(job).coordinator != first.peer
        assert len(await refusals(nodes[0], job, "out of memory")) == 1
        weights, borders = await results(nodes[0], job)
        assert borders[-1]["step"] == 200 // EVERY
        assert borders[-1]["peers"] == 3, "it is in again"
        assert abs(weights - 3.0).max() < 0.1


async def test_a_later_job_goes_on_from_a_checkpoint_on_another_number_of_peers(swarm, autojump_clock):
    async with swarm(kind) as s:
        nodes = await s.grow(3)
        job = (await nodes[0].jobs.submit(spec_of(), DATA)).id
        assert await ended(s, nodes[0], job) == "done"
        checkpoint = await nodes[0].result(job, "checkpoint.safetensors")
        before, borders = await results(nodes[0], job)
        await s.grow(2)
        for nodes_then, peers in ((s.nodes, 5), (s.nodes[:2], 2)):
            for node in s.nodes[len(nodes_then) :]:
                node.kill()
            await s.until(lambda count=peers: len(nodes[0].mesh.peers) == count - 1)
            spec = spec_of(model="checkpoint.safetensors", peers=peers)
            again = (await nodes[0].jobs.submit(spec, {**DATA, "model": checkpoint})).id
            assert await ended(s, nodes[0], again) == "done"
            after, more = await results(nodes[0], again)
            assert [more[0]["step"], more[-1]["step"], more[-1]["peers"]] == [1, STEPS // EVERY, peers]
            assert more[0]["loss"] <= abs(before - 3.0).mean() < 0.2 * borders[0]["loss"]
            assert abs(after - 3.0).max() < abs(before - 3.0).max()


@pytest.mark.parametrize("more", [{"data": None}, {"offered": "notes"}])
async def test_data_is_named_one_way(swarm, autojump_clock, more):
    async with swarm(kind) as s:
        (node,) = await s.grow(1)
        files = {} if "data" in more else DATA
        keys = {key: value for key, value in more.items() if value is not None}
        spec = spec_of(**keys)
        if "data" in more:
            spec = read_spec({"kind": "train", "app": "classifier"})
        with pytest.raises(JobInvalid, match="one of data"):
            await node.jobs.submit(spec, files)


def one_late(borders: int) -> float:
    """DiLoCo with overlap written out, for peers that all go the same way: each sum comes one border late,
    and meanwhile half of the own way is gone ahead."""
    weight = start = 10.0
    momentum, late = 0.0, None
    for _ in range(borders + 1):
        way = (start - 3.0) * (1 - 0.95**EVERY)
        if late is not None:
            momentum = 0.9 * momentum + late
            weight -= 0.7 * (late + 0.9 * momentum)
        start, late = weight - 0.5 * way, way
    return weight


async def test_a_job_overlaps_sums_with_steps_and_takes_all_of_them_once(swarm, autojump_clock):
    asked: dict[str, list[tuple[int, int, int]]] = {}

    def watched(services, node):
        def cost(ask) -> float:
            steps, done = int(ask.settings["steps"]), int(ask.settings["done"])
            asked.setdefault(node.mesh.name, []).append((done, steps, ask.seed))
            return 1.0

        return kind(services, node, cost=cost)

    async with swarm(watched) as s:
        nodes = await s.grow(3)
        job = (await nodes[0].jobs.submit(spec_of(overlap=True, peers=3), DATA)).id
        assert await ended(s, nodes[1], job) == "done"
        weights, borders = await results(nodes[1], job)
        assert [one["step"] for one in borders] == list(range(1, STEPS // EVERY + 1))
        assert {one["peers"] for one in borders} == {3}
        np.testing.assert_allclose(weights, one_late(STEPS // EVERY), rtol=0.02)
    seeds = [seed for pieces in asked.values() for _, _, seed in pieces]
    assert len(set(seeds)) == len(seeds), "everybody draws batches of its own, other ones each time"
    for pieces in asked.values():
        assert [done for done, _, _ in pieces] == list(range(STEPS))


@pytest.mark.parametrize("overlap", [False, True])
async def test_an_overlapping_job_outlives_its_coordinator_and_the_whole_swarms_end(
    swarm, autojump_clock, overlap
):
    async with swarm(kind) as s:
        nodes = await s.grow(4)
        job = (await nodes[0].jobs.submit(spec_of(steps=300, overlap=overlap), DATA)).id
        await s.until(lambda: any(node.view(job).step >= 3 for node in nodes))
        first = s.coordinator(job)
        first.kill()
        others = [node for node in nodes if node is not first]
        await s.until(lambda: any(node.view(job).step >= 15 for node in others), 600)
        for node in others:
            node.kill()
        await trio.sleep(5)
        for node in nodes:
            await node.restart()
        assert await ended(s, nodes[0], job) == "done"
        weights, borders = await results(nodes[0], job)
        assert 3 < borders[0]["step"] <= 16, "it went on from a checkpoint"
        assert borders[-1] == {**borders[-1], "step": 60, "peers": 4}
        assert abs(weights - 3.0).max() < (1.5 if overlap else 0.1)  # a late sum swings for longer


@pytest.mark.parametrize("quorum", ["majority", "any"])
async def test_a_job_says_whether_a_minority_may_go_on(swarm, autojump_clock, quorum):
    """Two of the three that train die at once; others keep the job, and do not train."""
    async with swarm(kind) as s:
        nodes = await s.grow(3)
        idle = await s.grow(4, works=False)
        job = (await nodes[0].jobs.submit(spec_of(peers=1, quorum=quorum, steps=200), DATA)).id
        await s.until(lambda: idle[0].view(job).step >= 4 and s.coordinator(job) in nodes, 300)
        last = s.coordinator(job)
        for node in nodes:
            if node is not last:
                node.kill()
        stood = last.view(job).step
        await trio.sleep(15)
        if quorum == "majority":
            await trio.sleep(60)
            assert last.view(job).step <= stood + 1
            assert not last.view(job).is_ended
            return
        assert last.view(job).step > stood + 1
        for node in nodes:
            if node is not last:
                await node.restart()
        assert await ended(s, idle[0], job) == "done"
        weights, borders = await results(idle[0], job)
        assert abs(weights - 3.0).max() < 0.1
        peers = [one["peers"] for one in borders]
        assert peers[0] == 3
        assert 1 in peers
        assert peers[-1] == 3, "they are in again"


async def test_who_takes_over_after_the_last_border_gets_the_end_from_the_others(swarm, autojump_clock):
    """Of those who were there nobody gets the results written, but one that dies and comes anew."""
    is_late = []

    class Clumsy(TrainRunner):
        async def _finish(self, course, context) -> None:
            if not self.came_late:
                await trio.sleep(2)
                raise Refused("the disk is full", reason="disk")
            await super()._finish(course, context)

    def clumsy(services, node):
        runner = kind(services, node)
        runner.__class__ = Clumsy
        runner.came_late = bool(is_late)
        node.runner = runner
        return runner

    async with swarm(clumsy) as s:
        nodes = await s.grow(3)
        job = (await nodes[0].jobs.submit(spec_of(), DATA)).id
        await s.until(lambda: nodes[0].view(job).step == STEPS // EVERY, 300)
        await trio.sleep(1)
        first = s.coordinator(job)
        (end, *_) = [node.runner._courses[job].border.weights.copy() for node in nodes if node is not first]
        first.kill()
        is_late.append(True)
        await first.restart()
        assert await ended(s, first, job) == "done"
        assert first.view(job).coordinator == first.peer
        weights, _ = await results(first, job)
        assert np.array_equal(weights, end)
