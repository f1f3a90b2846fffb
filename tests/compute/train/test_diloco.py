"""DiLoCo over threads that really average: what peers share stays equal, whoever is slow, new or gone."""

import threading
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from mycel.compute.collective.state import BORDER_TAG
from mycel.compute.train.border import TAG, BorderOptions
from mycel.compute.train.diloco import DataParallel, DiLoCo
from mycel.compute.train.flat import FlatModule
from mycel.compute.train.outer import Outer, OuterOptions
from mycel.compute.train.peers import LeftOut, Reduced
from mycel.protocol.errors import LocalProtocolError, UsageProblem


@dataclass
class Table:
    """Where the threads of one test meet: sums in the order of their seats, so all get the same bits."""

    seats: int
    arrays: dict = field(default_factory=dict)
    epoch: int = 1

    def __post_init__(self):
        self.meeting = threading.Barrier(self.seats, timeout=30)

    def meet(self, seat, arrays):
        self.arrays[seat] = [np.copy(one) for one in arrays]
        self.meeting.wait()
        everybody = [self.arrays[other] for other in sorted(self.arrays)]
        self.meeting.wait()
        return everybody


class Seat:
    """One thread's `Peers`."""

    def __init__(self, table, seat):
        self.table, self.seat = table, seat
        self.awaited = lambda: False
        self.asked = {}
        """Tags under which it asked whether it is awaited."""
        self.left_out = None
        """Who misses the next reduction, as all seats know."""

    @property
    def count(self):
        return self.table.seats

    def all_reduce(self, array, *, op="avg", tag="", codec=None):
        rows = [one[0] for one in self.table.meet(self.seat, [array])]
        if self.seat == self.left_out:
            raise LeftOut("too slow")
        rows = [row for seat, row in enumerate(rows) if seat != self.left_out]
        sums = np.sum(rows, axis=0, dtype=array.dtype)
        array[:] = sums / len(rows) if op == "avg" else sums
        return Reduced(len(rows), self.table.epoch)

    def begin_all_reduce(self, array, *, op="avg", tag="", codec=None):
        return Later(self, array, op)

    def is_awaited(self, tag):
        self.asked[tag] = True
        return self.awaited()

    def sync(self, state):
        everybody = self.table.meet(self.seat, list(state.values()))
        pairs = list(zip(state.values(), everybody[0], strict=True))
        differs = not all(np.array_equal(mine, theirs) for mine, theirs in pairs)
        for mine, theirs in pairs:
            mine[...] = theirs
        return differs


@dataclass
class Later:
    seat: Seat
    array: np.ndarray
    op: str

    def wait(self):
        return self.seat.all_reduce(self.array, op=self.op)


