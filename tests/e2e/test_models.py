"""Models as blocks by the command line: added on one machine, served on others that never saw its files."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

from mycel.cli import cli
from mycel.node.client import Client

MachineOf = Callable[[str], Any]
PROMPT = "def "


def expected(model: Path, count: int) -> str:
    """What transformers' generate() says."""
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    prompt = torch.tensor([list(PROMPT.encode())])
    with torch.inference_mode():
        out = whole.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, do_sample=False,
            eos_token_id=256, pad_token_id=256,
        )  # fmt: skip
    tokens = [int(token) for token in out[0, prompt.shape[1] :] if token < 256]
    return bytes(tokens).decode("utf-8", "replace")


def weights_in(home: Path) -> list[str]:
    """Beginnings of the names of the weight files that were laid out."""
    return sorted(path.name[:11] for path in (home / "models").rglob("*.safetensors"))


@pytest.mark.slow
def test_a_model_is_served_by_name_where_nobody_has_its_files(
    machine: MachineOf, byte_model: Path, tmp_path: Path, poll: Callable[[Callable[[], Any]], Any]
) -> None:
    """Each holds its own layers alone, and the text is that of the unsplit model."""
    a, b, c = machine("a"), machine("b"), machine("c")
    a.start("up", "--no-assign")
    source = shutil.copytree(byte_model, tmp_path / "tiny")
    said = expected(source, 24)
    added = a.json("models", "add", str(source), "--name", "org/tiny")
    shutil.rmtree(source)
    assert added["here"]["held"] == [[0, 4]]
    ticket = a.run("ticket").stdout.strip()
    b.start("join", ticket, "--no-assign", "--serve", "tiny@0:2")
    c.start("join", ticket, "--no-assign")
    (listed,) = poll(lambda: Client(c.home).get("models/kept"))
    assert listed["root"] == added["root"]
    assert c.json("serve", "org/tiny", "--layers", "2:4")["model"] == "org/tiny"
    poll(lambda: Client(a.home).get("status")["models"] == ["org/tiny"])
    assert a.run("generate", "-p", PROMPT, "-n", "24").stdout.removesuffix("\n") == said
    for home, layers in ((b.home, ["layer-00000", "layer-00001"]), (c.home, ["layer-00002", "layer-00003"])):
        assert weights_in(home)[0].startswith("edge-")
        assert weights_in(home)[1:] == layers
    (kept,) = a.json("models", "list")
    assert sorted(keeper["held"] for keeper in kept["others"]) == [[[0, 2]], [[2, 4]]]


def test_models_say_what_they_can() -> None:
    page = CliRunner().invoke(cli, ["models", "--help"]).output
    for command in ("list", "add", "get", "remove"):
        assert f"mycel models {command}" in page
