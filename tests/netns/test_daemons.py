"""The program itself, started as a user starts it, on both sides of real NATs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from netlab.daemon import Daemon, until
from netlab.lab import Lab, kind
from transformers import AutoModelForCausalLM

from mycel.compute.model.tiny import tiny_model
from mycel.compute.tokenizer import byte_level_tokenizer_files

SETTLED_S = 60.0
READY_S = 90.0
TOKENS = 24
PROMPT = "def main("
LISTEN = ("--listen", "/ip4/0.0.0.0/tcp/4001")
HOMES = ("port", "symmetric", "carrier", "full cone")

pytestmark = pytest.mark.slow


@pytest.fixture
def town(tmp_path: Path) -> Iterator[dict[str, Daemon]]:
    """Two public hosts and a home of some kinds, each with a daemon that is not started yet."""
    with Lab() as lab:
        daemons = {}
        for name in ("hub", "second"):
            daemons[name] = Daemon(lab.public(name).home, tmp_path / name)
        for name in HOMES:
            daemons[name] = Daemon(lab.site(name, kind(name)).home, tmp_path / name)
        lab.open()
        try:
            yield daemons
        finally:
            for daemon in daemons.values():
                daemon.stop()


def expected(one: str, other: str) -> str:
    """Two homes end up connected over a relay only where one is symmetric and the other asks for the port."""
    strict = {"port", "carrier", "symmetric"}
    return "relayed" if "symmetric" in (one, other) and {one, other} <= strict else "direct"


def gather(town: dict[str, Daemon], names: Sequence[str]) -> None:
    """Let the first of them found a swarm and the others join it by ticket."""
    first, *others = names
    town[first].start("up", *LISTEN)
    ticket = town[first].run("ticket").strip()
    for name in others:
        town[name].start("join", ticket, *LISTEN)


def test_everybody_reaches_everybody(town: dict[str, Daemon]) -> None:
    gather(town, list(town))
    wanted = {one: {other: expected(one, other) for other in town if other != one} for one in town}
    found: dict[str, dict[str, str]] = {}

    def settled() -> bool:
        found.update({name: daemon.paths() for name, daemon in town.items()})
        return found == wanted

    try:
        until("every daemon is connected with every other as well as can be", SETTLED_S, settled)
    except AssertionError:
        assert found == wanted  # shows the difference
        raise
    shown = town["symmetric"].json("peers")
    assert {peer["label"]: peer["path"] for peer in shown} == wanted["symmetric"]
    assert [daemon.stop() for daemon in town.values()] == [0] * len(town)


def byte_model(folder: Path) -> Path:
    """A random model of 4 layers that reads and writes bytes."""
    model = tiny_model(folder, seed=3, vocab_size=257, max_position_embeddings=512, eos_token_id=256)
    for name, content in byte_level_tokenizer_files().items():
        (model / name).write_bytes(content)
    return model


def transformers_text(folder: Path) -> str:
    """What `generate()` of transformers says, greedily, on the unsplit model."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([list(PROMPT.encode())])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False)
    new = [i for i in out[0, ids.shape[1] :].tolist() if i != 256]
    return bytes(new).decode("utf-8", "replace")


def test_a_model_runs_over_relayed_connections(town: dict[str, Daemon], tmp_path: Path) -> None:
    """Its stages are behind a symmetric box and one that filters by port: no punch connects them."""
    model = byte_model(tmp_path / "tiny")
    gather(town, ["hub", "symmetric", "port", "carrier"])
    town["symmetric"].run("serve", str(model), "--layers", "0:2")
    town["port"].run("serve", str(model), "--layers", "2:4")
    owner = town["carrier"]

    def is_ready() -> bool:
        found = [one for one in owner.ask("models") if one["complete"]]
        return bool(found) and all(holder["state"] == "ready" for holder in found[0]["holders"])

    until("the whole model is there", READY_S, is_ready)
    told = owner.json("generate", "-p", PROMPT, "-n", str(TOKENS))
    assert told["text"] == transformers_text(model)
    assert [stage["span"] for stage in told["report"]["route"]] == [[0, 2], [2, 4]]
    assert town["port"].paths()["symmetric"] == town["symmetric"].paths()["port"] == "relayed"
    assert owner.paths() == {"hub": "direct", "symmetric": "relayed", "port": "direct"}
