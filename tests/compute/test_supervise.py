"""A lost worker is started and loaded again, reported step by step, and not for ever."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from mycel.compute.engine import EngineLost, Sampling, Span, StageSpec, Work
from mycel.compute.inline import InlineEngine
from mycel.compute.process import WorkerOptions
from mycel.compute.supervise import (
    EngineEvent,
    Loading,
    Lost,
    Ready,
    RestartPolicy,
    Supervisor,
    plan_restart,
)
from mycel.compute.worker import WorkerEngine, start_worker

STEP = Work("s", Span(0, 4), 0, tokens=(1, 2, 3), sampling=Sampling())


class Diary:
    """Events as they come, and a way to wait for the next of a kind."""

    def __init__(self) -> None:
        self.events: list[EngineEvent] = []
        self._send, self._receive = trio.open_memory_channel[EngineEvent](1000)

    def __call__(self, event: EngineEvent) -> None:
        self.events.append(event)
        self._send.send_nowait(event)

    async def next(self, kind: type[EngineEvent]) -> EngineEvent:
        while not isinstance(event := await self._receive.receive(), kind):
            pass
        return event


def spec(path: Path) -> StageSpec:
    return StageSpec(str(path), None, device="cpu", threads=1)


async def test_killed_worker_comes_back_with_its_stage(tiny_llama_path: Path) -> None:
    diary, workers = Diary(), []

    def start() -> WorkerEngine:
        workers.append(start_worker(WorkerOptions(environment=os.environ)))
        return workers[-1]

    supervisor = Supervisor(start, diary)
    async with trio.open_nursery() as nursery:
        await nursery.start(supervisor.run)
        info = await supervisor.load(spec(tiny_llama_path))
        (before,) = await supervisor.step([STEP])
        os.kill(workers[0].pid, signal.SIGKILL)
        lost = await diary.next(Lost)
        assert isinstance(lost, Lost)
        assert "SIGKILL" in lost.why
        assert lost.retry_s == 0
        ready = await diary.next(Ready)
        assert isinstance(ready, Ready)
        assert (ready.info.span, ready.info.card) == (info.span, info.card)
        (after,) = await supervisor.step([STEP])
        assert after == before
        assert [type(event) for event in diary.events][:2] == [Lost, Loading]
        nursery.cancel_scope.cancel()
    assert [worker._process.status for worker in workers].count(None) == 0


async def test_calls_fail_at_once_while_the_worker_is_down(
    tiny_llama_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    diary, engines = Diary(), []

    def start() -> InlineEngine:
        engines.append(InlineEngine())
        return engines[-1]

    supervisor = Supervisor(start, diary, RestartPolicy(delays_s=(10.0, 20.0)))
    with pytest.raises(EngineLost, match="not running"):
        await supervisor.step([STEP])
    async with trio.open_nursery() as nursery:
        await nursery.start(supervisor.run)
        await supervisor.load(spec(tiny_llama_path))
        for count, delay in enumerate((10.0, 20.0), 1):
            engines[-1].break_down(f"loss {count}")
            assert await diary.next(Lost) == Lost(f"loss {count}", delay)
            with pytest.raises(EngineLost, match=f"loss {count}"):
                await supervisor.step([STEP])
            began = trio.current_time()
            await diary.next(Ready)
            assert trio.current_time() - began == delay
        engines[-1].break_down("loss 3")
        final = await diary.next(Lost)
    assert isinstance(final, Lost)
    assert final.retry_s is None
    assert "no further start after 3 losses" in final.why
    with pytest.raises(EngineLost, match="loss 3"):
        await supervisor.stats()


async def test_a_model_that_is_gone_ends_in_a_reason_not_in_a_loop(
    tmp_path: Path, tiny_llama_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    diary, engines = Diary(), []

    def start() -> InlineEngine:
        engines.append(InlineEngine())
        return engines[-1]

    (tmp_path / "model").symlink_to(tiny_llama_path)
    supervisor = Supervisor(start, diary, RestartPolicy(delays_s=(1.0, 1.0)))
    async with trio.open_nursery() as nursery:
        await nursery.start(supervisor.run)
        await supervisor.load(spec(tmp_path / "model"))
        (tmp_path / "model").unlink()
        engines[0].break_down("first")
    whys = [event.why for event in diary.events if isinstance(event, Lost)]
    assert len(whys) == 3
    assert "first" in whys[0]
    assert str(tmp_path / "model") in whys[1]
    assert "no further start" in whys[2]


async def test_no_process_to_be_had_is_a_loss_like_any_other(autojump_clock: trio.testing.MockClock) -> None:
    def start() -> InlineEngine:
        raise OSError(11, "Resource temporarily unavailable")

    diary = Diary()
    await Supervisor(start, diary, RestartPolicy(delays_s=(1.0,))).run()
    whys = [event.why for event in diary.events if isinstance(event, Lost)]
    assert len(whys) == 2
    assert all("could be started" in why and "temporarily unavailable" in why for why in whys)


@given(st.lists(st.floats(0, 5000), min_size=1, max_size=20), st.floats(1, 2000))
def test_restarts_are_bounded_in_every_window(times: list[float], window: float) -> None:
    policy = RestartPolicy(delays_s=(0.0, 1.0, 5.0), window_s=window)
    losses = sorted(times)
    delay = plan_restart(policy, losses, losses[-1])
    recent = sum(1 for loss in losses if losses[-1] - loss < window)
    assert delay == (policy.delays_s[recent - 1] if recent <= 3 else None)


def test_old_losses_are_forgotten() -> None:
    policy = RestartPolicy(delays_s=(0.5,), window_s=60)
    assert plan_restart(policy, [0.0], 0.0) == 0.5
    assert plan_restart(policy, [0.0, 10.0], 10.0) is None
    assert plan_restart(policy, [0.0, 10.0, 100.0], 100.0) == 0.5
