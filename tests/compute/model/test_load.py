"""Loading: only the files and tensors a stage needs, and clear words for whatever is wrong with them."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mycel.compute.engine import ModelUnsupported, Span, StageSpec, Work
from mycel.compute.model import checkpoint
from mycel.compute.model.card import read_card
from mycel.compute.model.load import load_stage
from mycel.compute.model.stage import Stage

SINGLE, INDEX = checkpoint.SINGLE, checkpoint.INDEX


def load(path: Path, span: Span | None = None, **spec: Any) -> Stage:
    return load_stage(StageSpec(str(path), span, device="cpu", threads=1, **spec))


@pytest.fixture
def copied(tiny: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """A tiny model's directory that a test may spoil."""

    def copy(family: str = "llama", **settings: Any) -> Path:
        return Path(shutil.copytree(tiny(family, **settings), tmp_path / "copy"))

    return copy


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Weight files as they are mapped."""
    names: list[str] = []
    real = checkpoint.safe_open

    def watch(path: str, **how: Any) -> Any:
        names.append(Path(path).name)
        return real(path, **how)

    monkeypatch.setattr(checkpoint, "safe_open", watch)
    return names


def files_of(path: Path, *prefixes: str) -> set[str]:
    weights = checkpoint.read_index(path / INDEX)
    return {file for name, file in weights.items() if name.startswith(prefixes)}


def test_a_stage_opens_only_the_files_of_its_layers(tiny: Callable[..., Path], opened: list[str]) -> None:
    path = tiny("llama", layers=6, shard_size="20KB")
    everything = set(checkpoint.read_index(path / INDEX).values())
    for span, prefixes in (
        (Span(2, 4), ("model.layers.2.", "model.layers.3.")),
        (Span(0, 1), ("model.layers.0.", "model.embed_tokens.")),
        (Span(5, 6), ("model.layers.5.", "model.norm.", "lm_head.")),
    ):
        opened.clear()
        stage = load(path, span)
        assert set(opened) == files_of(path, *prefixes)
        assert set(opened) < everything
        assert stage.info.span == span


def test_other_layers_files_need_not_be_there(copied: Callable[..., Path]) -> None:
    path = copied("llama", layers=6, shard_size="20KB")
    whole = load(path, Span(2, 4))
    needed = files_of(path, "model.layers.2.", "model.layers.3.")
    for file in set(checkpoint.read_index(path / INDEX).values()) - needed:
        (path / file).write_bytes(b"not weights")
    stage = load(path, Span(2, 4))
    assert stage.info.weight_bytes == whole.info.weight_bytes
    card = read_card(str(path))
    assert stage.info.weight_bytes <= 2 * card.layer_bytes + 1024


@pytest.mark.parametrize("family", ["llama-tied", "gpt2"])
def test_the_last_stage_of_a_tied_model_keeps_the_embeddings(
    family: str, tiny: Callable[..., Path], opened: list[str]
) -> None:
    path = tiny(family, layers=6, shard_size="20KB")
    load(path, Span(5, 6))
    embeddings = "model.embed_tokens." if family == "llama-tied" else "transformer.wte."
    assert files_of(path, embeddings) <= set(opened)
    assert not files_of(path, "model.layers.2.", "transformer.h.2.") & set(opened)


def test_experts_are_converted_from_the_needed_files_alone(
    tiny: Callable[..., Path], opened: list[str]
) -> None:
    path = tiny("mixtral", layers=6, shard_size="20KB")
    load(path, Span(2, 4))
    assert set(opened) == files_of(path, "model.layers.2.", "model.layers.3.")


def test_progress_is_told_in_order(tiny: Callable[..., Path]) -> None:
    told: list[tuple[float, str]] = []
    spec = StageSpec(str(tiny("llama")), Span(0, 2), device="cpu", threads=1)
    load_stage(spec, lambda fraction, what: told.append((fraction, what)))
    fractions = [fraction for fraction, _ in told]
    assert fractions == sorted(fractions)
    assert (fractions[0], fractions[-1]) == (0.0, 1.0)
    assert {what for _, what in told} >= {"loading weights", "trying it out", "ready"}


def spoil_header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    raw = path.read_bytes()
    [length] = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


def without(path: Path, name: str) -> None:
    tensors = load_file(path / SINGLE)
    del tensors[name]
    save_file(tensors, path / SINGLE, metadata={"format": "pt"})


def reshaped(path: Path, name: str) -> None:
    tensors = load_file(path / SINGLE)
    tensors[name] = torch.zeros(7, 5)
    save_file(tensors, path / SINGLE, metadata={"format": "pt"})


def truncated(path: Path) -> None:
    whole = (path / SINGLE).read_bytes()
    (path / SINGLE).write_bytes(whole[:-100])


LAST = "model.layers.3.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path: without(path, LAST), f"1 tensors are missing from its checkpoint, first {LAST}"),
        (lambda path: reshaped(path, LAST), LAST),
        (truncated, "lies outside"),
        (lambda path: (path / SINGLE).write_bytes(b""), "is no safetensors file"),
        (lambda path: (path / SINGLE).write_bytes(b"\xff" * 4096), "is no safetensors file"),
        (
            lambda path: spoil_header(path / SINGLE, lambda header: header.update(x=[1])),
            "broken safetensors header",
        ),
        (
            lambda path: spoil_header(path / SINGLE, lambda header: header[LAST].update(shape=[3, 3])),
            f"tensor {LAST} in",
        ),
        (lambda path: (path / "config.json").write_text("{"), "config.json cannot be used"),
        (
            lambda path: (path / "config.json").write_text('{"model_type": "nosuch"}'),
            "config.json cannot be used",
        ),
        (lambda path: (path / "generation_config.json").write_text("{"), "not readable JSON"),
    ],
)
def test_damage_is_named(copied: Callable[..., Path], spoil: Callable[[Path], None], said: str) -> None:
    path = copied()
    spoil(path)
    with pytest.raises(ModelUnsupported) as caught:
        load(path, Span(2, 4))
    assert said in str(caught.value)


def test_missing_models_and_files_are_named(copied: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        load(tmp_path / "empty")
    path = copied("llama", layers=6, shard_size="20KB")
    [file] = files_of(path, "model.layers.5.self_attn.q_proj.")
    (path / file).unlink()
    with pytest.raises(FileNotFoundError, match=file):
        load(path, Span(5, 6))


def test_pickled_checkpoints_are_refused(copied: Callable[..., Path]) -> None:
    path = copied()
    (path / SINGLE).rename(path / "pytorch_model.bin")
    with pytest.raises(ModelUnsupported, match=r"pytorch_model\.bin, a pickle"):
        load(path)


def test_an_index_may_not_point_outside(copied: Callable[..., Path]) -> None:
    path = copied("llama", layers=6, shard_size="20KB")
    index = json.loads((path / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = "../elsewhere.safetensors"
    (path / INDEX).write_text(json.dumps(index))
    with pytest.raises(ModelUnsupported, match="outside its directory"):
        load(path)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"span": Span(2, 9)}, "2:9 is no span"),
        ({"span": Span(3, 3)}, "3:3 is no span"),
        ({"dtype": "int8"}, "dtype 'int8'"),
        ({"device": "cuda:7"}, "this machine shows torch"),
        ({"device": "abacus"}, "is no device"),
    ],
)
def test_specs_that_make_no_sense(tiny: Callable[..., Path], spec: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        load_stage(StageSpec(**({"model": str(tiny("llama")), "span": None, "device": "cpu"} | spec)))


def test_models_that_cannot_be_cut_say_why_and_still_run_whole(tiny: Callable[..., Path]) -> None:
    path = tiny("gemma3n_text")
    with pytest.raises(ModelUnsupported) as caught:
        load(path, Span(0, 2))
    assert "Gemma3nForCausalLM) cannot be cut into stages" in str(caught.value)
    assert "serve it whole (layers 0:4)" in str(caught.value)
    stage = load(path)
    [done] = stage.step([Work("a", Span(0, 4), 0, tokens=(1, 2, 3))])
    assert done.error is None
    [part] = stage.step([Work("b", Span(0, 2), 0, tokens=(1, 2, 3))])
    assert part.error is not None
    assert "cannot be cut" in part.error


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "clip"}, "no causal language model"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "encoder-decoder"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantized"),
    ],
)
def test_models_of_other_kinds_are_refused(
    copied: Callable[..., Path], change: dict[str, Any], said: str
) -> None:
    path = copied()
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ModelUnsupported, match=said):
        load(path, Span(0, 2))


def test_models_that_look_ahead_are_refused(tiny: Callable[..., Path]) -> None:
    with pytest.raises(ModelUnsupported, match=r"BertLMHeadModel\): .* its attention looks ahead"):
        load(tiny("bert", is_decoder=False))


def test_the_fingerprint_tells_weights_apart(tiny: Callable[..., Path], tmp_path: Path) -> None:
    first, again = (read_card(str(tiny("llama", seed=0))) for _ in range(2))
    assert first == again
    other = read_card(str(tiny("llama", intermediate_size=64)))
    assert other.fingerprint != first.fingerprint
    moved = shutil.copytree(tiny("llama", seed=0), tmp_path / "elsewhere")
    assert read_card(str(moved)).fingerprint == first.fingerprint


def test_the_card_tells_sizes_as_they_are(tiny: Callable[..., Path]) -> None:
    for family in ("llama", "llama-tied", "mixtral"):
        path = tiny(family)
        card = read_card(str(path))
        total = sum(tensor.nbytes for tensor in load_file(path / SINGLE).values())
        assert card.edge_bytes + card.n_layers * card.layer_bytes == total