def together(count, work):
    """Run `work(seat)` in as many threads; what they returned."""
    table, results, errors = Table(count), [None] * count, []

    def one(number):
        try:
            results[number] = work(Seat(table, number))
        except BaseException as error:  # boundary: raised in the test's own thread
            errors.append(error)
            table.meeting.abort()

    threads = [threading.Thread(target=one, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    if errors:
        raise errors[0]
    return results


DRAWING = threading.Lock()
"""The seed is the whole process's."""


def a_model(seed=0):
    with DRAWING:
        torch.manual_seed(seed)
        return a_fresh_model()


def a_fresh_model():
    return torch.nn.Sequential(torch.nn.Linear(5, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))


def train(seat, options, steps, *, seed=None, resume=None):
    """A small regression; every seat has data of its own."""
    model = a_model(seat.seat if seed is None else seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    diloco = DiLoCo(model, seat, options, resume=resume)
    generator = torch.Generator().manual_seed(100 + seat.seat)
    done = []
    for _ in range(steps):
        x = torch.randn(16, 5, generator=generator)
        optimizer.zero_grad()
        ((model(x) - x.sum(1, keepdim=True)) ** 2).mean().backward()
        optimizer.step()
        step = diloco.step()
        if step is not None:
            done.append(step)
    done.append(diloco.finish())
    return FlatModule(model).read(), diloco, done


@pytest.mark.parametrize("overlap", [False, True])
def test_peers_end_with_the_same_bits_whatever_they_began_with(overlap):
    runs = together(3, lambda seat: train(seat, BorderOptions(every=4, overlap=overlap), 18))
    weights = [run[0] for run in runs]
    assert all(np.array_equal(weights[0], other) for other in weights[1:])
    assert not np.array_equal(weights[0], FlatModule(a_model()).read())
    for _, diloco, done in runs:
        assert diloco.outer_steps == 4
        assert all(step.contributors == 3 for step in done if step)


def test_a_run_goes_on_from_a_file_on_another_number_of_peers(tmp_path):
    path, options = tmp_path / "run.safetensors", BorderOptions(every=4)
    (weights, diloco, _), _ = together(2, lambda seat: train(seat, options, 12))
    diloco.save(path)
    for seats in (1, 3):
        begun = together(seats, lambda seat: train(seat, options, 0, seed=7, resume=path))
        for row, other, _ in begun:
            assert other.outer_steps == 3
            assert np.array_equal(row, weights)
            assert np.array_equal(other._border.state()["momentum"], diloco._border.state()["momentum"])
        longer = together(seats, lambda seat: train(seat, options, 8, seed=7, resume=path))
        assert [run[1].outer_steps for run in longer] == [5] * seats
    with pytest.raises(UsageProblem, match=r"no '0.bias'"):
        torch_model = torch.nn.Sequential(torch.nn.Linear(5, 17), torch.nn.Tanh(), torch.nn.Linear(17, 1))
        DiLoCo(torch_model, Seat(Table(1), 0), resume=path)
    with pytest.raises(UsageProblem, match="cannot be read"):
        DiLoCo(a_model(), Seat(Table(1), 0), resume=tmp_path / "none")


def test_it_is_the_papers_algorithm():
    """Against the algorithm written out: local runs, their average, Nesterov."""
    runs = together(2, lambda seat: train(seat, BorderOptions(every=3), 6, seed=0))

    shared = Outer(FlatModule(a_model()).read(), OuterOptions())
    generators = [torch.Generator().manual_seed(100 + number) for number in range(2)]
    for _ in range(2):
        ways = []
        for generator in generators:
            model = a_model()
            FlatModule(model).write(shared.weights)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
            for _ in range(3):
                x = torch.randn(16, 5, generator=generator)
                optimizer.zero_grad()
                ((model(x) - x.sum(1, keepdim=True)) ** 2).mean().backward()
                optimizer.step()
            ways.append(shared.weights - FlatModule(model).read())
        shared.step((ways[0] + ways[1]) / np.float32(2))
    np.testing.assert_allclose(runs[0][0], shared.weights, rtol=1e-5, atol=1e-7)


def test_who_is_awaited_comes_early_and_counts_for_the_steps_it_took():
    """One seat takes 8 inner steps to a border, the other one 2 of its 8."""
    starts, ways = {}, {}

    def work(seat):
        model = a_model()
        options = BorderOptions(every=8, outer=OuterOptions(rate=1.0, momentum=0.0))
        diloco = DiLoCo(model, seat, options)
        flat = FlatModule(model)
        starts[seat.seat] = flat.read()
        steps = 8 if seat.seat == 0 else 2
        way = np.full(flat.count, 1.0 if seat.seat == 0 else -1.0, np.float32)
        ways[seat.seat] = way
        flat.write(starts[seat.seat] - way)
        for number in range(steps):
            seat.awaited = lambda last=number == steps - 1: last
            step = diloco.step()
            assert (step is None) == (number < steps - 1)
        return flat.read()

    weights = together(2, work)
    expected = starts[0] - (8 * ways[0] + 2 * ways[1]) / np.float32(10)
    np.testing.assert_allclose(weights[0], expected, rtol=1e-5, atol=1e-6)
    assert np.array_equal(weights[0], weights[1])


@pytest.mark.parametrize(("overlap", "tag"), [(False, TAG), (True, BORDER_TAG)])
def test_who_overlaps_is_awaited_at_the_border_since_its_row_is_given_long_before(overlap, tag):
    def work(seat):
        diloco = DiLoCo(a_model(), seat, BorderOptions(every=4, overlap=overlap))
        seat.awaited = lambda: True
        assert diloco.step() is not None
        assert list(seat.asked) == [tag]

    together(2, work)


def test_whoever_is_not_to_go_early_takes_all_its_steps():
    def work(seat):
        seat.awaited = lambda: True
        diloco = DiLoCo(a_model(), seat, BorderOptions(every=3, early=False))
        assert [diloco.step() is None for _ in range(6)] == [True, True, False] * 2

    together(2, work)


@pytest.mark.parametrize("overlap", [False, True])
def test_who_was_left_out_takes_over_the_others_state_and_goes_on(overlap):
    """The second of two misses a sum: its own way is lost, and nothing else."""

    def work(seat):
        model = a_model()
        flat = FlatModule(model)
        options = BorderOptions(
            every=1, overlap=overlap, outer=OuterOptions(rate=1.0, momentum=0.0), eager=0.0
        )
        diloco = DiLoCo(model, seat, options)
        begun = flat.read()
        for number in range(3):
            seat.left_out = 1 if number == 1 else None
            flat.write(flat.read() - np.float32(1 + seat.seat))
            step = diloco.step()
            assert step is not None
            if number == 1 and seat.seat == 1:
                assert step.contributors == 0
        diloco.finish()
        return begun - flat.read()

    ways = together(2, work)
    assert np.array_equal(ways[0], ways[1])
    np.testing.assert_allclose(ways[0], 1.5 + 1.0 + 1.5, rtol=1e-4)


def test_averaged_gradients_are_the_gradients_of_all_data():
    def work(seat):
        model = a_model(seat.seat)
        parallel = DataParallel(model, seat)
        x = torch.randn(8, 5, generator=torch.Generator().manual_seed(seat.seat))
        model(x).pow(2).mean().backward()
        assert parallel.average() == 2
        return FlatModule(model).read_gradients(), model, x

    (one, model, x), (other, _, y) = together(2, work)
    assert np.array_equal(one, other)
    model.zero_grad()
    model(torch.cat([x, y])).pow(2).mean().backward()
    np.testing.assert_allclose(one, FlatModule(model).read_gradients(), rtol=1e-4, atol=1e-6)


def test_half_precision_and_tied_weights_go_there_and_back():
    model = torch.nn.Sequential(
        torch.nn.Linear(3, 3, bias=False), torch.nn.Linear(3, 3, bias=False)
    ).bfloat16()
    model[1].weight = model[0].weight
    flat = FlatModule(model)
    assert flat.count == 9
    row = np.arange(9, dtype=np.float32)
    flat.write(row)
    assert np.array_equal(flat.read(), row)
    assert model[1].weight[2, 2].item() == 8.0
    with pytest.raises(LocalProtocolError, match="shape"):
        flat.write(row[:-1])
    with pytest.raises(LocalProtocolError, match="gradients"):
        FlatModule(torch.nn.Linear(2, 2).requires_grad_(False))
