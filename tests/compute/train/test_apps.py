"""Applications and where they run: what functions get and give, bundles, momentum, rows that are none."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mycel.compute.train.app import App, Task
from mycel.compute.train.layout import Entry, Layout
from mycel.compute.train.rows import flatten, from_safetensors, layout_of, row_of, to_safetensors, unflatten
from mycel.compute.train.trade import Source, StartAsk, WorkAsk, WorkDone
from mycel.compute.train.workshop import Workshop
from mycel.node.jobs.federate import source_of
from mycel.node.jobs.kinds import FederateSpec
from mycel.node.jobs.spec import read_job_file
from mycel.protocol.errors import LocalProtocolError, Refused, UsageProblem
from mycel.protocol.tensor import Tensor

SETTINGS: dict[str, Any] = {"features": 4, "classes": 3, "hidden": "16", "rate": 0.1, "epochs": 3}


def work(shop: Workshop, app: str, data: Path, **more: Any) -> tuple[np.ndarray, WorkDone]:
    """One round from a model of zeros, or from `model`; (update, all that came)."""
    layout = more.pop("layout", Layout((Entry("w", (3,)),)))
    model = more.pop("model", np.zeros(layout.size, np.float32))
    asked = {"job": "job", "number": 1, "settings": {}, "seed": 1, "train": True, "evaluate": False} | more
    tensor = Tensor("float32", (layout.size,), model.data.cast("B"))
    done = shop.work(WorkAsk(app=app, layout=layout, model=tensor, data=str(data), **asked))
    assert done.update is not None
    return np.frombuffer(done.update.data, np.float32), done


def test_the_classifier_learns_and_is_the_same_for_the_same_seed(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    y = draw.integers(0, 3, 200)
    np.savez(tmp_path / "d.npz", x=np.eye(4)[y] * 3 + draw.normal(size=(200, 4)), y=y)
    shop = Workshop()
    shop.open(Source("classifier"))
    begun = shop.start(StartAsk("classifier", SETTINGS, 5))
    assert begun.layout.size == 4 * 16 + 16 + 16 * 3 + 3
    model = row_of(begun.model.data, begun.layout)
    more = {"layout": begun.layout, "model": model, "settings": SETTINGS}
    update, first = work(shop, "classifier", tmp_path / "d.npz", evaluate=True, **more)
    again, _ = work(shop, "classifier", tmp_path / "d.npz", **more)
    assert (update == again).all()
    more["model"] = model + update
    _, second = work(shop, "classifier", tmp_path / "d.npz", evaluate=True, **more)
    assert first.judged["accuracy"] < 0.8 < second.judged["accuracy"]
    assert second.examples == 200


def test_fedprox_holds_clients_near_where_they_began(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.random.default_rng(0).normal(size=(64, 4)), y=np.arange(64) % 3)
    shop = Workshop()
    shop.open(Source("classifier"))
    begun = shop.start(StartAsk("classifier", SETTINGS, 5))
    more = {"layout": begun.layout, "model": row_of(begun.model.data, begun.layout)}
    far, _ = work(shop, "classifier", tmp_path / "d.npz", settings=SETTINGS, **more)
    near, _ = work(shop, "classifier", tmp_path / "d.npz", settings={**SETTINGS, "proximal_mu": 5.0}, **more)
    assert np.linalg.norm(near) < 0.7 * np.linalg.norm(far)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"x": np.zeros((3, 4))}, "lacks x or y"),
        ({"x": np.zeros((3, 5)), "y": np.zeros(3)}, "5 features"),
        ({"x": np.zeros((3, 4)), "y": np.full(3, 9)}, "labels 9 to 9"),
        ({"x": np.zeros((3, 4)), "y": np.zeros(2)}, "3 examples and 2 labels"),
        ({"x": np.array([{}]), "y": np.zeros(1)}, "cannot be read as .npz: Object arrays"),
        (None, "cannot be read as .npz"),
    ],
)
def test_data_that_do_not_fit_are_named(tmp_path: Path, arrays: dict[str, Any] | None, words: str) -> None:
    path = tmp_path / "d.npz"
    if arrays is None:
        path.write_bytes(b"PK nonsense")
    else:
        np.savez(path, **arrays)
    shop = Workshop()
    shop.open(Source("classifier"))
    begun = shop.start(StartAsk("classifier", SETTINGS, 5))
    with pytest.raises(UsageProblem, match=words):
        work(shop, "classifier", path, layout=begun.layout, model=row_of(begun.model.data, begun.layout))


def test_worker_momentum_runs_over_rounds_and_counts_a_repeated_one_once(tmp_path: Path) -> None:
    app = App()

    @app.train
    def train(task: Task) -> Any:
        return task.done({"w": task.arrays["w"] + task.number}, examples=1)

    shop = Workshop()
    shop.add("own", app)
    momentum = {"settings": {"worker_momentum": 0.5}}
    sent = [work(shop, "own", tmp_path, number=number, **momentum)[0][0] for number in (1, 2, 2, 3)]
    assert sent == [1.0, 1.5, 1.5, 2.25]


def test_what_an_application_does_wrong_is_named(tmp_path: Path) -> None:
    for returns, words in [
        (lambda task: None, "returned NoneType; end it by return task.done"),
        (lambda task: task.done({"w": task.arrays["w"] * math.nan}, examples=1), "went astray"),
        (lambda task: task.done({"v": task.arrays["w"]}, examples=1), "1 tensors"),
        (lambda task: task.done({"w": np.zeros(4)}, examples=1), r"came back as \(4,\)"),
        (lambda task: task.done(7, examples=1), "a model is a mapping"),
        (lambda task: task.done(task.arrays, examples=1, loss="low"), "metrics are numbers"),
        (lambda task: task.done(task.arrays, examples="all"), "examples is how many"),
        (lambda task: task.done(task.arrays, examples=np.int64(-1)), "examples is how many"),
    ]:
        app = App()
        app.train(returns)
        shop = Workshop()
        shop.add("own", app)
        with pytest.raises((UsageProblem, LocalProtocolError), match=words):
            work(shop, "own", tmp_path)
    with pytest.raises(UsageProblem, match="with a function under @app"):
        Workshop().add("empty", App())


def test_the_example_application_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(__file__).resolve().parents[3] / "examples" / "jobs"
    code = (folder / "digits.py").read_bytes()
    spec = read_job_file(folder / "digits.toml")
    assert isinstance(spec, FederateSpec)
    draw = np.random.default_rng(0)
    y = draw.integers(0, 10, 300)
    np.savez(tmp_path / "d.npz", x=np.eye(64)[y] + 0.1 * draw.normal(size=(300, 64)), y=y)
    monkeypatch.setattr(sys, "path", list(sys.path))
    shop = Workshop()
    try:
        shop.open(source_of(spec, code).check())
    finally:
        sys.modules.pop("app", None)
    begun = shop.start(StartAsk(spec.app, spec.settings, 5))
    told = {**spec.settings, "rate": 0.2, "local-epochs": 5}  # so much of them that one round will do
    more: dict[str, Any] = {"layout": begun.layout, "settings": told, "evaluate": True}
    update, first = work(
        shop, spec.app, tmp_path / "d.npz", model=row_of(begun.model.data, begun.layout), **more
    )
    model = row_of(begun.model.data, begun.layout) + update
    _, second = work(shop, spec.app, tmp_path / "d.npz", model=model, **more)
    assert first.judged["accuracy"] < 0.5 < second.judged["accuracy"]


def test_a_language_model_on_text_learns_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("mycel mycel mycel " * 200)
    (tmp_path / "b.txt").write_text("mycel " * 300)
    shop = Workshop()
    shop.open(Source("causal-lm"))
    settings_: dict[str, Any] = {
        "width": 16,
        "layers": 1,
        "heads": 2,
        "length": 32,
        "steps": 12,
        "rate": 0.02,
    }
    begun = shop.start(StartAsk("causal-lm", settings_, 5))
    more: dict[str, Any] = {"layout": begun.layout, "settings": settings_, "evaluate": True}
    model = row_of(begun.model.data, begun.layout)
    update, first = work(shop, "causal-lm", tmp_path, model=model, **more)
    _, second = work(shop, "causal-lm", tmp_path, model=model + update, **more)
    assert first.judged["loss"] > 5.0
    assert second.judged["loss"] < 0.8 * first.judged["loss"]


def test_bundles_are_checked_before_they_are_written_anywhere() -> None:
    for files, words in [
        ({"../app.py": b""}, "named like"),
        ({"/etc/app.py": b""}, "named like"),
        ({"a/../../app.py": b""}, "named like"),
        ({"main.py": b""}, "has a file app.py"),
        ({"app.py": bytes(9 << 20)}, "at most"),
    ]:
        with pytest.raises(UsageProblem, match=words):
            Source("own", files).check()
    with pytest.raises(UsageProblem, match="built in are classifier"):
        Source("resnet").check()


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(0, 4), max_size=3),
            st.sampled_from(["float32", "float64", "float16", "int32", "uint8", "bool"]),
        ),
        min_size=1,
        max_size=5,
    )
)
def test_arrays_survive_rows_and_files(tensors: list[tuple[list[int], str]]) -> None:
    draw = np.random.default_rng(0)
    arrays = {f"t{n}": (draw.random(shape) * 200).astype(dtype) for n, (shape, dtype) in enumerate(tensors)}
    layout = layout_of(arrays)
    flat = flatten(arrays, layout)
    back = unflatten(flat, layout)
    for name, array in arrays.items():
        assert back[name].dtype == array.dtype
        assert np.array_equal(back[name], array.astype(np.float32).astype(array.dtype))
    found, plain, extra = from_safetensors(to_safetensors(flat, layout, {"round": "7"}))
    assert np.array_equal(found, flat)
    assert [entry.shape for entry in plain.entries] == [entry.shape for entry in layout.entries]
    assert extra == {"round": "7"}


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 300))
def test_files_that_lie_are_refused(junk: bytes, at: int) -> None:
    good = to_safetensors(np.ones(6, np.float32), Layout((Entry("a", (2, 3)),)))
    for content in (junk, good[:at], good[:at] + junk + good[at:]):
        if content != good:
            try:
                flat, layout, _ = from_safetensors(content)
            except UsageProblem:
                continue
            assert flat.size == layout.size  # still a file, of something else


def test_rows_that_are_none_are_refused_by_name() -> None:
    layout = Layout((Entry("w", (3,)),))
    for row, reason in [
        (np.zeros(2, np.float32), "wrong-size"),
        (np.array([1, np.nan, 0], np.float32), "not-finite"),
        (np.array([1, np.inf, 0], np.float32), "not-finite"),
        (np.array([1, 3e38, 3e38], np.float32), "not-finite"),
    ]:
        with pytest.raises(Refused) as refused:
            row_of(row.tobytes(), layout)
        assert refused.value.reason == reason
