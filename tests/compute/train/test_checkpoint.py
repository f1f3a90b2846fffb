"""Checkpoints: there and back, read by others, and refused where they are none."""

import numpy as np
import pytest
from safetensors.numpy import load

from mycel.compute.train.border import Border, BorderOptions
from mycel.compute.train.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from mycel.compute.train.layout import Entry, Layout
from mycel.compute.train.rows import to_safetensors
from mycel.protocol.errors import UsageProblem

LAYOUT = Layout((Entry("a.weight", (3, 4)), Entry("a.bias", (3,))))
OPTIONS = BorderOptions(every=2)


def a_border() -> Border:
    """One that has taken two outer steps."""
    border = Border(np.arange(15, dtype=np.float32), OPTIONS)
    for _ in range(2):
        border.begin_again()
        way = border.way_to(border.start - np.linspace(0, 1, 15, dtype=np.float32))
        border.apply(border.pack(way, 2), 1)
    return border


def test_a_course_goes_on_as_if_it_had_not_stopped():
    before = a_border()
    after = read_checkpoint(write_checkpoint(before, LAYOUT)).border(OPTIONS)
    assert after.steps == 2
    for border in (before, after):
        border.begin_again()
        border.apply(border.pack(np.ones(15, np.float32), 2), 1)
    for name, row in before.state().items():
        assert np.array_equal(after.state()[name], row)


def test_anybodys_reader_finds_the_weights():
    border = a_border()
    tensors = load(write_checkpoint(border, LAYOUT))
    assert np.array_equal(tensors["a.weight"], border.weights[:12].reshape(3, 4))
    assert tensors["outer.momentum"].shape == (15,)


def test_a_plain_model_begins_without_momentum():
    row = np.arange(15, dtype=np.float32)
    found = read_checkpoint(to_safetensors(row, LAYOUT))
    assert isinstance(found, Checkpoint)
    assert found.momentum is None
    assert found.steps == 0
    assert np.array_equal(found.weights, row)


def test_tensors_may_stand_in_another_order():
    border = a_border()
    found = read_checkpoint(write_checkpoint(border, LAYOUT)).laid_out(Layout(LAYOUT.entries[::-1]))
    assert np.array_equal(found.weights, np.roll(border.weights, 3))
    assert np.array_equal(found.momentum, np.roll(border.state()["momentum"], 3))
    with pytest.raises(UsageProblem, match=r"no 'a.bias' of shape \(4,\)"):
        found.laid_out(Layout((Entry("a.bias", (4,)),)))


@pytest.mark.parametrize("momentum", [14, 16])
def test_a_momentum_of_another_size_is_refused(momentum):
    layout = Layout((*LAYOUT.entries, Entry("outer.momentum", (momentum,))))
    content = to_safetensors(np.zeros(15 + momentum, np.float32), layout, {"steps": "1"})
    with pytest.raises(UsageProblem, match="momentum of shape"):
        read_checkpoint(content)


@pytest.mark.parametrize("steps", ["", "-1", "many"])
def test_steps_that_are_no_number_are_refused(steps):
    layout = Layout((*LAYOUT.entries, Entry("outer.momentum", (15,))))
    with pytest.raises(UsageProblem, match="steps are a number"):
        read_checkpoint(to_safetensors(np.zeros(30, np.float32), layout, {"steps": steps}))
