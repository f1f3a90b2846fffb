"""The parts that calls are made of, each by itself: deadlines, workers, backlog, budget, the local stream."""

from __future__ import annotations

import contextvars

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from mycel.protocol.alarm import Alarm
from mycel.protocol.deadlines import SPARE, Deadlines, remaining_ms
from mycel.protocol.errors import StreamClosed, StreamReset
from mycel.protocol.frame import NO_DEADLINE
from mycel.protocol.loop import WINDOW, loop_pair
from mycel.protocol.mesh import PeerId
from mycel.protocol.outlet import Budget, Outlet
from mycel.protocol.workers import IDLE_MAX, Workers

ME = PeerId("me")


class Sleeper:
    """A waiter that notes when it was woken."""

    def __init__(self) -> None:
        self.is_settled = False
        self.woken_at: float | None = None

    def expire(self) -> None:
        self.woken_at = trio.current_time()


@given(st.lists(st.tuples(st.sampled_from(["add", "settle", "due"]), st.integers(0, 50)), max_size=300))
def test_deadlines_are_those_of_a_plain_list(steps):
    deadlines = Deadlines()
    waiting: list[tuple[float, int, Sleeper]] = []
    now = 0.0
    for number, (step, amount) in enumerate(steps):
        if step == "add":
            waiting.append((now + amount, number, Sleeper()))
            deadlines.add(*waiting[-1])
        elif step == "settle" and waiting:
            entry = waiting.pop(amount % len(waiting))
            deadlines.settle(entry[2])
            deadlines.settle(entry[2])
        elif step == "due":
            now += amount / 5
            ready = sorted(entry for entry in waiting if entry[0] <= now)
            assert deadlines.due(now) == [entry[2] for entry in ready]
            waiting = [entry for entry in waiting if entry[0] > now]
        if waiting:
            assert deadlines.next_at <= min(waiting)[0]
        assert len(deadlines) <= SPARE + 4 * len(waiting) + len(steps) // 2


def test_settled_deadlines_do_not_pile_up():
    deadlines = Deadlines()
    for number in range(10_000):
        sleeper = Sleeper()
        deadlines.add(60.0 + number, number, sleeper)
        deadlines.settle(sleeper)
    assert len(deadlines) <= SPARE


async def test_the_alarm_rings_in_time_whatever_the_order_of_setting(autojump_clock):
    alarm = Alarm()
    sleepers = [Sleeper() for _ in range(6)]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(alarm.run)
        await trio.testing.wait_all_tasks_blocked()
        began = trio.current_time()
        for number, seconds in enumerate([5.0, 1.0, 3.0, 9.0, 2.0, 4.0]):
            alarm.set(began + seconds, number, sleepers[number])
        alarm.clear(sleepers[2])
        await trio.sleep(7.0)
        nursery.cancel_scope.cancel()
    woken = [None if each.woken_at is None else each.woken_at - began for each in sleepers]
    assert woken == [
        pytest.approx(5.0),
        pytest.approx(1.0),
        None,
        None,
        pytest.approx(2.0),
        pytest.approx(4.0),
    ]


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(1.0, 1000), (0.0101, 11), (-3.0, 1), (1e9, NO_DEADLINE - 1), (float("inf"), NO_DEADLINE)],
)
async def test_remaining_time_is_rounded_up_and_in_bounds(autojump_clock, seconds, said):
    assert remaining_ms(trio.current_time() + seconds) == said


COLOUR = contextvars.ContextVar("colour", default="none")


class Job:
    """Paints its context, waits, and notes what became of it."""

    def __init__(self, seconds: float, deadline: float = float("inf")) -> None:
        self.seconds = seconds
        self.deadline = deadline
        self.task: trio.lowlevel.Task | None = None
        self.colour_before = ""
        self.was_cancelled = False
        self.is_done = False

    async def run(self) -> None:
        self.task = trio.lowlevel.current_task()
        self.colour_before = COLOUR.get()
        COLOUR.set("red")
        await trio.sleep(self.seconds)
        self.is_done = True

    def on_cancelled(self) -> None:
        self.was_cancelled = True


async def test_workers_are_used_again_without_a_trace_of_the_last_job(autojump_clock):
    async with trio.open_nursery() as nursery:
        workers = Workers(nursery.start_soon)
        jobs = [Job(1.0) for _ in range(5)]
        for job in jobs:
            workers.start(job)
            await trio.sleep(2.0)
        assert all(job.is_done for job in jobs)
        assert len({id(job.task) for job in jobs}) == 1
        assert {job.colour_before for job in jobs} == {"none"}
        nursery.cancel_scope.cancel()


