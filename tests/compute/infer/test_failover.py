"""Stages die in mid-sentence and the text goes on: the same tokens, with what work and what wait."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import trio

from mycel.compute.engine import Sampling
from mycel.compute.infer.pace import Timing
from mycel.compute.infer.request import GenerateRequest

PROMPT = tuple(b"class A:")
COUNT = 40


def request_of(**changes: Any) -> GenerateRequest:
    asked = {"model": "tiny-llama", "prompt": PROMPT, "max_tokens": COUNT, "stop_tokens": ()} | changes
    return GenerateRequest(**asked)


async def run_with(
    owner: Any, request: GenerateRequest, at: int, act: Callable[[], Any]
) -> tuple[list[int], Any]:
    """All tokens, and the report; `act` is called once when `at` tokens are there."""
    tokens: list[int] = []
    async with owner.generator.generate(request) as generation:
        async for piece in generation:
            before = len(tokens)
            tokens += [token.id for token in piece.tokens]
            if before < at <= len(tokens):
                act()
    return tokens, generation.report


@pytest.mark.parametrize("how", ["kill", "silence"])
@pytest.mark.parametrize("which", [1, 2, 3])
async def test_any_one_stage_may_die(
    autojump_clock: Any, swarm: Any, llama: Any, reference: Any, which: int, how: str
) -> None:
    expected = reference(llama, PROMPT, COUNT)
    async with swarm() as s:
        nodes = await s.stages(llama, [0, 1, 3, 4], spares=1)
        owner, dying, spare = nodes[0], nodes[which], nodes[4]
        rows_then: list[int] = []

        def strike() -> None:
            rows_then.extend(node.rows for node in nodes)
            getattr(dying, how)()

        tokens, report = await run_with(owner, request_of(), 12, strike)
        assert tokens == expected
        [failover] = report.failovers
        assert failover.lost == (dying.peer,)
        assert failover.replay == "exact"
        assert failover.stall_s < (1.0 if how == "kill" else 3.0)
        assert [stage.peer for stage in report.route] == [
            spare.peer if node is dying else node.peer for node in nodes[1:4]
        ]
        # Every row once at each survivor, however far the sentence had come; at the spare too.
        for node in nodes[1:4]:
            if node is not dying:
                assert node.rows == len(PROMPT) + COUNT - 1
        assert spare.rows == len(PROMPT) + COUNT - 1


async def test_survivors_compute_nothing_while_the_replacement_catches_up(
    autojump_clock: Any, swarm: Any, llama: Any
) -> None:
    async with swarm() as s:
        owner, first, middle, last, spare = await s.stages(llama, [0, 1, 3, 4], spares=1)
        tokens, report = await run_with(owner, request_of(), 20, middle.kill)
        session = report.session
        assert len(tokens) == COUNT
        counters = {node: node.stages.counters(session) for node in (first, last, spare)}
        assert counters[first].rows_computed == counters[last].rows_computed == len(PROMPT) + COUNT - 1
        assert counters[first].rows_resent >= len(PROMPT) + 19  # from its log, to the replacement
        assert counters[spare].rows_computed == len(PROMPT) + COUNT - 1
        assert counters[last].rows_duplicate <= 1  # the replacement sends on only what the last lacks
        assert report.failovers[0].replayed_rows >= len(PROMPT) + 20


@pytest.mark.parametrize("how", ["kill", "silence"])
async def test_two_adjacent_stages_may_die(
    autojump_clock: Any, swarm: Any, llama: Any, reference: Any, how: str
) -> None:
    async with swarm() as s:
        owner, _, second, third, spare = await s.stages(llama, [0, 1, 3, 4], spares=1)

        def strike() -> None:
            getattr(second, how)()
            getattr(third, how)()

        tokens, report = await run_with(owner, request_of(), 9, strike)
        assert tokens == reference(llama, PROMPT, COUNT)
        assert [(stage.peer, stage.span.start, stage.span.end) for stage in report.route][1:] == [
            (spare.peer, 1, 4)
        ]


async def test_first_and_last_may_die_together(
    autojump_clock: Any, swarm: Any, llama: Any, reference: Any
) -> None:
    async with swarm() as s:
        owner, first, _, last, _, _ = await s.stages(llama, [0, 1, 3, 4], spares=2)

        def strike() -> None:
            first.kill()
            last.kill()

        tokens, _ = await run_with(owner, request_of(), 17, strike)
        assert tokens == reference(llama, PROMPT, COUNT)


async def test_the_owners_own_stage_may_die(
    autojump_clock: Any, swarm: Any, llama: Any, reference: Any
) -> None:
    """Its worker crashes: the engine is lost, not the daemon."""
    async with swarm() as s:
        owner, *_ = await s.stages(llama, [1, 3, 4], spares=0)
        await owner.serve(llama, 0, 1)
        spare = await s.add()
        await spare.serve(llama, 0, 2, standby=True)
        await s.see(owner, 4)
        tokens, report = await run_with(
            owner, request_of(), 15, lambda: owner.engines[-1].break_down("out of memory")
        )
        assert tokens == reference(llama, PROMPT, COUNT)
        assert report.failovers[0].lost == (owner.peer,)
        assert "out of memory" in report.failovers[0].why
        assert report.route[0].peer == spare.peer


async def test_a_lost_engine_serves_again(
    autojump_clock: Any, swarm: Any, llama: Any, reference: Any
) -> None:
    """With nobody to take over, the session waits for the worker to be back, and replays to it."""
    async with swarm() as s:
        owner, _, middle, _ = await s.stages(llama, [0, 1, 3, 4])
        tokens, report = await run_with(
            owner, request_of(), 15, lambda: middle.engines[-1].break_down("crashed")
        )
        assert tokens == reference(llama, PROMPT, COUNT)
        assert len(middle.engines) == 2
        assert report.failovers[0].stall_s < 1.0


async def test_a_sampled_session_survives_with_the_same_tokens(
    autojump_clock: Any, swarm: Any, llama: Any
) -> None:
    sampling = Sampling(temperature=1.0, top_k=40, top_p=0.95, repetition_penalty=1.3, seed=11, logprobs=2)
    request = request_of(sampling=sampling)
    async with swarm() as s:
        owner, *stages = await s.stages(llama, [0, 1, 3, 4], spares=1)
        undisturbed, _ = await run_with(owner, request, -1, lambda: None)
        assert len(set(undisturbed)) > 10
        tokens, report = await run_with(owner, request, 13, stages[2].kill)
        assert tokens == undisturbed
        assert len(report.failovers) == 1


@pytest.mark.parametrize("which", [1, 2, 3])
async def test_a_chunked_replay_says_so(autojump_clock: Any, swarm: Any, llama: Any, which: int) -> None:
    async with swarm() as s:
        nodes = await s.stages(llama, [0, 1, 3, 4], spares=1)
        tokens, report = await run_with(nodes[0], request_of(replay="chunked"), 30, nodes[which].kill)
        assert len(tokens) == COUNT
        assert report.failovers[0].replay == "chunked"
        assert report.gap_min > 0
        counters = nodes[4].stages.counters(report.session)
        assert counters.rows_computed == len(PROMPT) + COUNT - 1
        assert counters.steps <= 1 + 3 + (COUNT - 30)  # the prompt, few chunks, and the rest in single steps


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
async def test_twenty_of_twenty_finish_with_the_same_text(
    autojump_clock: Any, swarm: Any, llama: Any, reference: Any, seed: int
) -> None:
    rng = random.Random(seed)
    at, which, how = rng.randrange(1, COUNT), rng.randrange(1, 4), rng.choice(["kill", "silence"])
    async with swarm(seed=seed, latency_s=rng.choice([0.0005, 0.01, 0.05])) as s:
        nodes = await s.stages(llama, [0, 1, 3, 4], spares=1)
        tokens, report = await run_with(nodes[0], request_of(), at, getattr(nodes[which], how))
        assert tokens == reference(llama, PROMPT, COUNT)
        assert report.failovers[0].stall_s < 3.0


async def test_a_slow_stage_is_left_to_its_work(
    autojump_clock: Any, swarm: Any, llama: Any, reference: Any
) -> None:
    async with swarm() as s:
        owner, _, middle, _, spare = await s.stages(llama, [0, 1, 3, 4], spares=1)
        steps = 0

        def cost(works: Any) -> float:
            nonlocal steps
            steps += 1
            return 8.0 if steps in (10, 25) else 0.01

        middle.cost = cost
        tokens, report = await run_with(owner, request_of(), -1, lambda: None)
        assert tokens == reference(llama, PROMPT, COUNT)
        assert report.failovers == ()
        assert report.longest_gap_s > 8.0
        assert spare.rows == 0


async def test_a_silent_death_early_in_a_session_is_noticed_by_its_pace(
    autojump_clock: Any, swarm: Any, llama: Any, reference: Any
) -> None:
    """Before the pace is known the deadline is the longest there is; then it must come nearer."""
    async with swarm() as s:
        owner, _, middle, _, _ = await s.stages(llama, [0, 1, 3, 4], spares=1)
        tokens, report = await run_with(owner, request_of(), 5, middle.silence)
        assert tokens == reference(llama, PROMPT, COUNT)
        [failover] = report.failovers
        timing = Timing()
        assert failover.stall_s < 2 * timing.step_floor_s + timing.probe_s + 0.2 < timing.step_cap_s + 0.2


async def test_a_hung_stage_is_replaced_in_the_end(
    autojump_clock: Any, swarm: Any, llama: Any, reference: Any
) -> None:
    async with swarm() as s:
        timing = Timing(stuck_s=20.0)
        owner, _, middle, _, _ = await s.stages(llama, [0, 1, 3, 4], spares=1, timing=timing)
        middle.cost = lambda works: 1000.0 if works[0].position == 20 else 0.01
        tokens, report = await run_with(owner, request_of(), -1, lambda: None)
        assert tokens == reference(llama, PROMPT, COUNT)
        assert report.failovers[0].lost == (middle.peer,)
        assert 20 < report.failovers[0].stall_s < 25


async def test_an_owner_that_stood_still_replaces_nobody(
    autojump_clock: Any, swarm: Any, llama: Any, reference: Any
) -> None:
    """Nobody answered it for a moment: that all of them died at once is the less likely explanation."""
    async with swarm() as s, trio.open_nursery() as nursery:
        owner, *_ = await s.stages(llama, [0, 1, 3, 4], spares=1)

        async def stand_still() -> None:
            s.world.silence(owner.mesh)
            await trio.sleep(0.8)
            s.world.unsilence(owner.mesh)

        tokens, report = await run_with(owner, request_of(), 14, lambda: nursery.start_soon(stand_still))
        assert tokens == reference(llama, PROMPT, COUNT)
        assert report.failovers == ()
        assert 0.75 < report.longest_gap_s < 1.5


@pytest.mark.parametrize("pair", [(0, 1), (1, 2), (2, 3), (3, 1), (3, 0)])
async def test_a_broken_link_between_living_peers_resumes_the_same_route(
    autojump_clock: Any, swarm: Any, llama: Any, reference: Any, pair: tuple[int, int]
) -> None:
    async with swarm() as s:
        nodes = await s.stages(llama, [0, 1, 3, 4], spares=1)
        one, other = (nodes[n] for n in pair)
        tokens, report = await run_with(
            nodes[0], request_of(), 14, lambda: one.mesh.disconnect(other.peer, "cable")
        )
        assert tokens == reference(llama, PROMPT, COUNT)
        assert all(failover.lost == () for failover in report.failovers)
        assert [stage.peer for stage in report.route] == [node.peer for node in nodes[1:4]]
        assert nodes[4].rows == 0
        assert [node.rows for node in nodes[1:4]] == [len(PROMPT) + COUNT - 1] * 3  # nothing twice


async def test_the_replacement_may_die_while_it_catches_up(
    autojump_clock: Any, swarm: Any, llama: Any, reference: Any
) -> None:
    async with swarm() as s:
        owner, _, middle, _, one, two = await s.stages(llama, [0, 1, 3, 4], spares=2)
        spares = [one, two]
        dead: list[Any] = []

        def cost_of(node: Any) -> Callable[[Any], float]:
            def cost(works: Any) -> float:
                if not dead and works[0].position > 10:
                    dead.append(node)
                    node.kill()
                return 0.01

            return cost

        for spare in spares:
            spare.cost = cost_of(spare)
        tokens, report = await run_with(owner, request_of(), 20, middle.kill)
        assert tokens == reference(llama, PROMPT, COUNT)
        assert len(dead) == 1
        assert len(report.failovers) == 2


@pytest.mark.parametrize("delay", [0.0, 0.0005, 0.002, 0.01, 0.05, 0.3, 0.6, 1.1])
async def test_a_second_stage_dies_during_recovery(
    autojump_clock: Any, swarm: Any, llama: Any, reference: Any, delay: float
) -> None:
    async with swarm() as s, trio.open_nursery() as nursery:
        owner, first, middle, *_ = await s.stages(llama, [0, 1, 3, 4], spares=2)

        async def later() -> None:
            await trio.sleep(delay)
            first.kill()

        def strike() -> None:
            middle.silence()
            nursery.start_soon(later)

        tokens, _ = await run_with(owner, request_of(), 20, strike)
        assert tokens == reference(llama, PROMPT, COUNT)


async def test_a_leaving_stage_hands_over_without_a_wait(
    autojump_clock: Any, swarm: Any, llama: Any, reference: Any
) -> None:
    async with swarm() as s, trio.open_nursery() as nursery:
        owner, _, middle, _, spare = await s.stages(llama, [0, 1, 3, 4], spares=1)
        tokens, report = await run_with(
            owner, request_of(), 20, lambda: nursery.start_soon(middle.stages.leave)
        )
        assert tokens == reference(llama, PROMPT, COUNT)
        [failover] = report.failovers
        assert failover.lost == (middle.peer,)
        assert failover.stall_s < 0.5
        assert middle.stages.stages == []
        assert spare.rows == len(PROMPT) + COUNT - 1


async def test_the_only_holder_that_leaves_is_used_while_it_lasts(
    autojump_clock: Any, swarm: Any, llama: Any, reference: Any
) -> None:
    async with swarm() as s, trio.open_nursery() as nursery:
        owner, _, middle, _ = await s.stages(llama, [0, 1, 3, 4])
        tokens, report = await run_with(
            owner, request_of(), 20, lambda: nursery.start_soon(middle.stages.leave, 60.0)
        )
        assert tokens == reference(llama, PROMPT, COUNT)
        assert report.failovers == ()
