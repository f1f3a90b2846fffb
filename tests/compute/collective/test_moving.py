"""Movers over the simulated mesh: the same bytes everywhere, inputs as they were, and named errors."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import trio
import trio.testing

from mycel.compute.collective import mover as mover_module
from mycel.compute.collective.asked import read_place, read_rule
from mycel.compute.collective.attempt import Attempt, AttemptFailed, InputRefused, Rule, Staged, part_of
from mycel.compute.collective.mover import RingMover
from mycel.compute.collective.streams import BULK, StreamLanes
from mycel.protocol.errors import StreamReset, UsageProblem
from mycel.protocol.lane import GONE, PART, READY, Head, Parcel
from mycel.protocol.limits import LaneLimits
from mycel.simnet.mesh import MeshOptions, MeshWorld, SimMesh, mesh_world

LIMITS = LaneLimits(small_bytes=1024, chunk_bytes=64 * 1024)
Array = np.ndarray[Any, Any]
Clock = trio.testing.MockClock
Act = Callable[[int, RingMover], Awaitable[Staged]]
Failure = AttemptFailed | InputRefused


class Ensemble:
    """Nodes with a mover each."""

    def __init__(self, world: MeshWorld, meshes: Sequence[SimMesh], movers: Sequence[RingMover]) -> None:
        self.world = world
        self.meshes = meshes
        self.movers = movers
        self.order = tuple(mesh.peer_id for mesh in meshes)

    def attempt(self, number: int = 0, tag: str = "t", epoch: int = 1) -> Attempt:
        """An attempt of all of them."""
        return Attempt("g", epoch, b"lineage8", tag, number, self.order)

    async def together(self, act: Act) -> list[Staged]:
        """What `act` stages at each."""
        staged: dict[int, Staged] = {}

        async def one(place: int) -> None:
            staged[place] = await act(place, self.movers[place])

        async with trio.open_nursery() as nursery:
            for place in range(len(self.movers)):
                nursery.start_soon(one, place)
        return [staged[place] for place in range(len(self.movers))]

    async def failures(self, act: Act, places: Sequence[int]) -> dict[int, Failure]:
        """What `act` raises at each of `places`."""
        errors: dict[int, Failure] = {}

        async def one(place: int) -> None:
            with pytest.raises((AttemptFailed, InputRefused)) as caught:
                await act(place, self.movers[place])
            errors[place] = caught.value

        async with trio.open_nursery() as nursery:
            for place in places:
                nursery.start_soon(one, place)
        return errors


@asynccontextmanager
async def open_ensemble(count: int, **options: Any) -> AsyncIterator[Ensemble]:
    async with mesh_world(MeshOptions(seed=2)) as world, trio.open_nursery() as nursery:
        meshes = [world.add() for _ in range(count)]
        movers = []
        for at, mesh in enumerate(meshes):
            for other in meshes[:at]:
                await mesh.connect(other.listen_addrs)
            lanes = StreamLanes(mesh, LIMITS)
            movers.append(RingMover(mesh, lanes, **{"limits": LIMITS, **options}))
            await nursery.start(lanes.run)
            await nursery.start(movers[-1].run)
        yield Ensemble(world, meshes, movers)
        nursery.cancel_scope.cancel()


@pytest.fixture
def ensemble() -> Callable[..., AbstractAsyncContextManager[Ensemble]]:
    return open_ensemble


def inputs(count: int, items: int, dtype: str = "float32") -> list[Array]:
    chance = np.random.default_rng(items)
    drawn = [chance.standard_normal(items) * 20 - 5 for _ in range(count)]
    if dtype == "bfloat16":  # the upper half of a float32, which numpy has no word for
        return [(row.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16) for row in drawn]
    return [row.astype(dtype) for row in drawn]


def numbers(array: Array, dtype: str) -> Array:
    """What the items of `array` stand for."""
    if dtype == "bfloat16":
        array = (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float64)


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize(
    ("rule", "items", "loss"),
    [
        (Rule("float32", "avg"), 100_003, 1e-5),
        (Rule("float32", "sum"), 3, 1e-5),
        (Rule("float64", "min"), 40_000, 0.0),
        (Rule("int64", "max"), 40_000, 0.0),
        (Rule("int32", "sum"), 40_000, 0.0),
        (Rule("float16", "avg"), 30_000, 0.1),
        (Rule("bfloat16", "avg"), 30_000, 1.0),
        (Rule("float32", "avg", "int8"), 100_003, 1.5),
        (Rule("float16", "avg", "int4"), 40_000, 40.0),
    ],
    ids=lambda value: f"{value.op}-{value.dtype}-{value.codec}" if isinstance(value, Rule) else None,
)
async def test_all_reduce_is_right_and_the_same_everywhere(
    ensemble: Any, autojump_clock: Clock, count: int, rule: Rule, items: int, loss: float
) -> None:
    async with ensemble(count) as those:
        arrays = inputs(count, items, rule.dtype)
        before = [array.copy() for array in arrays]
        exact = np.stack([numbers(array, rule.dtype) for array in before])
        wanted = {"avg": exact.mean(0), "sum": exact.sum(0), "min": exact.min(0), "max": exact.max(0)}[
            rule.op
        ]

        staged = await those.together(lambda at, mover: mover.all_reduce(those.attempt(), arrays[at], rule))
        for one in staged:
            one.drop()
        assert all(np.array_equal(a, b) for a, b in zip(arrays, before, strict=True))

        into = [np.empty_like(array) for array in arrays]
        staged = await those.together(
            lambda at, mover: mover.all_reduce(those.attempt(1), arrays[at], rule, into[at])
        )
        assert all(np.array_equal(a, b) for a, b in zip(arrays, before, strict=True))
        for one in staged:
            one.keep()

        staged = await those.together(lambda at, mover: mover.all_reduce(those.attempt(2), arrays[at], rule))
        for one in staged:
            one.keep()
        assert len({array.tobytes() for array in [*arrays, *into]}) == 1
        assert np.abs(numbers(arrays[0], rule.dtype) - wanted).max() <= loss


async def test_parts_wholes_and_broadcasts(ensemble: Any, autojump_clock: Clock) -> None:
    async with ensemble(3) as those:
        arrays, rule, attempt = inputs(3, 50_001), Rule("float32", "sum"), those.attempt
        slices = [part_of(50_001, 3, at) for at in range(3)]
        parts = [np.empty(one.stop - one.start, np.float32) for one in slices]
        whole_sum = np.stack(arrays).sum(0)
        before = [array.copy() for array in arrays]
        for one in await those.together(
            lambda at, mover: mover.reduce_scatter(attempt(1), arrays[at], parts[at], rule)
        ):
            one.keep()
        assert all(np.allclose(parts[at], whole_sum[slices[at]], atol=1e-4) for at in range(3))
        assert all(np.array_equal(a, b) for a, b in zip(arrays, before, strict=True))

        own = [array[:30_000] for array in arrays]
        for codec in (None, "int8"):
            wholes = [np.zeros(90_000, np.float32) for _ in range(3)]
            gather = Rule("float32", codec=codec)
            number = 2 if codec else 3
            for one in await those.together(
                lambda at, mover, g=gather, w=wholes, n=number: mover.all_gather(
                    attempt(n), own[at], w[at], g
                )
            ):
                one.keep()
            assert len({whole.tobytes() for whole in wholes}) == 1
            assert np.abs(wholes[0] - np.concatenate(own)).max() <= (0.5 if codec else 0)

        root = those.order[1]
        for one in await those.together(
            lambda at, mover: mover.broadcast(attempt(4), arrays[at], root, Rule("float32"))
        ):
            one.keep()
        assert all(np.array_equal(array, before[1]) for array in arrays)


async def test_the_ring_avoids_a_slow_line(
    ensemble: Any, autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = replace(LIMITS, survey_bytes=1000)
    async with ensemble(4, limits=limits) as those:
        arrays = inputs(4, 50_000)
        exact = np.stack(arrays).mean(0)
        for at, mover in enumerate(those.movers):
            slow = those.order[(at + 1) % 4] if at == 1 else ""
            monkeypatch.setattr(mover._lanes, "rate", lambda peer, slow=slow: 1e6 if peer == slow else 1e9)
        ways = []
        draw = mover_module.draw_plan

        def note(task: Any, circle: tuple[int, ...], *rest: Any) -> Any:
            ways.append(circle)
            return draw(task, circle, *rest)

        monkeypatch.setattr(mover_module, "draw_plan", note)
        for one in await those.together(reduce(those, arrays)):
            one.keep()
        assert len({array.tobytes() for array in arrays}) == 1
        assert np.allclose(arrays[0], exact, atol=1e-4)
        chosen = [way for way in ways if way != (0, 1, 2, 3)]
        assert len(chosen) == 4
        assert len(set(chosen)) == 1
        assert chosen[0][(chosen[0].index(1) + 1) % 4] != 2
        assert not any(mover._told or mover._runs for mover in those.movers)


async def test_tags_run_at_once_and_in_any_order(ensemble: Any, autojump_clock: Clock) -> None:
    async with ensemble(3) as those:
        arrays = {tag: inputs(3, 60_000 + at) for at, tag in enumerate("abcdefgh")}
        sums = {tag: np.stack(found).sum(0) for tag, found in arrays.items()}

        async def reduce(at: int, tag: str, pause: float) -> None:
            await trio.sleep(pause)
            attempt = those.attempt(tag=tag)
            staged = await those.movers[at].all_reduce(attempt, arrays[tag][at], Rule("float32", "sum"))
            await trio.sleep(1)  # until all have it
            staged.keep()

        async with trio.open_nursery() as nursery:
            for at in range(3):
                for turn, tag in enumerate(arrays):
                    nursery.start_soon(reduce, at, tag, 0.05 * ((turn * (at + 1)) % 8))
        for tag, found in arrays.items():
            assert len({array.tobytes() for array in found}) == 1
            assert np.allclose(found[0], sums[tag], atol=1e-4)


async def test_feedback_makes_up_for_what_was_lost(ensemble: Any, autojump_clock: Clock) -> None:
    async with ensemble(2) as those:
        exact = inputs(2, 20_000)
        mean = (exact[0] + exact[1]) / 2
        totals = {}
        for feedback in (False, True):
            rule = Rule("float32", "avg", "int4", feedback)
            totals[feedback] = np.zeros(20_000)
            for number in range(12):
                arrays = [array.copy() for array in exact]
                attempt = those.attempt(number, tag=str(feedback))
                staged = await those.together(
                    lambda at, mover, a=attempt, b=arrays, r=rule: mover.all_reduce(a, b[at], r)
                )
                for one in staged:
                    one.keep()
                totals[feedback] += arrays[0]
        error = {way: np.abs(total / 12 - mean).mean() for way, total in totals.items()}
        assert error[True] < error[False] / 3


def reduce(those: Ensemble, arrays: Sequence[Array], rule: Rule = Rule("float32"), number: int = 0) -> Act:
    """All-reduce of `arrays`."""
    return lambda at, mover: mover.all_reduce(those.attempt(number), arrays[at], rule)


async def test_a_death_ends_it_at_once_with_inputs_as_they_were(ensemble: Any, autojump_clock: Clock) -> None:
    async with ensemble(4) as those:
        arrays = inputs(4, 2_000_000)
        before = [array.copy() for array in arrays]
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            doomed = trio.CancelScope()

            async def die() -> None:
                with doomed:
                    await those.movers[2].all_reduce(those.attempt(), arrays[2], Rule("float32"))

            async def kill() -> None:
                await trio.sleep(0.3)
                assert any(not np.array_equal(a, b) for a, b in zip(arrays, before, strict=True))
                those.world.kill(those.meshes[2])
                doomed.cancel()

            nursery.start_soon(die)
            nursery.start_soon(kill)
            errors = await those.failures(reduce(those, arrays), (0, 1, 3))
            assert trio.current_time() - began < 0.3 + 0.3  # until the death, and the news of it
        assert {error.peer for error in errors.values()} == {those.order[2]}
        assert all(np.array_equal(a, b) for a, b in zip(arrays, before, strict=True))


async def test_who_does_not_begin_is_named_within_the_deadline(ensemble: Any, autojump_clock: Clock) -> None:
    async with ensemble(3) as those:
        arrays = inputs(3, 50_000)
        before = [array.copy() for array in arrays]
        began = trio.current_time()
        errors = await those.failures(reduce(those, arrays), (0, 2))
        assert trio.current_time() - began < LIMITS.progress_s * 1.3
        assert {error.peer for error in errors.values()} == {those.order[1]}
        assert "did not begin" in str(errors[0])
        assert all(np.array_equal(a, b) for a, b in zip(arrays, before, strict=True))


async def test_giving_up_goes_round_and_a_late_beginner_hears_of_it(
    ensemble: Any, autojump_clock: Clock
) -> None:
    async with ensemble(3) as those:
        arrays = inputs(3, 500_000)
        with trio.move_on_after(0.5):
            await those.movers[0].all_reduce(those.attempt(), arrays[0], Rule("float32"))
        began = trio.current_time()
        errors = await those.failures(reduce(those, arrays), (1, 2))
        assert trio.current_time() - began < 0.5
        assert all("gave the attempt up" in str(error) for error in errors.values())


async def test_other_arrays_under_one_tag_are_named(ensemble: Any, autojump_clock: Clock) -> None:
    async with ensemble(2) as those:
        arrays = [np.zeros(5000, np.float32), np.zeros(6000, np.float32)]
        errors = await those.failures(reduce(those, arrays), (0, 1))
        assert any("5000 float32" in str(error) and "6000 float32" in str(error) for error in errors.values())


async def test_a_peer_of_an_earlier_epoch_is_named(ensemble: Any, autojump_clock: Clock) -> None:
    async with ensemble(2) as those:
        arrays = inputs(2, 5000)

        def act(at: int, mover: RingMover) -> Awaitable[Staged]:
            return mover.all_reduce(those.attempt(epoch=3 + at), arrays[at], Rule("float32"))

        errors = await those.failures(act, (0, 1))
        assert "is at epoch 4, this attempt is of epoch 3" in str(errors[0])


async def test_items_that_are_not_finite(ensemble: Any, autojump_clock: Clock) -> None:
    async with ensemble(2) as those:
        arrays = inputs(2, 30_000)
        arrays[1][77] = np.nan
        for one in await those.together(reduce(those, arrays)):
            one.keep()
        assert np.isnan(arrays[0][77])
        assert arrays[0].tobytes() == arrays[1].tobytes()
        errors = await those.failures(reduce(those, arrays, Rule("float32", codec="int8"), 1), (0, 1))
        assert any(isinstance(error, InputRefused) for error in errors.values())
        assert "not a number" in str(errors[0])
    async with ensemble(2, nonfinite="refuse") as those:
        arrays = inputs(2, 30_000)
        arrays[1][77] = np.inf
        errors = await those.failures(reduce(those, arrays, number=2), (1,))
        assert isinstance(errors[1], InputRefused)


async def test_rules_that_make_no_sense_are_refused_before_anything_moves(
    ensemble: Any, autojump_clock: Clock
) -> None:
    async with ensemble(2) as those:
        for rule in (
            Rule("int32", codec="int8"),
            Rule("float32", "max", "int8"),
            Rule("float32", codec="zip"),
        ):
            with pytest.raises(ValueError, match=rule.codec):
                await those.movers[0].all_reduce(those.attempt(), np.zeros(9, rule.dtype), rule)


@pytest.mark.parametrize(
    ("lie", "words"),
    [
        ({"length": 3}, "comes as 3 bytes"),
        ({"part": 1}, "is not its to send"),
        ({"part": 60}, "is not its to send"),
        ({"chunk": 10_000}, "is not its to send"),
        ({"phase": 9}, "is not its to send"),
    ],
    ids=str,
)
async def test_lies_of_a_member_are_named_and_change_nothing(
    ensemble: Any, autojump_clock: Clock, lie: dict[str, int], words: str
) -> None:
    async with ensemble(2) as those:
        arrays = inputs(2, 60_000)
        before = arrays[0].copy()
        heads: list[Head] = []
        known = trio.Event()
        liar = those.meshes[1]
        real = those.movers[1]
        send = real._lanes.send

        def withhold(parcel: Parcel) -> None:
            heads.append(parcel.head)
            known.set()

        real._lanes.send = withhold  # type: ignore[method-assign]

        async def tell_lies() -> None:
            with trio.fail_after(5):
                await known.wait()
            stream = await liar.open_stream(those.order[0], BULK)
            head = heads[0]._replace(**lie)
            await stream.send(head.pack() + bytes(head.length))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(tell_lies)
            errors = await those.failures(reduce(those, arrays), (0, 1))
        assert words in str(errors[0])
        assert isinstance(errors[0], AttemptFailed)
        assert errors[0].peer == those.order[1]
        assert np.array_equal(arrays[0], before)
        real._lanes.send = send  # type: ignore[method-assign]
        for one in await those.together(reduce(those, arrays, number=1)):  # all the others go on
            one.keep()
        assert arrays[0].tobytes() == arrays[1].tobytes()


async def test_frames_of_strangers_and_of_nothing_are_thrown_away(
    ensemble: Any, autojump_clock: Clock
) -> None:
    async with ensemble(3) as those:
        arrays = inputs(2, 60_000)
        stranger = await those.meshes[2].open_stream(those.order[0], BULK)
        attempt = Attempt("g", 1, b"lineage8", "t", 0, those.order[:2])

        async def one(at: int) -> None:
            staged = await those.movers[at].all_reduce(attempt, arrays[at], Rule("float32"))
            await trio.sleep(1)
            staged.keep()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(one, 0)
            while not (under_way := list(those.movers[0]._runs)):
                await trio.lowlevel.checkpoint()
            for op in (under_way[0], b"x" * 16):
                await stranger.send(Head(op, PART, 0, 0, 0, 65536).pack() + bytes(65536))
            for kind in (READY, GONE):
                await stranger.send(Head(under_way[0], kind, length=4).pack() + b"junk")
            await trio.sleep(0.5)
            nursery.start_soon(one, 1)
        assert those.movers[0].strays == 2
        assert arrays[0].tobytes() == arrays[1].tobytes()


@pytest.mark.parametrize(
    "frame",
    [
        Head(b"o" * 16, 7).pack(),
        Head(b"o" * 16, PART, length=1 << 31).pack(),
        Head(b"o" * 16, READY, length=1 << 20).pack(),
    ],
    ids=["kind", "length", "control"],
)
async def test_frames_that_are_none_end_their_stream(
    ensemble: Any, autojump_clock: Clock, frame: bytes
) -> None:
    async with ensemble(2) as those:
        stream = await those.meshes[1].open_stream(those.order[0], BULK)
        await stream.send(frame)
        with pytest.raises(StreamReset):
            await stream.receive_some()


def test_what_callers_ask_is_read_or_refused() -> None:
    array = np.zeros((3, 4), np.float32)
    assert read_rule(array, "", "sum", "int8+feedback") == Rule("float32", "sum", "int8", True)
    assert read_rule(array.view(np.uint16), "bfloat16", "max", None) == Rule("bfloat16", "max")
    for codec, op in (("int8+more", "avg"), (None, "product")):
        with pytest.raises(UsageProblem):
            read_rule(array, "", op, codec)
    assert read_place(np.ones(12, np.float32), array).shape == (12,)
    column = np.ones((12, 2), np.float32)[:, 0]
    for into in (array[:], np.ones(11, np.float32), np.ones(12, np.int32), column):
        with pytest.raises(UsageProblem):
            read_place(into, array)