async def test_a_job_ends_at_its_deadline_and_the_next_is_not_hurt(autojump_clock):
    async with trio.open_nursery() as nursery:
        workers = Workers(nursery.start_soon)
        short = Job(1.0, trio.current_time() + 3.0)
        workers.start(short)
        await trio.sleep(5.0)  # its deadline passes while the worker is idle
        after = Job(1.0, trio.current_time() + 3.0)
        workers.start(after)
        await trio.sleep(2.0)
        late = Job(9.0, trio.current_time() + 3.0)
        worker = workers.start(late)
        await trio.sleep(4.0)
        worker.cancel(late)  # over: nothing happens
        given_up = Job(9.0)
        worker = workers.start(given_up)
        await trio.testing.wait_all_tasks_blocked()
        worker.cancel(given_up)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert [job.is_done for job in (short, after, late, given_up)] == [True, True, False, False]
    assert [job.was_cancelled for job in (short, after, late, given_up)] == [False, False, True, True]


async def test_a_burst_leaves_a_bounded_number_of_workers(autojump_clock):
    async with trio.open_nursery() as nursery:
        workers = Workers(nursery.start_soon)
        for _ in range(3 * IDLE_MAX):
            workers.start(Job(1.0))
        await trio.sleep(2.0)
        assert len(nursery.child_tasks) == IDLE_MAX
        nursery.cancel_scope.cancel()


@given(st.lists(st.integers(1, 12), min_size=1, max_size=30))
def test_a_budget_is_never_overdrawn_and_serves_in_order(wants):
    order: list[int] = []
    held = most = 0

    async def main() -> None:
        nonlocal held, most
        budget = Budget(10)

        async def take(index: int, count: int) -> None:
            nonlocal held, most
            await budget.take(count)
            order.append(index)
            held += min(count, 10)
            most = max(most, held)
            await trio.lowlevel.checkpoint()
            held -= min(count, 10)
            budget.give(count)

        async with trio.open_nursery() as nursery:
            for index, count in enumerate(wants):
                nursery.start_soon(take, index, count)
                await trio.testing.wait_all_tasks_blocked()
        assert budget.is_idle

    trio.run(main)
    assert most <= 10
    assert order == sorted(order)


async def test_who_gives_up_waiting_frees_the_place_in_the_queue():
    budget = Budget(10)
    await budget.take(8)
    got: list[int] = []

    async def take(count: int) -> None:
        await budget.take(count)
        got.append(count)

    async with trio.open_nursery() as nursery:
        with trio.CancelScope() as gives_up:
            async with trio.open_nursery() as impatient:
                impatient.start_soon(take, 9)
                await trio.testing.wait_all_tasks_blocked()
                nursery.start_soon(take, 2)
                await trio.testing.wait_all_tasks_blocked()
                assert got == []
                gives_up.cancel()
    assert got == [2]


async def test_an_outlet_keeps_order_and_holds_up_those_who_can_wait():
    near, far = loop_pair(ME, "/test/1")
    async with trio.open_nursery() as nursery:
        outlet = Outlet(near, nursery.start_soon, backlog_max=1000)
        sent = [bytes([index % 256]) * 60_000 for index in range(30)]
        for piece in sent:  # more than the window
            outlet.put(piece)
        assert outlet.is_full
        waits = trio.Event()

        async def wait() -> None:
            await outlet.wait_room()
            waits.set()

        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        assert not waits.is_set()
        got = await far.receive_exactly(30 * 60_000)
        assert got == b"".join(sent)
        await waits.wait()
        outlet.put(b"after")
        assert await far.receive_exactly(5) == b"after"


async def test_an_outlet_on_a_lost_stream_lets_everybody_go():
    near, far = loop_pair(ME, "/test/1")
    async with trio.open_nursery() as nursery:
        outlet = Outlet(near, nursery.start_soon, backlog_max=1000)
        for _ in range(30):
            outlet.put(bytes(60_000))
        nursery.start_soon(outlet.wait_room)
        await trio.testing.wait_all_tasks_blocked()
        far.reset()
    outlet.put(b"into the void: whoever receives on the stream has been told")
    assert not outlet.is_full


async def test_the_local_stream_is_a_stream():
    near, far = loop_pair(ME, "/test/1")
    assert near.try_send(bytes(WINDOW))
    assert not near.try_send(b"x")
    assert await far.receive_some(10) == bytes(10)
    assert near.try_send(b"x")
    assert len(await far.receive_exactly(WINDOW - 9)) == WINDOW - 9
    await near.send_eof()
    assert await far.receive_some() == b""
    with pytest.raises(StreamClosed):
        await near.send(b"x")
    heard: list[object] = []
    near.deliver_to(lambda data, error: heard.append(bytes(data) if data is not None else error))
    await far.send(b"yes", end=True)
    assert heard == [b"yes", None]


async def test_resetting_the_local_stream_wakes_both_sides():
    near, far = loop_pair(ME, "/test/1")
    async with trio.open_nursery() as nursery:

        async def blocked_sender() -> None:
            with pytest.raises(StreamReset):
                await near.send(bytes(2 * WINDOW))

        async def blocked_reader() -> None:
            with pytest.raises(StreamReset):
                await near.receive_some()

        nursery.start_soon(blocked_sender)
        nursery.start_soon(blocked_reader)
        await trio.testing.wait_all_tasks_blocked()
        far.reset()
