"""A federated job on daemons that are processes of their own: the data stay where they are, whoever dies."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np

from mycel.compute.train.rows import from_safetensors
from mycel.node.client import Client

JOB = """
kind = "federate"
name = "blobs"
app = "classifier"
data = "blobs"
rounds = {rounds}
quorum = 2
[settings]
features = 4
classes = 3
hidden = "8"
rate = 0.02
epochs = {epochs}
"""
OWN = """
kind = "federate"
name = "own"
app = "digits"
code = "digits.py"
data = "blobs"
rounds = 3
patience_s = 1
[settings]
features = 4
classes = 3
rate = 0.05
local-epochs = 2
"""
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "jobs" / "digits.py"


def write_data(path: Path, seed: int) -> None:
    """Three blobs of points, the same three for every seed."""
    draw = np.random.default_rng(seed)
    y = draw.integers(0, 3, 90)
    np.savez(path, x=(np.eye(4)[y] * 3 + draw.normal(size=(90, 4))).astype(np.float32), y=y)


def test_a_federated_job_outlives_kill_9_of_its_coordinator_and_runs_only_trusted_code(
    machine, poll, tmp_path
):
    names = ["founder", "second", "third"]
    for seed, name in enumerate(names):
        write_data(tmp_path / f"{name}.npz", seed)
        machine(name).home.mkdir(mode=0o700)
        (machine(name).home / "config.toml").write_text(f'data = ["blobs={tmp_path / name}.npz"]\n')
    machine("founder").start("up")
    ticket = machine("founder").json("ticket")["text"]
    for name in names[1:]:
        machine(name).start("join", ticket)
    ask = {name: Client(machine(name).home) for name in names}
    poll(lambda: all(len(ask[name].get("peers")) == 2 for name in names))
    (tmp_path / "job.toml").write_text(JOB.format(rounds=24, epochs=150))
    job = machine("third").json("submit", str(tmp_path / "job.toml"))["id"]

    def view(name: str, which: str):
        return next((one for one in ask[name].get("jobs")["jobs"] if one["id"] == which), None)

    running = poll(lambda: (one := view("third", job)) and 2 <= one["step"] < 24 and one)
    peers = {ask[name].get("status")["peer"]: name for name in names}
    coordinator = machine(peers[running["coordinator"]])
    assert coordinator.process is not None
    coordinator.process.send_signal(signal.SIGKILL)
    coordinator.process.wait()
    left = [name for name in names if machine(name) is not coordinator]
    done = poll(lambda: (one := view(left[0], job)) and one["phase"] in ("done", "failed") and one)
    said = machine(left[1]).run("logs", job[:6]).stdout
    assert (done["phase"], done["epoch"] >= 2, done["step"]) == ("done", True, 24), said
    assert done["metrics"]["accuracy"] > 0.9
    assert done["metrics"]["clients"] == 2
    assert "going on after round" in said
    files = machine(left[1]).json("pull", "blobs", str(tmp_path / "out"))["files"]
    paths = {Path(file["path"]).name: Path(file["path"]) for file in files}
    _, layout, _ = from_safetensors(paths["model.safetensors"].read_bytes())
    assert [entry.name for entry in layout.entries] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert json.loads(paths["rounds.json"].read_text())[-1]["round"] == 24

    (tmp_path / "digits.py").write_bytes(EXAMPLE.read_bytes())
    (tmp_path / "own.toml").write_text(OWN)
    job = machine(left[0]).json("submit", str(tmp_path / "own.toml"))["id"]
    done = poll(lambda: (one := view(left[1], job)) and one["phase"] in ("done", "failed") and one)
    said = machine(left[1]).run("logs", "-f", job[:6]).stdout
    assert (done["phase"], done["metrics"]["clients"]) == ("done", 1), said  # its submitter trusts itself
    assert "whom this node's owner does not trust" in said
