"""A job on daemons that are processes of their own: its coordinator is killed, the others have the result."""

from __future__ import annotations

import json
import signal
from pathlib import Path

from mycel.node.client import Client

NONE = {"complete": False}
PROMPTS = 120
"""So many that the coordinator can be killed while some are done and some are not."""


def test_a_job_goes_on_after_kill_9_of_its_coordinator_and_is_pulled_from_any_peer(
    machine, byte_model, poll, tmp_path
):
    names = ["founder", "second", "third"]
    machine("founder").start("up")
    ticket = machine("founder").json("ticket")["text"]
    machine("second").start("join", ticket, "--serve", str(byte_model))
    machine("third").start("join", ticket)
    ask = {name: Client(machine(name).home) for name in names}
    poll(lambda: all(len(ask[name].get("peers")) == 2 for name in names))
    poll(lambda: all(model["complete"] for name in names for model in ask[name].get("models") or [NONE]))
    prompts = [json.dumps({"prompt": f"number {number} is", "id": number}) for number in range(PROMPTS)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(prompts))
    (tmp_path / "job.toml").write_text(
        'kind = "generate"\nname = "night"\nmodel = "tiny"\nprompts = "prompts.jsonl"\nat_once = 1\n'
        "[sampling]\nmax_tokens = 48\n"
    )
    (tmp_path / "wrong.toml").write_text('kind = "generate"\nmodle = "tiny"\n')
    wrong = machine("third").run("submit", str(tmp_path / "wrong.toml"), rc=2)
    assert "unknown key modle (did you mean model?)" in wrong.stderr
    job = machine("third").json("submit", str(tmp_path / "job.toml"))["id"]

    def view(name: str, which: str = job):
        return next((one for one in ask[name].get("jobs")["jobs"] if one["id"] == which), None)

    running = poll(lambda: (one := view("third")) and 0 < one["step"] < PROMPTS and one)
    peers = {ask[name].get("status")["peer"]: name for name in names}
    coordinator = machine(peers[running["coordinator"]])
    assert coordinator.process is not None
    coordinator.process.send_signal(signal.SIGKILL)
    coordinator.process.wait()
    left = [name for name in names if machine(name) is not coordinator]
    done = poll(lambda: (one := view(left[0])) and one["phase"] == "done" and one)
    assert (done["epoch"] >= 2, peers[done["coordinator"]] in left, done["step"]) == (True, True, PROMPTS)
    files = machine(left[1]).json("pull", "night", str(tmp_path / "out"))["files"]
    lines = [json.loads(line) for line in Path(files[0]["path"]).read_text("utf-8").splitlines()]
    assert [line["id"] for line in lines] == list(range(PROMPTS))
    assert all(line["finish"] in ("stop", "length") for line in lines)
    lines = machine(left[1]).run("logs", "-f", job[:6], "--json").stdout.splitlines()
    said = [json.loads(line)["text"] for line in lines]
    assert any(f"coordinates, epoch {done['epoch']}" in text for text in said)
    assert any("resumed with" in text for text in said)
    machine(left[1]).run("stop", "nobody", rc=1)
    again = machine(left[0]).json("submit", str(tmp_path / "job.toml"))["id"]
    assert machine(left[0]).json("stop", again[:10])["phase"] in ("stopping", "stopped")
    poll(lambda: (one := view(left[1], again)) and one["phase"] == "stopped")
    told = machine(left[1]).json("jobs")["jobs"]
    assert [(one["id"], one["phase"], one["kind"]) for one in told] == [
        (job, "done", "generate"),
        (again, "stopped", "generate"),
    ]
    nothing = machine(left[1]).run("pull", again, str(tmp_path / "none"), rc=1)
    assert "has no results yet" in nothing.stderr
