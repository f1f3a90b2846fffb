"""A file of prompts in, a file of completions out: whoever dies, no prompt is lost, doubled, or done anew."""

from __future__ import annotations

import json

import msgspec
import pytest

from mycel.node.jobs.kinds import GenerateSpec
from mycel.node.jobs.prompts import Completion, Parts, Plan, read_prompts, write_completions
from mycel.node.jobs.spec import JobInvalid

COUNT = 24


async def submit(s, node, spec, prompts) -> str:
    return (await node.jobs.submit(spec, {"prompts": prompts})).id


async def result(s, node, job) -> bytes:
    """The completions, once the job is done, as `node` sees it."""
    await s.until(lambda: node.view(job).is_ended)
    assert node.view(job).phase == "done", node.view(job).text
    assert node.view(job).step == node.view(job).steps == COUNT
    return await node.result(job, "completions.jsonl")


async def kept(node, job) -> dict[int, None]:
    """Prompts whose completions are kept, as far as `node` knows."""
    state = node.jobs.book.get(job).state
    packed = state.inline if state.blob is None else await node.jobs._tools.blobs.whole(state.blob)
    found = {}
    for part in msgspec.msgpack.decode(packed, type=Parts).parts:
        for one in msgspec.msgpack.decode(await node.jobs._tools.blobs.whole(part), type=list[Completion]):
            found[one.index] = None
    return found


@pytest.fixture(scope="module")
def known() -> dict[str, bytes]:
    return {}


@pytest.fixture
def undisturbed(known, swarm, byte_model, prompts, generate_spec):
    """What the job comes to when nobody dies."""

    async def run() -> bytes:
        if "bytes" not in known:
            known["bytes"] = await run_once()
        return known["bytes"]

    async def run_once() -> bytes:
        async with swarm() as s:
            (node,) = await s.grow(1, byte_model)
            return await result(s, node, await submit(s, node, generate_spec, prompts))

    return run


async def test_a_file_of_prompts_becomes_a_file_of_completions_in_order_seen_from_any_peer(
    swarm, autojump_clock, byte_model, prompts, generate_spec, undisturbed
):
    async with swarm() as s:
        nodes = await s.grow(2, byte_model) + await s.grow(2)
        job = await submit(s, nodes[3], generate_spec, prompts)
        completions = await result(s, nodes[2], job)
        lines = [json.loads(line) for line in completions.splitlines()]
        assert [line["id"] for line in lines] == [f"p{number}" for number in range(COUNT)]
        assert [line["index"] for line in lines] == list(range(COUNT))
        assert all(0 < line["tokens"] <= 8 and "error" not in line for line in lines)
        assert sorted(number for node in nodes for number in node.asked) == list(range(COUNT))
        assert all(len(node.asked) > 2 for node in nodes), "every member took its share"
        said = [line async for line in nodes[1].jobs.lines(job, follow=True)]
        assert [line.text for line in said] == [
            "n0 coordinates, epoch 1",
            f"{COUNT} prompts done, 0 of them failed",
            "done",
        ]
        views = [node.view(job) for node in nodes]
        assert views.count(views[0]) == 4
        assert views[0].metrics["tokens"] == sum(line["tokens"] for line in lines)
    assert completions == await undisturbed()


async def test_another_takes_over_a_dead_coordinators_job_and_nothing_kept_is_done_anew(
    swarm, autojump_clock, byte_model, prompts, generate_spec, undisturbed
):
    async with swarm() as s:
        nodes = await s.grow(2, byte_model) + await s.grow(3)
        job = await submit(s, nodes[4], generate_spec, prompts)
        await s.until(lambda: nodes[4].view(job).step >= 8)
        first = s.coordinator(job)
        others = [node for node in nodes if node is not first]
        done = await kept(others[0], job)
        before = [len(node.asked) for node in others]
        assert first is nodes[0]
        first.kill()
        completions = await result(s, others[0], job)
        view = others[0].view(job)
        assert (view.epoch, view.coordinator != first.peer) == (2, True)
        again = [number for node, count in zip(others, before, strict=True) for number in node.asked[count:]]
        assert not [number for number in again if number in done]
        assert len(done) >= 8
    assert completions == await undisturbed()


