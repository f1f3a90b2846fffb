"""How many threads a decode step gets."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from mycel.compute.model.threads import PAUSE_MAX, PAUSE_MIN, TRY_STEPS, ThreadChoice, levels

IDLE = {4: 1.0, 2: 1.5, 1: 2.5}
BUSY = {4: 6.0, 2: 3.0, 1: 2.6}


def run(choice: ThreadChoice, steps: int, cost: Callable[[int], float]) -> list[int]:
    """The threads of `steps` steps that take what `cost` says."""
    used = []
    for _ in range(steps):
        used.append(choice.threads())
        choice.note(cost(used[-1]))
    return used


def test_levels_halve_down_to_one() -> None:
    assert levels(12) == (12, 6, 3, 1)
    assert levels(1) == (1,)
    assert levels(0) == (1,)


def test_an_idle_machine_keeps_all_threads_and_tries_ever_more_rarely() -> None:
    used = run(ThreadChoice(4), 3000, IDLE.__getitem__)
    tries = [step for step, threads in enumerate(used) if threads != 4]
    assert len(used) - len(tries) > 0.97 * len(used)
    assert tries[0] == PAUSE_MIN
    assert tries[:TRY_STEPS] == list(range(PAUSE_MIN, PAUSE_MIN + TRY_STEPS))
    assert max(later - earlier for earlier, later in pairwise(tries)) <= PAUSE_MAX + 1


def test_where_others_want_the_cores_fewer_threads_are_taken() -> None:
    choice = ThreadChoice(4)
    run(choice, 500, IDLE.__getitem__)
    used = run(choice, 200, BUSY.__getitem__)
    assert used[-100:].count(1) > 80
    assert used.index(1) < 60


def test_when_the_others_are_gone_all_threads_come_back() -> None:
    choice = ThreadChoice(4)
    run(choice, 500, BUSY.__getitem__)
    used = run(choice, 4 * PAUSE_MAX, IDLE.__getitem__)
    assert used[-50:].count(4) > 40


def test_one_slow_step_of_a_try_decides_nothing() -> None:
    def cost(threads: int) -> float:
        return 1.0 if threads == 2 else 0.1 if next(luck) == 0 else 2.0

    luck = iter([0, 1, 1] * 1000)
    assert run(ThreadChoice(2), 100, cost)[-1] == 2


def test_a_single_thread_has_no_choice() -> None:
    assert set(run(ThreadChoice(1), 100, lambda threads: 1.0)) == {1}
