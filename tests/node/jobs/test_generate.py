"""A file of prompts in, a file of completions out: whoever dies, no prompt is lost, doubled, or done anew."""

from __future__ import annotations

import json

import trio


async def finished(s, node, job):
    await s.until(lambda: node.view(job).is_ended)
    view = node.view(job)
    assert view.phase == "done", view.text
    return [json.loads(line) for line in (await node.result(job, "completions.jsonl")).splitlines()]


async def test_a_file_of_prompts_becomes_a_file_of_completions_in_order(
    swarm, autojump_clock, byte_model, prompts, generate_spec
):
    async with swarm() as s:
        nodes = await s.grow(2, byte_model) + await s.grow(1)
        job = (await nodes[2].jobs.submit(generate_spec, {"prompts": prompts})).id
        lines = await finished(s, nodes[0], job)
        assert [line["id"] for line in lines] == [f"p{number}" for number in range(40)]
        assert [line["index"] for line in lines] == list(range(40))
        assert all(0 < line["tokens"] <= 12 and "error" not in line for line in lines)
        print(trio.current_time(), nodes[0].view(job), [n.asked for n in nodes])
        async for line in nodes[1].jobs.lines(job): print(line)