async def test_a_job_goes_on_where_it_was_after_the_whole_swarm_was_off(
    swarm, autojump_clock, byte_model, prompts, generate_spec, undisturbed
):
    async with swarm() as s:
        nodes = await s.grow(3, byte_model)
        job = await submit(s, nodes[2], generate_spec, prompts)
        await s.until(lambda: nodes[2].view(job).step >= 8)
        done = await kept(s.coordinator(job), job)
        for node in nodes:
            node.kill()
            node.asked.clear()
        for node in nodes:
            await node.restart()
        completions = await result(s, nodes[0], job)
        again = [number for node in nodes for number in node.asked]
        assert not [number for number in again if number in done]
        assert len(done) >= 8
        assert nodes[0].view(job).epoch > 1
    assert completions == await undisturbed()


async def test_a_node_whose_owner_says_no_votes_and_coordinates_but_does_no_prompt(
    swarm, autojump_clock, byte_model, prompts, generate_spec
):
    async with swarm() as s:
        nodes = await s.grow(1, works=False) + await s.grow(2, byte_model)
        job = await submit(s, nodes[2], generate_spec, prompts)
        await result(s, nodes[1], job)
        assert nodes[1].view(job).coordinator == nodes[0].peer
        assert sorted([*nodes[1].asked, *nodes[2].asked]) == list(range(COUNT))


async def test_a_job_waits_for_somebody_to_serve_its_model_and_says_so(
    swarm, autojump_clock, byte_model, prompts, generate_spec
):
    async with swarm() as s:
        nodes = await s.grow(3)
        job = await submit(s, nodes[0], generate_spec, prompts)
        lines = nodes[1].jobs.lines(job, follow=True)
        while "no peer in reach serves" not in (line := (await lines.__anext__()).text).lower():
            assert "coordinates" in line
        await lines.aclose()
        await s.grow(1, byte_model)
        await result(s, nodes[2], job)


SPEC = GenerateSpec(model="m", prompts="p.jsonl")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b'"good"\n{"prompt": 3}', "line 2 is none"),
        (b'{"prompt": "a", "messages": []}', "line 1 is none"),
        (b'{"messages": [{"role": 1}]}', "line 1 is none"),
        (b'"good"\n\n{"prompt"', "line 3 is no JSON"),
        (b"\xff\xfe", "no UTF-8"),
        (b"\n \n", "no line with a prompt"),
        (b"[" * 100_000, "line 1 is no JSON"),
    ],
)
def test_a_line_that_is_no_prompt_is_named_before_anything_runs(content, why):
    with pytest.raises(JobInvalid, match=why):
        read_prompts(SPEC, content)


def test_prompts_are_texts_or_messages_and_what_else_stands_in_a_line_is_given_back():
    lines = [
        '"a"',
        "",
        '{"prompt": "b", "id": 7, "index": 99}',
        '{"messages": [{"role": "user", "content": "c"}]}',
    ]
    prompts = read_prompts(SPEC, "\n".join(lines).encode())
    assert [prompt.text for prompt in prompts] == ["a", "b", None]
    done = {number: Completion(number, "é", 1, "stop", "late" * number) for number in range(3)}
    written = [json.loads(line) for line in write_completions(prompts, done).decode().splitlines()]
    assert written[0] == {"index": 0, "prompt": "a", "completion": "é", "tokens": 1, "finish": "stop"}
    assert (written[1]["index"], written[1]["id"], written[1]["error"]) == (1, 7, "late")
    assert written[2]["messages"] == [{"role": "user", "content": "c"}]
    plain = read_prompts(GenerateSpec(model="m", prompts="p.txt"), b'one\n\n"two"\r\n')
    assert [prompt.text for prompt in plain] == ["one", '"two"']


def test_each_prompt_is_done_once_and_given_up_after_eight_peers_failed_at_it():
    plan = Plan(
        read_prompts(SPEC, b'"a"\n"b"\n"c"'), [Completion(1, "old", 1, "stop"), Completion(9, "", 0, "stop")]
    )
    first, second = plan.next(), plan.next()
    assert (first.index, second.index, plan.next()) == (0, 2, None)
    plan.finish(Completion(0, "x", 1, "stop"))
    plan.finish(Completion(0, "y", 1, "stop"))
    assert [one.text for one in plan.take_fresh()] == ["x"]
    for _ in range(20):
        plan.give_back(second, "nobody serves it", counts=False)
        assert plan.next() is second
    for _ in range(8):
        assert not plan.is_done
        plan.give_back(second, "it broke", counts=True)
        plan.next()
    assert plan.is_done
    assert (plan.done[2].finish, plan.done[2].error, plan.done[1].text) == ("failed", "it broke", "old")
