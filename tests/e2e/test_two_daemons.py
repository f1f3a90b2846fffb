"""The whole way through real processes: found, join by ticket, serve, ask, lose a stage, leave."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM

PROMPT = "def main("
MachineOf = Callable[[str], Any]
Poll = Callable[[Callable[[], Any]], Any]

pytestmark = pytest.mark.slow


def transformers_text(folder: Path, prompt: str, tokens: int) -> str:
    """What `generate()` of transformers says, greedily, on the unsplit model."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([list(prompt.encode())])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
    new = [i for i in out[0, ids.shape[1] :].tolist() if i != 256]
    return bytes(new).decode("utf-8", "replace")


def test_two_daemons_serve_what_transformers_says(machine: MachineOf, poll: Poll, byte_model: Path) -> None:
    anna, bert = machine("anna"), machine("bert")
    up = anna.start("up", "--label", "anna", "--no-assign")
    ticket = anna.run("ticket").stdout.strip()
    joined = bert.start("join", ticket, "--label", "bert", "--no-assign")
    assert joined["swarm"] == up["swarm"]
    (peer,) = poll(lambda: anna.json("peers"))
    assert (peer["peer"], peer["access"], peer["path"]) == (joined["peer"], "member", "direct")
    assert anna.json("status")["peers"] == bert.json("status")["peers"] == 1

    assert anna.json("serve", str(byte_model), "--layers", "0:1")["end"] == 1
    unready = anna.run("generate", "-p", PROMPT, "-m", "tiny", rc=1)
    assert "1:4" in unready.stderr
    bert.run("serve", str(byte_model), "--layers", "1:4")
    (model,) = poll(lambda: [one for one in anna.json("models") if one["complete"]])
    assert {(one["label"], one["start"], one["end"]) for one in model["holders"]} == {
        ("anna", 0, 1),
        ("bert", 1, 4),
    }

    expected = transformers_text(byte_model, PROMPT, 40)
    for one in (anna, bert):
        told = one.json("generate", "-p", PROMPT, "-n", "40")
        assert told["text"] == expected
        assert [stage["span"] for stage in told["report"]["route"]] == [[0, 1], [1, 4]]
    plain = anna.run("generate", "-p", PROMPT, "-n", "40")
    assert plain.stdout == expected + "\n"
    assert "anna 0:1 → bert 1:4" in plain.stderr

    chat = bert.run("chat", "-n", "8", text="hello\n\n")
    assert transformers_text(byte_model, "User: hello\nAssistant:", 8) in chat.stdout

    with openai.OpenAI(base_url=up["api"], api_key="none", max_retries=0) as client:
        stream = client.completions.create(
            model="tiny", prompt=PROMPT, max_tokens=40, temperature=0, stream=True
        )
        assert "".join(chunk.choices[0].text for chunk in stream) == expected

    assert bert.stop() == 0
    poll(lambda: anna.json("peers") == [])
    assert anna.stop() == 0


def test_a_killed_daemon_is_replaced_in_the_middle_of_a_stream(
    machine: MachineOf, poll: Poll, byte_model: Path
) -> None:
    anna, bert, cleo = machine("anna"), machine("bert"), machine("cleo")
    api = anna.start("up", "--label", "anna", "--no-assign", "--serve", f"{byte_model}@0:2")["api"]
    ticket = anna.run("ticket").stdout.strip()
    for one in (bert, cleo):
        one.start("join", ticket, "--no-assign", "--serve", f"{byte_model}@2:4")
    poll(lambda: anna.json("models") and len(anna.json("models")[0]["holders"]) == 3)
    poll(lambda: all(one["state"] == "ready" for one in anna.json("models")[0]["holders"]))
    expected = transformers_text(byte_model, PROMPT, 300)
    peers = {one.json("status")["peer"]: one for one in (bert, cleo)}

    text = ""
    with openai.OpenAI(base_url=api, api_key="none", max_retries=0) as client:
        stream = client.completions.create(
            model="tiny", prompt=PROMPT, max_tokens=300, temperature=0, stream=True
        )
        for number, chunk in enumerate(stream):
            text += chunk.choices[0].text
            if number == 20:
                peer = anna.json("generate", "-p", "x", "-n", "2")["report"]["route"][1]["peer"]
                os.kill(peers[peer].process.pid, signal.SIGKILL)
    assert text == expected
    poll(lambda: len(anna.json("peers")) == 1)
